"""`HiMARPipeline`: class-conditional images from low-resolution pivots (Hi-MAR, arXiv 2505.20288)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.guidance import SCHEDULES, Guidance
from armm.decoding.pivots import PivotLatentDecoding
from armm.pivot_latent_model import PivotLatentModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .continuous import ContinuousPipeline
from .imagenet import class_indices
from .loading import check_choice
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "HiMARPipeline", "HiMARPipelineOutput"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("himar-base-256")
        >>> output = pipe(class_labels=[207, "red fox"], output_pivots=True)
        >>> output.images, output.pivots  # and the small pictures that they were drawn around
        ```
"""


@dataclass
class HiMARPipelineOutput(ARPipelineOutput):
    """Generated images, and the small ones that they were drawn around.

    Args:
        pivots: in the form of `images`, if asked for with `output_pivots=True`.
    """

    pivots: list[PIL.Image.Image] | np.ndarray | torch.Tensor | None = None


class HiMARPipeline(ContinuousPipeline):
    """Generation with a Hi-MAR transformer: a small picture of pivots first, then the full one.

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels.
        transformer (`PivotLatentModel`): the two phases of one masked autoencoder.
        decoding (`PivotLatentDecoding`): the decoding strategy.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    single_file_loader = "armm.convert.himar"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 2.5,
        "pivot_guidance_scale": 2.7,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_inference_steps": 4,
        "num_pivot_steps": None,
        "head_steps": 250,
        "pivot_head_steps": 100,
    }

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: PivotLatentModel,
        decoding: PivotLatentDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | None = None,
        pivot_guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        num_inference_steps: int | None = None,
        num_pivot_steps: int | None = None,
        head_steps: int | str | None = None,
        pivot_head_steps: int | str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        orders: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        output_pivots: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> HiMARPipelineOutput | tuple[Any, ...]:
        r"""Generates images.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            class_labels (`int`, `str` or `list`): classes by number or, for ImageNet models, by name.
            guidance_scale, pivot_guidance_scale (`float`, *optional*): classifier-free guidance of the picture and of the pivots; 1
                is off.
            guidance_schedule (`str`, *optional*): how guidance grows with the share of the tokens that are done: `"linear"`,
                `"constant"` or another one of `armm.decoding.guidance.SCHEDULES`.
            temperature (`float`, *optional*): of the noise in the steps of the heads; less is less varied.
            num_inference_steps, num_pivot_steps (`int`, *optional*): calls of the transformer for the picture and for the pivots.
            head_steps, pivot_head_steps (`int` or `str`, *optional*): denoising steps of the heads in each of them, see
                `respaced_timesteps`. One of them overrides step annealing in both phases.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            orders (`torch.Tensor`, *optional*): int64 [B, P + N], the order of the pivots and then of the picture's tokens.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (latents [B, N, C]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple of what was asked for, in the order of the
                output's fields.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            output_pivots (`bool`, *optional*, defaults to `False`): also return the small pictures.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each call of
                the transformer, the pivots' first; it may return replaced `latents`, set `pipe._guidance_scale` (of the picture),
                or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, those of the running phase.

        Examples:

        Returns:
            [`HiMARPipelineOutput`] or `tuple`: the images (and the codes and pivots, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        settings = self.check_settings(
            guidance_scale=guidance_scale,
            pivot_guidance_scale=pivot_guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            num_inference_steps=num_inference_steps,
            num_pivot_steps=num_pivot_steps,
            head_steps=head_steps,
            pivot_head_steps=pivot_head_steps,
        )
        model, device = self.transformer, self._execution_device
        labels = [
            label for label in class_indices(class_labels, model.num_classes) for _ in range(num_images_per_prompt)
        ]
        batch = len(labels)
        self.check_generator(generator, batch)

        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        pivot_steps = self.decoding.pivot_steps(model, settings["num_pivot_steps"])
        self._num_timesteps = pivot_steps + settings["num_inference_steps"]
        guidance, pivot_guidance = (
            Guidance(settings[name], schedule=settings["guidance_schedule"], progress="done")
            for name in ("guidance_scale", "pivot_guidance_scale")
        )
        condition = model.condition(torch.tensor(labels, device=device))
        null_condition = model.null_condition(batch) if guidance.active or pivot_guidance.active else None
        with self.progress_bar(total=self._num_timesteps) as bar:
            names = callback_on_step_end_tensor_inputs

            def after_pivots(step: int, latents: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                return self.step_end(callback_on_step_end, names, step, {"latents": latents}).get("latents")

            def after_tokens(step: int, latents: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                replaced = self.step_end(callback_on_step_end, names, pivot_steps + step, {"latents": latents})
                guidance.scale = self._guidance_scale
                return replaced.get("latents")

            output = self.decoding(
                model,
                condition,
                null_condition,
                num_inference_steps=settings["num_inference_steps"],
                num_pivot_steps=pivot_steps,
                head_steps=settings["head_steps"],
                pivot_head_steps=settings["pivot_head_steps"],
                annealing=self.annealing(head_steps if pivot_head_steps is None else pivot_head_steps),
                temperature=settings["temperature"],
                guidance=guidance,
                pivot_guidance=pivot_guidance,
                noise=generator,
                orders=orders,
                callback=after_tokens,
                pivot_callback=after_pivots,
                interrupt=lambda: self._interrupt,
            )
        tokens = condition.embeds.new_zeros(batch, model.num_tokens, model.latent_channels)
        codes = Codes(latents=tokens if output.picture is None else output.picture.tokens, grid=(1, *self.grid))
        small = Codes(latents=output.pivots.tokens, grid=(1, *model.pivot_grid))
        pivots = self.decode_codes_to_images(small, output_type) if output_pivots else None
        images = self.decode_codes_to_images(codes, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images, *([codes] if output_codes else []), *([pivots] if output_pivots else []))
        return HiMARPipelineOutput(images, codes if output_codes else None, pivots)

    def check_settings(self, **given: Any) -> dict[str, Any]:
        settings = super().check_settings(**given)
        check_choice(settings["guidance_schedule"], sorted(SCHEDULES), "`guidance_schedule`")
        for name in ("head_steps", "pivot_head_steps"):
            self.decoding.picture_decoding.solver.tables(settings[name])  # says what is wrong with it
        return settings
