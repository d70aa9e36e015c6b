"""`XARPipeline`: class-conditional images by next-X prediction with flow matching (xAR, arXiv 2502.20388)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.next_x import NextXDecoding
from armm.next_x_model import NextXModel
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .flow import FlowPipeline
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "XARPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("xar-base-256")
        >>> images = pipe(class_labels=[207, "red fox"], guidance_scale=2.7, num_flow_steps=40).images

        >>> pipe = armm.XARPipeline.from_single_file("xAR-B.pth", tokenizer="kl16.ckpt")
        >>> pipe.enable_acceleration(armm.StepAnnealing.preset("xar-base-256"))
        >>> pipe.decoding = armm.NextXDecoding("cell", 8, solver="euler")  # the deterministic sampler
        ```
"""


class XARPipeline(FlowPipeline):
    """Generation with an xAR transformer, cell by cell (or whichever entity `decoding` names).

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels.
        transformer (`NextXModel`): predicts the velocities of noisy entities.
        decoding (`NextXDecoding`): the entity and the solver.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    single_file_loader = "armm.convert.xar"
    min_flow_steps: ClassVar[int] = 3

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: NextXModel,
        decoding: NextXDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)

    @property
    def num_entities(self) -> int:
        """How many entities a picture is made of, one after the other."""
        return len(self.decoding.plan(self.grid).sizes)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_high: float | None = None,
        num_flow_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        r"""Generates images.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            class_labels (`int`, `str` or `list`): classes by number or, for ImageNet models, by name.
            guidance_scale (`float`, *optional*): classifier-free guidance, reached at the last entity; 1 is off.
            guidance_schedule (`str`, *optional*): how it grows to that from 1 at the first: `"linear"` (the authors'),
                `"constant"` and the others of `armm.Guidance`.
            guidance_high (`float`, *optional*): flow times above it are not guided; 1 guides all.
            num_flow_steps (`int`, *optional*, at least 3): steps of the solver for each entity, each one call of the transformer.
                Overrides step annealing.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            noise (`list` of `torch.Tensor`, *optional*): recorded normal noise in place of the generator's: for each entity its
                start [B, n, C], then, with "euler_maruyama", the noise of each step but the last.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (latents [B, N, C]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each entity;
                it may return replaced `latents`, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the picture so far.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        return self.generate(
            class_labels,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_high=guidance_high,
            num_flow_steps=num_flow_steps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            noise=noise,
            output_type=output_type,
            return_dict=return_dict,
            output_codes=output_codes,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
