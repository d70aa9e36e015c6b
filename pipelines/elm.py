"""`ELMPipeline`: images from a class as binary codes, token by token or by unmasking (ELM, arXiv 2410.16257)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.guidance import Guidance
from armm.decoding.masked_tokens import MaskedTokenDecoding
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
from tokenizers_visual.binary_tokenizer import BinaryTokenizer
from tokenizers_visual.codes import Codes

from . import loading
from .arguments import check_noise, grid_of_size, known_ids
from .base import ARPipeline
from .imagenet import class_indices
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "ELMPipeline"]

logger = logging.getLogger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("elm-l-2-10")
        >>> images = pipe(class_labels=[207, "red fox"], guidance_scale=4.0, guidance_schedule="linear").images

        >>> pipe = armm.ELMPipeline.from_single_file("L-2-10.pth", tokenizer="bae_20/binaryae_ema.th")
        >>> pipe.save_pretrained("elm-l-2-10")
        ```
"""

# The authors' schedules of the guidance: name -> what it is to `Guidance`. Each kind of decoding has its own.
AUTOREGRESSIVE_SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear", "progress": "done"},
    "cos": {"schedule": "sine", "progress": "done"},
    "log": {"schedule": "log", "progress": "done"},
    "square": {"schedule": "linear", "progress": "done", "power": 2.0},
    "square_root": {"schedule": "linear", "progress": "begun", "power": 0.5},
}
MASKED_SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear", "progress": "done"},
    "powercos": {"schedule": "cosine", "progress": "done"},
}


class ELMPipeline(ARPipeline):
    """Class-conditional generation with an ELM transformer.

    Args:
        tokenizer (`BinaryTokenizer`): decodes ids to pixels.
        transformer (`AutoregressiveModel`): with a class condition and the tokenizer's sub-codes; causal, or masked.
        decoding (`NextTokenDecoding` or `MaskedTokenDecoding`): the decoding strategy.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    single_file_loader = "armm.convert.elm"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 4.0,
        "guidance_schedule": "linear",
        "guidance_power": 1.0,
        "temperature": 1.0,
        "top_k": 0,
        "do_sample": True,
        "num_inference_steps": 10,
    }

    def __init__(
        self,
        tokenizer: BinaryTokenizer,
        transformer: AutoregressiveModel,
        decoding: NextTokenDecoding | MaskedTokenDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        if tokenizer is not None and transformer is not None:
            ours = (transformer.sub_codes, transformer.vocab_size)
            theirs = (tokenizer.sub_codes, tokenizer.codebook_size)
            if ours != theirs:
                raise ValueError(
                    f"`transformer` predicts {ours[0]} sub-codes of {ours[1]} values, `tokenizer` has {theirs[0]} of {theirs[1]}: "
                    "load the tokenizer that belongs to the transformer."
                )
        self.register_modules(tokenizer=tokenizer, transformer=transformer, decoding=decoding)
        self.register_generation_config(generation_config)

    @property
    def is_masked(self) -> bool:
        """Whether the images come from unmasking instead of token by token."""
        return isinstance(self.decoding, MaskedTokenDecoding)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        do_sample: bool | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
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
            height (`int`, *optional*), width (`int`, *optional*): in pixels, multiples of the tokenizer's downsampling;
                other sizes than the trained one work but were not trained.
            guidance_scale (`float`, *optional*): classifier-free guidance; up to 1 only the condition is run.
            guidance_schedule (`str`, *optional*): how the guidance grows from 1 to its scale: `"constant"`, `"linear"`, `"cos"`,
                `"log"`, `"square"` or `"square_root"` token by token; `"constant"`, `"linear"` or `"powercos"` by unmasking.
            guidance_power (`float`, *optional*): of the progress, for `"powercos"`.
            temperature (`float`, *optional*): of the draws; by unmasking, of the noise on the confidence.
            top_k (`int`, *optional*, 0: off): the draws are from the so many most likely values of each sub-code.
            do_sample (`bool`, *optional*): False takes the most likely token.
            num_inference_steps (`int`, *optional*): steps of unmasking; masked models only.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            latents (`torch.Tensor`, *optional*): ids [B, N], or [B, N, sub-codes], to keep, -1 where they are to be generated. What is
                known at the beginning of all images is fed at once, and the guidance's schedule counts from its end.
            noise (`torch.Tensor`, *optional*): recorded exponential noise that replaces the generator: [B, N, vocabulary] or
                [B, N, sub-codes, vocabulary] token by token; see `MaskedTokenDecoding` for unmasking.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (the ids).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each step;
                it may return replaced tensors, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the ids so far; by
                unmasking all of them, -1 where they are open.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        grid = self.check_size(height, width)
        if num_inference_steps is not None and not self.is_masked:
            raise ValueError("`num_inference_steps` is for masked models; this one takes one step for each token.")
        settings = self.check_settings(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            temperature=temperature,
            top_k=top_k,
            do_sample=do_sample,
            num_inference_steps=num_inference_steps,
        )
        device = self._execution_device
        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        labels = class_indices(class_labels, self.transformer.condition_embedding.num_classes)
        condition = self.transformer.condition(labels=torch.tensor(labels, device=device))
        condition = condition.repeat(num_images_per_prompt)
        self.check_generator(generator, condition.batch)
        known_ids, known_mask = self.known_tokens(latents, condition.batch, grid, device)
        guidance = self.guidance(settings)
        options = self.decoding_options(settings, known_mask, grid)
        self.check_noise(noise, condition.batch, grid)

        with self.progress_bar(total=self._num_timesteps) as bar:
            watch = self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs)
            output = self.decoding(
                self.transformer,
                condition,
                self.transformer.null_condition(condition.batch) if guidance.active else None,
                grid,
                guidance=guidance,
                noise=generator if noise is None else noise,
                known_ids=known_ids,
                known_mask=known_mask,
                callback=watch,
                interrupt=lambda: self._interrupt,
                **options,
            )
        codes = Codes(ids=output.ids, grid=(1, *grid))
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)

    @torch.no_grad()
    def extend(
        self,
        codes: Codes,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        direction: str = "right",
        overlap: int | None = None,
        output_type: str = "pil",
        **arguments: Any,
    ) -> ARPipelineOutput:
        """Images that go on where those of `codes` end, joined to them.

        The last columns (or rows) of an image are the first ones of the next, whose rest is generated; in the pixels the
        two are faded into each other along what they share. Positions count from 0 again (ELM, appendix).

        Args:
            codes (`Codes`): of the images, as `output_codes=True` returns them; they may have been extended before.
            class_labels (`int`, `str` or `list`): as for a call.
            direction (`str`, *optional*, defaults to `"right"`): `"right"` or `"down"`.
            overlap (`int`, *optional*): how many columns or rows of tokens are shared; default half of the transformer's grid.
            output_type (`str`, *optional*, defaults to `"pil"`): as for a call.
            arguments: further arguments of a call.

        Returns:
            [`ARPipelineOutput`]: the longer images and their codes; of what is shared the codes are those given.
        """
        self.check_output_type(output_type)
        loading.check_choice(direction, ["down", "right"], "`direction`")
        axis = 2 if direction == "right" else 1
        rows, columns = self.transformer.grid
        length, across = (columns, rows) if axis == 2 else (rows, columns)
        overlap = length // 2 if overlap is None else overlap
        self.check_number("overlap", overlap, low=1, high=length - 1, integer=True)
        if codes.ids is None or codes.grid is None or codes.grid[3 - axis] != across or codes.grid[axis] < overlap:
            raise ValueError(
                f"`codes` must be ids that are {across} tokens wide across '{direction}', got grid {codes.grid}."
            )
        given = codes.ids.unflatten(1, codes.grid[1:])  # [B, h, w, ...]
        latents = given.new_full((len(given), rows, columns, *given.shape[3:]), -1)
        latents.narrow(axis, 0, overlap).copy_(given.narrow(axis, codes.grid[axis] - overlap, overlap))
        result = self(class_labels, latents=latents.flatten(1, 2), output_type="latent", output_codes=True, **arguments)
        added = result.codes.ids.unflatten(1, (rows, columns)).narrow(axis, overlap, length - overlap)
        joined = torch.cat([given, added], dim=axis)
        longer = Codes(ids=joined.flatten(1, 2), grid=(1, *joined.shape[1:3]))
        if output_type == "latent":
            return ARPipelineOutput(images=longer.ids, codes=longer)
        first, second = self.tokenizer.decode(codes), self.tokenizer.decode(result.codes)
        pixels = crossfade(first, second, overlap * self.tokenizer.downsample, axis + 1)
        return ARPipelineOutput(images=self.pixels_to_images(pixels, output_type), codes=longer)

    # ------------------------------------------------------------------ pieces of the call

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The grid of an image of `height` x `width` pixels; a ValueError unless tokens tile it."""
        own = self.transformer.grid
        grid = grid_of_size(height, width, own, self.tokenizer.downsample)
        if grid != own:
            logger.warning("this checkpoint was trained on %dx%d tokens; %dx%d is out of its training", *own, *grid)
        return grid

    def check_settings(self, **given: Any) -> dict[str, Any]:
        settings = super().check_settings(**given)
        schedules = MASKED_SCHEDULES if self.is_masked else AUTOREGRESSIVE_SCHEDULES
        loading.check_choice(settings["guidance_schedule"], sorted(schedules), "`guidance_schedule`")
        return settings

    def guidance(self, settings: dict[str, Any]) -> Guidance:
        """The guidance that checked settings ask for."""
        name, power = settings["guidance_schedule"], settings["guidance_power"]
        options = dict((MASKED_SCHEDULES if self.is_masked else AUTOREGRESSIVE_SCHEDULES)[name])
        if name == "powercos":
            options["power"] = power
        elif power != 1.0:
            raise ValueError(f"`guidance_power` is for the schedule 'powercos', got {power} with {name!r}.")
        return Guidance(settings["guidance_scale"], **options)

    def decoding_options(
        self, settings: dict[str, Any], known_mask: torch.Tensor | None, grid: tuple[int, int]
    ) -> dict[str, Any]:
        """What the two kinds of decoding take differently; sets the number of timesteps."""
        filters = {"top_k": settings["top_k"], "do_sample": settings["do_sample"]}
        if self.is_masked:
            steps = self._num_timesteps = settings["num_inference_steps"]
            heat = settings["temperature"]
            return {"sampler": Sampler(**filters), "num_inference_steps": steps, "confidence_temperature": heat}
        tokens = self.decoding.num_calls(grid)
        prefix = 0
        if known_mask is not None:
            prefix = min(int(known_mask.all(0).long().cumprod(0).sum()), tokens - 1)
        self._num_timesteps = tokens - prefix
        return {"sampler": Sampler(settings["temperature"], **filters), "prefix": prefix}

    def known_tokens(
        self, latents: torch.Tensor | None, batch: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The ids to keep and where [B, N]: `latents` (for one image or for all) with -1 at open places."""
        shape = (grid[0] * grid[1], *self.transformer.code_shape)
        ids, known = known_ids(latents, batch, shape, self.transformer.vocab_size, device)
        if ids is None or known is None:
            return None, None
        known = known.view(batch, shape[0], -1)
        if bool((known.any(-1) != known.all(-1)).any()):
            raise ValueError("`latents` must give all sub-codes of a position or none of them.")
        return ids, known.all(-1)

    def check_noise(self, noise: torch.Tensor | None, batch: int, grid: tuple[int, int]) -> None:
        """Raises ValueError unless recorded `noise` fits the call."""
        tokens, codes = grid[0] * grid[1], self.transformer.vocab_size
        if self.is_masked:
            values = tokens * self.transformer.sub_codes * (codes + 1)
            check_noise(noise, (batch, self._num_timesteps, values), "batch, steps, values")
        else:
            check_noise(
                noise, (batch, tokens, *self.transformer.code_shape, codes), "batch, tokens, (sub-codes,) vocabulary"
            )


def crossfade(first: torch.Tensor, second: torch.Tensor, overlap: int, dim: int) -> torch.Tensor:
    """`first` followed by `second` along `dim`, the last `overlap` of one fading linearly into the first of the other."""
    shape = [1] * first.dim()
    shape[dim] = overlap
    weight = ((torch.arange(overlap, device=first.device) + 0.5) / overlap).to(first.dtype).view(shape)
    start, end = first.shape[dim] - overlap, second.shape[dim] - overlap
    shared = torch.lerp(first.narrow(dim, start, overlap), second.narrow(dim, 0, overlap), weight)
    return torch.cat([first.narrow(dim, 0, start), shared, second.narrow(dim, overlap, end)], dim=dim)
