"""What the pipelines share that make pictures out of continuous tokens by flow matching."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from armm.decoding.annealing import solver_steps
from armm.decoding.guidance import SCHEDULES, Guidance
from tokenizers_visual.codes import Codes

from . import loading
from .continuous import ContinuousPipeline
from .imagenet import class_indices
from .outputs import ARPipelineOutput

__all__ = ["FlowPipeline", "DiffusionPipeline"]


class FlowPipeline(ContinuousPipeline):
    """Base of pipelines that draw by flow matching. Subclasses name the classes of their components, and what stands for a request.

    Class attributes:
        min_flow_steps: the smallest number of steps of the solver.
    """

    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 2.0,
        "guidance_schedule": "linear",
        "guidance_high": 1.0,
        "num_flow_steps": 50,
    }
    min_flow_steps: ClassVar[int] = 1

    @property
    @abstractmethod
    def num_entities(self) -> int:
        """How many entities a picture is made of, one after the other."""

    def conditions(self, request: Any, num_images_per_prompt: int) -> tuple[int, Callable[[], Any], Callable[[], Any]]:
        """The number of images of a request, and what makes its condition and what stands for none; here of class labels."""
        model, device = self.transformer, self._execution_device
        labels = [label for label in class_indices(request, model.num_classes) for _ in range(num_images_per_prompt)]
        batch = len(labels)
        return batch, lambda: model.condition(torch.tensor(labels, device=device)), lambda: model.null_condition(batch)

    def generate(
        self,
        request: Any,
        *,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        noise: Sequence[torch.Tensor] | None,
        output_type: str,
        return_dict: bool,
        output_codes: bool,
        callback_on_step_end: Callable[..., dict[str, Any]] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        **given: Any,
    ) -> ARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        """A call of the pipeline; `given` are its settings."""
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        settings = self.check_settings(**given)
        batch, condition, null_condition = self.conditions(request, num_images_per_prompt)
        self.check_generator(generator, batch)

        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        num_steps = settings["num_flow_steps"]
        annealing = self.annealing(None if given.get("num_flow_steps") is None else num_steps)
        steps = solver_steps(self.num_entities, num_steps, annealing)
        self._num_timesteps = len(steps)
        if min(steps) < self.min_flow_steps:
            raise ValueError(
                f"`num_flow_steps` must be at least {self.min_flow_steps} for {type(self).__name__}, got {min(steps)}"
                + (f" from {annealing}." if annealing is not None else ".")
            )
        guidance = Guidance(
            self._guidance_scale, schedule=settings["guidance_schedule"], high=settings["guidance_high"]
        )
        with self.progress_bar(total=self._num_timesteps) as bar:
            output = self.decoding(
                self.transformer,
                condition(),
                null_condition() if guidance.active else None,
                num_steps=num_steps,
                annealing=annealing,
                guidance=guidance,
                noise=generator if noise is None else noise,
                callback=self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs),
                interrupt=lambda: self._interrupt,
            )
        codes = Codes(latents=output.latents, grid=(1, *self.grid))
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)

    def check_settings(self, **given: Any) -> dict[str, Any]:
        settings = super().check_settings(**given)
        loading.check_choice(settings["guidance_schedule"], sorted(SCHEDULES), "`guidance_schedule`")
        self.check_number("num_flow_steps", settings["num_flow_steps"], low=self.min_flow_steps, integer=True)
        return settings
