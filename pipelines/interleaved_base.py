"""What the pipelines of the Chameleon family are made of: components, conversations as ids, one loop for text and images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline

from armm.decoding.acceleration import Acceleration
from armm.decoding.guidance import ContextGuidance
from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.sampling import Sampler
from armm.decoding.speculative import Speculative
from armm.decoding.vocabulary import Grammar, ImageBlock
from armm.model import AutoregressiveModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .arguments import text_list
from .base import ARPipeline
from .bpe import BPETokenizer
from .conversation import conversation, encode_text, picture
from .crops import on_white, to_pixels
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "InterleavedBase"]


class InterleavedBase(ARPipeline):
    """Base of the pipelines of one model that reads and writes text and images in one sequence.

    Args:
        tokenizer (`VQTokenizer`): images <-> codes.
        transformer (`AutoregressiveModel`): with `max_positions`, over one vocabulary of words and codes.
        decoding (`InterleavedDecoding`): the decoding strategy.
        text_tokenizer (`BPETokenizer`, *optional*): without it calls take ids instead of texts.
        image_block (`dict`): how images are written, see `armm.ImageBlock`.
        generation_config (`dict`, *optional*): settings of this checkpoint.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    _optional_components: ClassVar[list[str]] = ["text_tokenizer"]
    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = (Speculative,)
    start_id: ClassVar[int] = 0
    pad_id: ClassVar[int] = 1
    # Ids that end a text, and the one that ends a turn; names where the text tokenizer has other ids for them.
    stop_names: ClassVar[dict[str, int]] = {"<reserved08706>": 8710, "</s>": 2}
    turn_name: ClassVar[str] = "<reserved08706>"

    def __init__(
        self,
        tokenizer: VQTokenizer,
        transformer: AutoregressiveModel,
        decoding: InterleavedDecoding,
        text_tokenizer: BPETokenizer | None = None,
        image_block: dict[str, Any] | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not image_block:
            raise ValueError("`image_block` must say how images are written: it is kept in model_index.json.")
        self.block = ImageBlock.from_dict(image_block)
        if not transformer.max_positions:
            raise ValueError("`transformer` must have `max_positions`: it is no model of sequences of text and images.")
        if self.block.num_codes != tokenizer.codebook_size:
            raise ValueError(
                f"`image_block` has ids for {self.block.num_codes} codes, `tokenizer` has {tokenizer.codebook_size} codes: these "
                "components do not belong together."
            )
        Grammar(self.block, transformer.vocab_size)  # a ValueError where the block's ids are not in the vocabulary
        self.register_modules(
            tokenizer=tokenizer, transformer=transformer, decoding=decoding, text_tokenizer=text_tokenizer
        )
        self.register_to_config(image_block=self.block.to_dict())
        self.register_generation_config(generation_config)

    # ------------------------------------------------------------------ ids

    def special_id(self, name: str) -> int:
        """The id of a token of `stop_names`: the text tokenizer's, or the released vocabulary's."""
        found = None if self.text_tokenizer is None else self.text_tokenizer.id_of(name)
        return self.stop_names[name] if found is None else found

    @property
    def turn_id(self) -> int:
        """The id that ends a turn of a conversation."""
        return self.special_id(self.turn_name)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a generated text."""
        ids = [self.special_id(name) for name in self.stop_names]
        return [index for index in dict.fromkeys(ids) if index < self.transformer.vocab_size]

    def words(self) -> BPETokenizer:
        """The text tokenizer; a ValueError where there is none."""
        if self.text_tokenizer is None:
            raise ValueError(
                "this pipeline has no text tokenizer: pass `text_tokenizer=` (the authors' text_tokenizer.json) when loading, or ids "
                "instead of texts."
            )
        return self.text_tokenizer

    def encode_text(self, text: str, images: Sequence[list[int]] = ()) -> list[int]:
        """Ids of a text, `<|image|>` in it replaced by the blocks `images` in their order; images not mentioned come first."""
        return encode_text(self.words(), text, images)

    def encode_turns(self, turns: Any) -> list[int]:
        """The prompt of a conversation: the start id, then each turn, closed by the end of a turn."""
        ids = [self.start_id]
        for text, images in conversation(turns):
            ids += [*self.encode_text(text, [self.encode_image(image) for image in images]), self.turn_id]
        return ids

    # ------------------------------------------------------------------ images

    @property
    def unit(self) -> int:
        """The sides of images are multiples of so many pixels."""
        return self.block.cells * self.tokenizer.downsample

    @abstractmethod
    def prepare_image(self, image: PIL.Image.Image) -> PIL.Image.Image:
        """An RGB picture of a size that the model can read."""

    def encode_image(self, image: Any) -> list[int]:
        """The ids that stand for a PIL image, an array [H, W, 3] or a tensor [3, H, W] (uint8, or floats in [0, 1])."""
        weight = next(self.tokenizer.parameters())
        pixels = to_pixels(self.prepare_image(on_white(picture(image)))).to(self._execution_device, weight.dtype)
        codes = self.tokenizer.encode(pixels)
        return self.block.write(codes.ids[0].cpu(), codes.grid[1:] if codes.grid else (1, codes.num_tokens))

    def decode_image(self, codes: torch.Tensor, grid: tuple[int, int]) -> PIL.Image.Image:
        """The picture of the codes [h * w] of one image."""
        ids = codes[None].to(self._execution_device)
        return self.pixels_to_images(self.tokenizer.decode(Codes(ids=ids, grid=(1, *grid))), "pil")[0]

    def decode_contents(self, ids: Sequence[int]) -> list[str | PIL.Image.Image]:
        """Generated ids as texts and pictures in order, without what ends them."""
        stops = set(self.stop_ids)
        contents: list[str | PIL.Image.Image] = []
        for part in self.block.split([index for index in ids if index not in stops]):
            contents.append(self.decode_image(*part) if isinstance(part, tuple) else self.words().decode(part))
        return [part for part in contents if not isinstance(part, str) or part.strip()]

    # ------------------------------------------------------------------ the loop

    @abstractmethod
    def samplers(self, settings: Mapping[str, Any]) -> tuple[Sampler, Sampler]:
        """The samplers of text and of images for the settings of a call."""

    def guidance_of(self, settings: Mapping[str, Any]) -> ContextGuidance:
        """The guidance of images for the settings of a call."""
        return ContextGuidance(self._guidance_scale)

    def check_settings(self, **values: Any) -> dict[str, Any]:
        """The settings of a call: values that are None come from the checkpoint. Raises ValueError or TypeError."""
        settings = super().check_settings(**{**dict.fromkeys(self.generation_settings), **values})
        return settings

    def pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Prompts as ids [B, T] padded on the left, and their mask, None where all are equally long."""
        length = max(len(prompt) for prompt in prompts)
        device = self._execution_device
        rows = [[self.pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        ids = torch.tensor(rows, device=device)
        if all(len(prompt) == length for prompt in prompts):
            return ids, None
        real = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
        return ids, torch.arange(length, device=device) >= real[:, None]

    def check_room(self, ids: torch.Tensor) -> int:
        """How many tokens fit behind prompts [B, T]; a ValueError where none does."""
        room = self.transformer.max_positions - ids.shape[1]
        if room < 1:
            raise ValueError(
                f"a prompt of {ids.shape[1]} tokens is too long: the model has {self.transformer.max_positions} positions."
            )
        return room

    def continue_prompts(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Mapping[str, Any],
        max_tokens: int,
        *,
        images: bool = True,
        stop_ids: Sequence[int] = (),
        fill_id: int | None = None,
        grid: tuple[int, int] | None = None,
        generator: Any = None,
        noise: Any = None,
        callback: Callable[..., dict[str, Any]] | None = None,
        callback_names: Sequence[str] = ("latents",),
    ) -> Any:
        """A `SequenceOutput` behind `prompts`. images: whether new images may be begun. grid: of the one image that follows, where it is
        known: it may be drawn speculatively."""
        self.check_callback_inputs(callback_names)
        self.check_generator(generator, len(prompts))
        self._interrupt = False
        ids, mask = self.pad(prompts)
        text, image = self.samplers(settings)
        guidance = self.guidance_of(settings)
        max_tokens = min(max_tokens, self.check_room(ids))
        self._num_timesteps = max_tokens
        banned = [] if images else [self.block.begin, self.block.end]
        with self.progress_bar(total=max_tokens) as bar:
            common: dict[str, Any] = {
                "mask": mask,
                "grammar": Grammar(self.block, self.transformer.vocab_size, images=images, banned=banned),
                "guidance": guidance if images else None,
                "noise": generator if noise is None else noise,
                "callback": self.after_step(bar, guidance, callback, callback_names),
                "interrupt": lambda: self._interrupt,
            }
            if grid is not None and isinstance(self.acceleration, Speculative):
                strategy = self.acceleration.image_strategy(self)
                return strategy(self.transformer, ids, grid=grid, sampler=image, **common)
            return self.decoding(
                self.transformer,
                ids,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                fill_id=fill_id,
                sampler=text,
                image_sampler=image,
                **common,
            )

    def draw(
        self, prompts: Sequence[Sequence[int]], grid: tuple[int, int], settings: Mapping[str, Any], **options: Any
    ) -> Codes:
        """The codes of one image of `grid` (height, width) behind each prompt."""
        block, opening = self.block, self.block.opening(grid)
        height, width = grid
        line = width + (block.end_of_line is not None)
        steps = height * line - (line - width)  # what follows the last code is known
        first = int(block.code_ids[0])
        output = self.continue_prompts(
            [[*prompt, *opening] for prompt in prompts], settings, steps, fill_id=first, grid=grid, **options
        )
        ids = torch.full((len(prompts), height * line), first, device=output.ids.device)
        ids[:, : output.ids.shape[1]] = output.ids
        codes = block.to_codes(ids.view(-1, height, line)[..., :width].flatten(1))
        return Codes(ids=codes, grid=(1, height, width))

    def check_prompts(self, prompt: Any, prompt_ids: Any) -> list[list[int]] | list[str]:
        """The prompts of a call as a list of texts, or of lists of ids."""
        if (prompt is None) == (prompt_ids is None):
            raise ValueError("give either `prompt` or `prompt_ids`.")
        if prompt_ids is not None:
            rows = prompt_ids.tolist() if isinstance(prompt_ids, torch.Tensor) else prompt_ids
            rows = [rows] if rows and isinstance(rows[0], int) else rows
            if not rows or not all(row and all(isinstance(index, int) for index in row) for row in rows):
                raise TypeError(
                    "`prompt_ids` must be a non-empty list of ids, a list of such lists, or a tensor [B, T]."
                )
            return [list(row) for row in rows]
        return text_list(prompt, "prompt")

    def generate(
        self,
        rows: Sequence[Sequence[int]],
        grid: tuple[int, int],
        settings: Mapping[str, Any],
        *,
        num_images_per_prompt: int,
        output_type: str,
        return_dict: bool,
        output_codes: bool,
        **options: Any,
    ) -> ARPipelineOutput | tuple:
        """What a call that draws returns: images of `grid` behind prompts as ids.

        Args:
            settings: checked ones.
            options: of `draw`.
        """
        self._guidance_scale = settings["guidance_scale"]
        codes = self.draw([row for row in rows for _ in range(num_images_per_prompt)], grid, settings, **options)
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)
