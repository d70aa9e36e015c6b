"""`LlamaGenPipeline`: raster next-token image generation from a class or a text (LlamaGen, arXiv 2406.06525)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.condition import Condition
from armm.decoding.acceleration import Acceleration
from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.decoding.speculative import Speculative
from armm.model import AutoregressiveModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .arguments import check_noise, grid_of_size, known_ids, text_list
from .imagenet import class_indices
from .outputs import ARPipelineOutput
from .t5 import T5PromptPipeline

__all__ = ["DiffusionPipeline", "LlamaGenPipeline"]

logger = logging.getLogger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("llamagen-c2i-b-256")
        >>> images = pipe(class_labels=[207, "red fox"], guidance_scale=4.0).images

        >>> pipe = armm.LlamaGenPipeline.from_single_file("c2i_B_256.pt", tokenizer="vq_ds16_c2i.pt")
        >>> pipe.save_pretrained("llamagen-b")
        ```
"""


class LlamaGenPipeline(T5PromptPipeline):
    """Class- or text-conditional generation with a LlamaGen transformer.

    Args:
        tokenizer (`VQTokenizer`): decodes token ids to pixels.
        transformer (`AutoregressiveModel`): with a class or a caption condition.
        decoding (`NextTokenDecoding`): the decoding strategy.
        text_encoder (`T5EncoderModel`, *optional*): for prompts; the published models use google/flan-t5-xl.
        text_tokenizer (`T5Tokenizer`, *optional*): belongs to the text encoder.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    model_cpu_offload_seq = "text_encoder->transformer->tokenizer"
    _optional_components: ClassVar[list[str]] = ["text_encoder", "text_tokenizer"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    single_file_loader: ClassVar[str | None] = "armm.convert.llamagen"
    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = (Speculative,)
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 4.0,
        "guidance_interval": -1,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "do_sample": True,
        "clean_prompt": True,
    }

    def __init__(
        self,
        tokenizer: VQTokenizer,
        transformer: AutoregressiveModel,
        decoding: NextTokenDecoding,
        text_encoder: Any = None,
        text_tokenizer: Any = None,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        if tokenizer is not None and transformer is not None and tokenizer.codebook_size > transformer.vocab_size:
            logger.warning(
                "the tokenizer has %d codes, the transformer only %d", tokenizer.codebook_size, transformer.vocab_size
            )
        self.register_modules(
            tokenizer=tokenizer,
            transformer=transformer,
            decoding=decoding,
            text_encoder=text_encoder,
            text_tokenizer=text_tokenizer,
        )
        self.register_generation_config(generation_config)

    # ------------------------------------------------------------------ the call

    def check_inputs(
        self,
        class_labels: Any,
        prompt: Any,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        num_images_per_prompt: int,
    ) -> None:
        """Raises ValueError or TypeError for requests that this checkpoint cannot answer."""
        given = [
            name
            for name, value in (("class_labels", class_labels), ("prompt", prompt), ("prompt_embeds", prompt_embeds))
            if value is not None
        ]
        wanted = ("class_labels",) if self.transformer.condition_type == "class" else ("prompt", "prompt_embeds")
        if len(given) != 1 or given[0] not in wanted:
            kind = "class" if wanted[0] == "class_labels" else "text"
            raise ValueError(
                f"this checkpoint is conditioned on a {kind}: give {' or '.join(f'`{name}`' for name in wanted)}, got "
                f"{', '.join(f'`{name}`' for name in given) or 'neither'}."
            )
        if prompt is not None:
            text_list(prompt, "prompt")
        if prompt_embeds is None and prompt_attention_mask is not None:
            raise ValueError("`prompt_attention_mask` belongs to `prompt_embeds`: give both or neither.")
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)

    def grid_of(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """The tokens of an image of `height` x `width` pixels, by default the checkpoint's own."""
        own = self.transformer.grid
        grid: tuple[int, ...] = grid_of_size(height, width, own, self.tokenizer.downsample)
        if grid != own:
            logger.warning("this checkpoint was trained on %dx%d tokens; %dx%d is out of its training", *own, *grid)
        return grid

    def class_indices(self, class_labels: Any) -> list[int]:
        """`class_labels` (numbers, ImageNet names, or a tensor) as checked class indices."""
        return class_indices(class_labels, self.transformer.condition_embedding.num_classes)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        clean_prompt: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        r"""Generates images.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            class_labels (`int`, `str` or `list`): classes by number or, for ImageNet models, by name. Text-conditional models
                take texts given here as the prompt, so that `pipe("a red fox")` works for both.
            prompt (`str` or `list[str]`): what to draw, for text-conditional models with a text encoder.
            height (`int`, *optional*), width (`int`, *optional*): in pixels, multiples of the tokenizer's downsampling;
                other sizes than the trained one work but were not trained.
            guidance_scale (`float`, *optional*): classifier-free guidance; up to 1 only the condition is run.
            guidance_interval (`int`, *optional*): last decode step that is guided, -1 for all.
            temperature (`float`, *optional*), top_k (`int`, *optional*, 0: off), top_p (`float`, *optional*, 1: off): the
                sampling filters, applied in this order.
            do_sample (`bool`, *optional*): False takes the most likely token.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class or prompt.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            latents (`torch.Tensor`, *optional*): token ids [B, N] to keep, -1 where tokens are to be generated.
            noise (`torch.Tensor`, *optional*): recorded exponential noise [B, N, vocabulary] that replaces the generator.
            prompt_embeds (`torch.Tensor`, *optional*), prompt_attention_mask (`torch.Tensor`, *optional*): text features
                [B, T, C] and their mask [B, T], see `encode_prompt`.
            clean_prompt (`bool`, *optional*): clean prompts as the authors do.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (token ids [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token;
                it may return replaced tensors, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the token ids so far
                [B, step + 1].

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        if prompt is None and self.transformer.condition_type == "caption" and _is_text(class_labels):
            class_labels, prompt = None, class_labels
        grid = self.grid_of(height, width)
        self.check_inputs(class_labels, prompt, prompt_embeds, prompt_attention_mask, num_images_per_prompt)
        settings = self.check_settings(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            do_sample=do_sample,
        )

        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        device = self._execution_device
        condition = self.encode_condition(
            class_labels, prompt, prompt_embeds, prompt_attention_mask, clean_prompt, device
        )
        condition = condition.repeat(num_images_per_prompt)
        self.check_generator(generator, condition.batch)
        known_ids, known_mask = self.known_tokens(latents, condition.batch, grid, device)
        self.check_noise(noise, condition.batch, grid)
        guidance = Guidance(self._guidance_scale, interval=settings["guidance_interval"])
        sampler = Sampler(**{name: settings[name] for name in ("temperature", "top_k", "top_p", "do_sample")})
        null_condition = self.transformer.null_condition(condition.batch, like=condition) if guidance.active else None
        self._num_timesteps = self.decoding.num_calls(grid)

        with self.progress_bar(total=self._num_timesteps) as bar:
            watch = self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs)
            output = self.strategy(
                self.transformer,
                condition,
                null_condition,
                grid,
                sampler=sampler,
                guidance=guidance,
                noise=generator if noise is None else noise,
                known_ids=known_ids,
                known_mask=known_mask,
                callback=watch,
                interrupt=lambda: self._interrupt,
            )
        codes = Codes(ids=output.ids, grid=grid if len(grid) == 3 else (1, *grid))  # type: ignore[arg-type]
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)

    def encode_condition(
        self,
        class_labels: Any,
        prompt: Any,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        clean_prompt: bool | None,
        device: torch.device,
    ) -> Condition:
        """The checked request as what the transformer is fed."""
        if class_labels is not None:
            return self.transformer.condition(labels=torch.tensor(self.class_indices(class_labels), device=device))
        features, mask = self.encode_prompt(prompt, prompt_embeds, prompt_attention_mask, device, clean_prompt)
        return self.transformer.condition(features=features, mask=mask)

    def known_tokens(
        self, latents: torch.Tensor | None, batch: int, grid: tuple[int, ...], device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The ids to keep and where: `latents` [B, N] (or [1, N]) with -1 at open places."""
        return known_ids(latents, batch, [math.prod(grid)], self.transformer.vocab_size, device)

    def check_noise(self, noise: torch.Tensor | None, batch: int, grid: tuple[int, ...]) -> None:
        """Raises ValueError unless recorded `noise` fits the call."""
        expected = (batch, math.prod(grid), self.transformer.vocab_size)
        check_noise(noise, expected, "batch, tokens, vocabulary")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, str) for item in value)
    )
