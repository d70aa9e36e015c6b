"""`MARPipeline`: class-conditional images by masked autoregression over continuous tokens (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.condition import Condition
from armm.decoding.guidance import SCHEDULES, Guidance
from armm.decoding.masked import MaskedLatentDecoding
from armm.masked_latent_model import MaskedLatentModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .continuous import ContinuousPipeline
from .imagenet import class_indices
from .loading import check_choice
from .outputs import ARPipelineOutput
from .unified import images_to_pixels
from .unified_inpaint import mask_to_cells

__all__ = ["DiffusionPipeline", "MARPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("mar-base-256")
        >>> images = pipe(class_labels=[207, "red fox"], num_inference_steps=64).images
        >>> mixed = pipe(class_labels=[{"red fox": 1, "arctic fox": 1}]).images

        >>> pipe.enable_acceleration(armm.StepAnnealing.preset("mar-base"))
        >>> changed = pipe(class_labels=207, image=images[0], mask_image=mask).images  # white is redrawn
        ```
"""


class MARPipeline(ContinuousPipeline):
    """Generation and editing with a MAR transformer.

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels, and images into latents for editing.
        transformer (`MaskedLatentModel`): sees the tokens there are and denoises others.
        decoding (`MaskedLatentDecoding`): the decoding strategy.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    single_file_loader = "armm.convert.mar"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 3.0,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_inference_steps": 64,
        "head_steps": 100,
    }

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: MaskedLatentModel,
        decoding: MaskedLatentDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: Any = None,
        image: Any = None,
        mask_image: Any = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        num_inference_steps: int | None = None,
        head_steps: int | str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        orders: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        r"""Generates images, or redraws part of them.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            class_labels (`int`, `str`, `dict` or `list`): classes by number or, for ImageNet models, by name; -1 is no class; a
                dict of classes and weights mixes them. May be left out when an image is edited, which then follows the image alone.
            image (*optional*): the image to edit: PIL, an array or tensor in [0, 1], or a list; one for all classes or one for
                each. Cropped in the middle and resized to the model's size.
            mask_image (*optional*): white where the image is to be redrawn, in the same forms; a token is redrawn if any pixel of
                its cell is masked. All masks of a call must redraw equally many tokens.
            guidance_scale (`float`, *optional*): classifier-free guidance; 1 is off.
            guidance_schedule (`str`, *optional*): how guidance grows with the share of the tokens that are done: `"linear"`,
                `"constant"` or another one of `armm.decoding.guidance.SCHEDULES`.
            temperature (`float`, *optional*): of the noise in the steps of the head; less is less varied.
            num_inference_steps (`int`, *optional*): calls of the transformer, at most one for each token.
            head_steps (`int` or `str`, *optional*): denoising steps of the head in each of them, see `respaced_timesteps`.
                Overrides step annealing.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            latents (`torch.Tensor`, *optional*): latents [B, H * W, C] (or [1, ...]) to edit in place of `image`.
            noise (`torch.Tensor`, *optional*): recorded normal noise [B, 1 + head steps, N, C], see `PlacedNoise`; needs `orders`.
            orders (`torch.Tensor`, *optional*): int64 [B, N], the order of the positions; the last ones are drawn first.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (latents [B, H * W, C]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each call of
                the transformer; it may return replaced `latents`, set `pipe._guidance_scale`, or end the call with
                `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, 0 where none is drawn.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        settings = self.check_settings(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            num_inference_steps=num_inference_steps,
            head_steps=head_steps,
        )
        model = self.transformer
        weights = self.class_weights(class_labels, editing=mask_image is not None)
        known = self.known_latents(image, latents, mask_image)
        count = len(weights) if known is None else max(len(weights), len(known[0]))
        if len(weights) not in (1, count) or (known is not None and len(known[0]) not in (1, count)):
            raise ValueError(
                f"{len(weights)} `class_labels` and {len(known[0])} images to edit: give one for all or one for each."
            )
        weights = weights.expand(count, -1).repeat_interleave(num_images_per_prompt, 0)
        batch, steps = len(weights), settings["num_inference_steps"]
        self.check_generator(generator, batch)
        known_tokens = known_mask = None
        if known is not None:
            known_tokens, known_mask = (
                part.expand(count, *part.shape[1:]).repeat_interleave(num_images_per_prompt, 0) for part in known
            )
            if num_inference_steps is None:  # the checkpoint's number is for whole pictures
                steps = min(steps, int((~known_mask[0]).sum()))

        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        self._num_timesteps = steps
        guidance = Guidance(self._guidance_scale, schedule=settings["guidance_schedule"], progress="done")
        condition = self.condition_of(weights)
        null_condition = model.null_condition(batch) if guidance.active else None
        with self.progress_bar(total=steps) as bar:
            after_step = self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs)

            def after_tokens(step: int, tokens: torch.Tensor) -> torch.Tensor | None:
                replaced = after_step(step, model.unpatchify(tokens))
                return None if replaced is None else model.patchify(replaced)

            output = self.decoding(
                model,
                condition,
                null_condition,
                num_inference_steps=steps,
                head_steps=settings["head_steps"],
                annealing=self.annealing(head_steps),
                temperature=settings["temperature"],
                guidance=guidance,
                noise=generator if noise is None else noise,
                orders=orders,
                known_tokens=known_tokens,
                known_mask=known_mask,
                callback=after_tokens,
                interrupt=lambda: self._interrupt,
            )
        codes = Codes(latents=model.unpatchify(output.tokens), grid=(1, *self.grid))
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)

    # ------------------------------------------------------------------ pieces of a call

    def class_weights(self, class_labels: Any, editing: bool = False) -> torch.Tensor:
        """`class_labels` as weights of classes [B, classes + 1], the last of which is no class; each row adds up to 1."""
        classes = self.transformer.num_classes
        if class_labels is None:
            if not editing:
                raise ValueError("give `class_labels`; -1 draws without a class.")
            class_labels = -1
        if hasattr(class_labels, "tolist"):
            class_labels = class_labels.tolist()
        labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
        if not labels:
            raise ValueError("`class_labels` is empty: give at least one class.")
        weights = torch.zeros(len(labels), classes + 1)
        for row, label in zip(weights, labels, strict=True):
            parts = (
                label
                if isinstance(label, Mapping)
                else {label: 1.0}
                if isinstance(label, (int, str, np.integer))
                else None
            )
            if parts is None:
                class_indices(label, classes)  # says what is wrong with it
                raise TypeError(
                    f"`class_labels` must be class numbers, names, or dicts of them with weights, got {label!r}."
                )
            for part, weight in parts.items():
                self.check_number("weight of a class", weight, low=0.0)
                is_null = isinstance(part, (int, np.integer)) and not isinstance(part, bool) and part == -1
                row[classes if is_null else class_indices(part, classes)[0]] += weight
            if not row.sum() > 0:
                raise ValueError(f"the weights of a mixture in `class_labels` must not all be 0, got {label!r}.")
            row /= row.sum()
        return weights

    def condition_of(self, weights: torch.Tensor) -> Condition:
        """The condition on classes with these weights [B, classes + 1]."""
        device = self._execution_device
        if bool((weights.max(1).values == 1).all()):
            return self.transformer.condition(weights.argmax(1).to(device))
        return self.transformer.mixed_condition(weights.to(device))

    def known_latents(self, image: Any, latents: Any, mask_image: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Tokens [B, N, C'] and where they stay, bool [B, N]; None where nothing is edited."""
        if image is None and latents is None and mask_image is None:
            return None
        if mask_image is None or (image is None) == (latents is None):
            raise ValueError("editing takes `mask_image`, white where it is redrawn, and one of `image` and `latents`.")
        model, device = self.transformer, self._execution_device
        side = self.tokenizer.downsample * model.patch_size
        redraw = mask_to_cells(mask_image, self.image_size, side).flatten(1).to(device)
        if image is not None:
            pixels = images_to_pixels(image, self.image_size)
            pixels = pixels.to(device=device, dtype=next(self.tokenizer.parameters()).dtype)
            # One image at a time: an image's latents do not depend on what it is batched with, bit for bit.
            latents = torch.cat([self.tokenizer.encode(row[None]).latents for row in pixels])
        elif not isinstance(latents, torch.Tensor) or latents.shape[1:] != (
            self.grid[0] * self.grid[1],
            model.latent_channels,
        ):
            raise ValueError(
                f"`latents` must be a tensor [B, {self.grid[0] * self.grid[1]}, {model.latent_channels}], got "
                f"{list(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__}."
            )
        tokens = model.patchify(latents.to(device).float())
        count = max(len(tokens), len(redraw))
        for name, value in (("image", tokens), ("mask_image", redraw)):
            if len(value) not in (1, count):
                raise ValueError(
                    f"`{name}` has {len(value)} entries for {count} images: give one for all or one for each."
                )
        return tokens.expand(count, -1, -1), ~redraw.expand(count, -1)

    def check_settings(self, **given: Any) -> dict[str, Any]:
        """The settings of a call: the given ones, else the checkpoint's; out-of-range values are a ValueError."""
        settings = {name: self.setting(name, value) for name, value in given.items()}
        self.check_number("guidance_scale", settings["guidance_scale"], low=0.0)
        self.check_number("temperature", settings["temperature"], low=0.0)
        check_choice(settings["guidance_schedule"], sorted(SCHEDULES), "`guidance_schedule`")
        self.check_number("num_inference_steps", settings["num_inference_steps"], low=1, integer=True)
        settings["num_inference_steps"] = int(settings["num_inference_steps"])  # numpy integers are welcome
        self.decoding.solver.tables(settings["head_steps"])  # says what is wrong with it
        return settings
