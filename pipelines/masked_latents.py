"""What the pipelines share that make and edit pictures by masked autoregression over continuous tokens (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from armm.condition import Condition
from armm.decoding.guidance import SCHEDULES, Guidance
from tokenizers_visual.codes import Codes

from .arguments import common_count
from .continuous import ContinuousPipeline
from .loading import check_choice
from .outputs import ARPipelineOutput
from .unified import images_to_pixels
from .unified_inpaint import mask_to_cells

__all__ = ["DiffusionPipeline", "MaskedLatentPipeline"]


class MaskedLatentPipeline(ContinuousPipeline):
    """Base of pipelines over a `MaskedLatentModel`. Subclasses name the classes of their components, and what stands for a request."""

    request_name: ClassVar[str] = "class_labels"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 3.0,
        "guidance_schedule": "linear",
        "temperature": 1.0,
        "num_inference_steps": 64,
        "head_steps": 100,
    }

    def generate(
        self,
        requests: int,
        condition: Callable[[torch.Tensor], Condition],
        null_condition: Callable[[int], Condition],
        *,
        image: Any,
        mask_image: Any,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        noise: torch.Tensor | None,
        orders: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        output_codes: bool,
        callback_on_step_end: Callable[..., dict[str, Any]] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        **given: Any,
    ) -> ARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        """A call of the pipeline with so many requests; `given` are its settings.

        condition(rows): the condition of the requests with these numbers [B]. null_condition(batch): what stands for none.
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        settings = self.check_settings(**given)
        model = self.transformer
        known = self.known_latents(image, latents, mask_image)
        counts = {self.request_name: requests} | ({} if known is None else {"latents" if image is None else "image": len(known[0])})
        count = common_count(counts)
        rows = (torch.arange(count) % requests).repeat_interleave(num_images_per_prompt)
        batch, steps = len(rows), settings["num_inference_steps"]
        self.check_generator(generator, batch)
        known_tokens = known_mask = None
        if known is not None:
            known_tokens, known_mask = (
                part.expand(count, *part.shape[1:]).repeat_interleave(num_images_per_prompt, 0) for part in known
            )
            if given.get("num_inference_steps") is None:  # the checkpoint's number is for whole pictures
                steps = min(steps, int((~known_mask[0]).sum()))

        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        self._num_timesteps = steps
        guidance = Guidance(self._guidance_scale, schedule=settings["guidance_schedule"], progress="done")
        with self.progress_bar(total=steps) as bar:
            after_step = self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs)

            def after_tokens(step: int, tokens: torch.Tensor) -> torch.Tensor | None:
                replaced = after_step(step, model.unpatchify(tokens))
                return None if replaced is None else model.patchify(replaced)

            output = self.decoding(
                model,
                condition(rows),
                null_condition(batch) if guidance.active else None,
                num_inference_steps=steps,
                head_steps=settings["head_steps"],
                annealing=self.annealing(given.get("head_steps")),
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
        count = common_count({"latents" if image is None else "image": len(tokens), "mask_image": len(redraw)})
        return tokens.expand(count, -1, -1), ~redraw.expand(count, -1)

    def check_settings(self, **given: Any) -> dict[str, Any]:
        settings = super().check_settings(**given)
        check_choice(settings["guidance_schedule"], sorted(SCHEDULES), "`guidance_schedule`")
        self.decoding.solver.tables(settings["head_steps"])  # says what is wrong with it
        return settings
