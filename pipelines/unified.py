"""What the pipelines of a unified text-and-image model share: components, prompts, images in, one directory for all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from armm.decoding.grouped import GroupedDecoding
from armm.decoding.guidance import Guidance
from armm.decoding.infilling import fill_image, hole_layout
from armm.decoding.likelihood import text_log_likelihood
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .base import ARPipeline
from .images import images_to_pixels
from .text import WordTokenizer

__all__ = ["DiffusionPipeline", "UnifiedPipeline", "images_to_pixels"]


class UnifiedPipeline(ARPipeline):
    """Base of the pipelines of one model that draws and reads; a directory saved by one of them loads in the others.

    Args:
        tokenizer (`VQTokenizer`): images <-> codes.
        transformer (`AutoregressiveModel`): over words and codes, with `text_slots` before and `answer_slots` after the image.
        decoding (`NextTokenDecoding` or `GroupedDecoding`): the decoding strategy that the transformer was trained for.
        vocabulary (`list[str]`): special tokens and words; their ids precede the codes.
        generation_config (`dict`, *optional*): settings of this checkpoint.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    interchangeable: ClassVar[tuple[str, ...]] = (
        "UnifiedTextToImagePipeline",
        "UnifiedImageToTextPipeline",
        "UnifiedInpaintPipeline",
    )
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 3.0,
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 1.0,
        "num_candidates": 1,
    }

    def __init__(
        self,
        tokenizer: VQTokenizer,
        transformer: AutoregressiveModel,
        decoding: NextTokenDecoding | GroupedDecoding,
        vocabulary: list[str] | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not vocabulary:
            raise ValueError("`vocabulary` must list the words of the model: it is kept in model_index.json.")
        self.register_modules(tokenizer=tokenizer, transformer=transformer, decoding=decoding)
        self.register_to_config(vocabulary=list(vocabulary))
        self.register_generation_config(generation_config)
        self.words = WordTokenizer(vocabulary)
        expected = len(self.words) + tokenizer.codebook_size
        if transformer.vocab_size != expected:
            raise ValueError(
                f"`transformer` has a vocabulary of {transformer.vocab_size}, but {len(self.words)} words and "
                f"{tokenizer.codebook_size} codes make {expected}: these components do not belong together."
            )
        if not transformer.text_slots or not transformer.answer_slots:
            raise ValueError("`transformer` must have `text_slots` and `answer_slots`: it is no unified model.")

    # ------------------------------------------------------------------ the model's sizes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the model draws and reads."""
        height, width = self.transformer.grid
        return height * self.tokenizer.downsample, width * self.tokenizer.downsample

    @property
    def code_range(self) -> tuple[int, int]:
        """(low, high) of the codes' ids in the shared vocabulary."""
        return len(self.words), len(self.words) + self.tokenizer.codebook_size

    def check_size(self, height: int | None, width: int | None) -> None:
        """Raises ValueError unless `height` and `width` are None or the model's own."""
        for name, value, own in zip(("height", "width"), (height, width), self.image_size, strict=True):
            if value is not None and value != own:
                raise ValueError(f"`{name}` must be {own} (or None), the size this model was trained at, got {value}.")

    # ------------------------------------------------------------------ prompts

    def check_prompt(self, prompt: Any) -> list[str]:
        """A prompt or a list of them as a list."""
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)):
            raise TypeError(f"`prompt` must be a string or a list of strings, got {type(prompt).__name__}.")
        if not prompts:
            raise ValueError("`prompt` is an empty list: give at least one prompt.")
        return list(prompts)

    def encode_prompt(self, prompt: str | Sequence[str], num_images_per_prompt: int = 1) -> torch.Tensor:
        """Prefix ids int64 [B * n, text_slots + 1] of prompts: words, padding, begin-of-image; copies next to each other."""
        slots = self.transformer.text_slots
        rows = []
        for text in self.check_prompt(prompt):
            ids = self.words.encode(text, "prompt", slots)
            rows.append(ids + [self.words.pad] * (slots - len(ids)) + [self.words.image])
        prefix = torch.tensor(rows, device=self._execution_device)
        return prefix.repeat_interleave(num_images_per_prompt, 0)

    def null_prefix(self, batch: int) -> torch.Tensor:
        """Prefix ids [B, text_slots + 1] that stand for no prompt."""
        ids = [self.words.null] + [self.words.pad] * (self.transformer.text_slots - 1) + [self.words.image]
        return torch.tensor([ids], device=self._execution_device).repeat(batch, 1)

    # ------------------------------------------------------------------ drawing

    def draw_codes(
        self,
        prefix: torch.Tensor,
        guidance_scale: float,
        sampler: Sampler,
        generator: torch.Generator | list[torch.Generator] | None,
        *,
        known_ids: torch.Tensor | None = None,
        known_mask: torch.Tensor | None = None,
        callback: Any = None,
        callback_names: Sequence[str] = ("latents",),
    ) -> Codes:
        """Codes of one image for each row of `prefix` [B, text_slots + 1]; see the decoding strategy for the rest."""
        self.check_callback_inputs(callback_names)
        model, grid = self.transformer, self.transformer.grid
        self._guidance_scale, self._interrupt = guidance_scale, False
        self._num_timesteps = self.decoding.num_calls(grid)
        guidance = Guidance(scale=guidance_scale)
        condition = model.prefix_condition(prefix)
        null = model.prefix_condition(self.null_prefix(len(prefix))) if guidance.active else None
        with self.progress_bar(total=self._num_timesteps) as bar:
            watch = self.after_step(bar, guidance, callback, callback_names)
            output = self.strategy(
                model,
                condition,
                null,
                grid,
                sampler=sampler,
                guidance=guidance,
                noise=generator,
                known_ids=known_ids,
                known_mask=known_mask,
                vocabulary=self.code_range,
                callback=watch,
                interrupt=lambda: self._interrupt,
            )
        return Codes(ids=output.ids, grid=(1, *grid))

    def best_candidates(self, prefix: torch.Tensor, ids: torch.Tensor, candidates: int) -> torch.Tensor:
        """Of every `candidates` neighboring rows the row about which the model would most likely say its prompt.

        prefix: ids [B, text_slots + 1] of the B images that are kept. ids: codes [B * candidates, N]. Returns row numbers [B].
        """
        words, model = self.words, self.transformer
        lengths = (prefix[:, :-1] != words.pad).sum(1)
        longest = int(lengths.max())
        if longest + 2 > model.answer_slots:
            raise ValueError(
                f"`num_candidates` must be 1 for a prompt of {longest} words: this model says texts of at most "
                f"{model.answer_slots - 2} words about a picture."
            )
        mark, pad = (prefix.new_full((len(prefix), 1), value) for value in (words.caption, words.pad))
        text = torch.cat([mark, prefix[:, :longest], pad], 1).scatter(1, lengths[:, None] + 1, words.end)
        scores = text_log_likelihood(
            model,
            self.null_prefix(len(ids)),
            ids + len(words),
            text.repeat_interleave(candidates, 0),
            pad_id=words.pad,
            vocabulary=(0, len(words)),
        )
        best = scores.view(-1, candidates).argmax(1)
        return torch.arange(len(prefix), device=best.device) * candidates + best

    def fill_codes(
        self,
        prefix: torch.Tensor,
        guidance_scale: float,
        sampler: Sampler,
        generator: torch.Generator | list[torch.Generator] | None,
        known: torch.Tensor,
        cells: torch.Tensor,
        *,
        callback: Any = None,
        callback_names: Sequence[str] = ("latents",),
    ) -> Codes:
        """The codes `known` [B, N] with those in the masked `cells` [B, N] drawn anew by infilling, see `fill_image`."""
        self.check_callback_inputs(callback_names)
        model, grid = self.transformer, self.transformer.grid
        self._guidance_scale, self._interrupt = guidance_scale, False
        guidance = Guidance(scale=guidance_scale)
        condition = model.prefix_condition(prefix)
        null = model.prefix_condition(self.null_prefix(len(prefix))) if guidance.active else None
        self._num_timesteps = hole_layout(cells, len(self.words.holes)).num_calls
        with self.progress_bar(total=self._num_timesteps) as bar:
            watch = self.after_step(bar, guidance, callback, callback_names)
            output = fill_image(
                model,
                condition,
                known,
                cells,
                null,
                sentinel_ids=self.words.holes,
                pad_id=self.words.pad,
                vocabulary=self.code_range,
                sampler=sampler,
                guidance=guidance,
                noise=generator,
                callback=watch,
                interrupt=lambda: self._interrupt,
            )
        return Codes(ids=output.ids, grid=(1, *grid))

    # ------------------------------------------------------------------ reading

    def encode_image(self, image: Any, name: str = "image") -> torch.Tensor:
        """Code ids int64 [B, N] of images in any of the accepted forms (see `images_to_pixels`)."""
        weight = next(self.tokenizer.parameters())
        pixels = images_to_pixels(image, self.image_size, name).to(device=self._execution_device, dtype=weight.dtype)
        # One image at a time: an image's codes do not depend on what it is batched with, bit for bit.
        return torch.cat([self.tokenizer.encode(row[None]).ids for row in pixels])


def candidate_generators(
    generator: torch.Generator | list[torch.Generator] | None, images: int, candidates: int
) -> torch.Generator | list[torch.Generator] | None:
    """A generator for every candidate of every image, seeded from those given: so an image does not depend on its batch."""
    if candidates == 1 or generator is None:
        return generator
    if isinstance(generator, torch.Generator):
        seeds = torch.randint(2**62, (images * candidates,), generator=generator, device=generator.device).tolist()
        return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
    return [child for one in generator for child in candidate_generators(one, 1, candidates) or ()]
