"""What the class-conditional pipelines share that make pictures out of continuous tokens by flow matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from .flow import FlowPipeline
from .outputs import ARPipelineOutput

__all__ = ["ClassFlowPipeline", "DiffusionPipeline"]


class ClassFlowPipeline(FlowPipeline):
    """Base of pipelines that draw classes, entity by entity (cells, maps)."""

    @torch.no_grad()
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
            num_flow_steps (`int`, *optional*, at least `min_flow_steps`): steps of the solver for each entity, each one call of what
                predicts velocities. Overrides step annealing.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            noise (`list` of `torch.Tensor`, *optional*): recorded normal noise in place of the generator's: for each entity its
                start [B, n, C], then, with solvers that draw ("euler_maruyama"), the noise of each step but the last.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (latents [B, N, C]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each entity;
                it may return replaced `latents`, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the picture so far.

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
