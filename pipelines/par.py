"""`PARPipeline`: images in parallel groups of tokens (PAR, arXiv 2412.15119)."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from armm.decoding.parallel_groups import ParallelGroupsDecoding
from armm.model import AutoregressiveModel
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .llamagen import LlamaGenPipeline

__all__ = ["DiffusionPipeline", "PARPipeline"]


class PARPipeline(LlamaGenPipeline):
    """Class-conditional images with a PAR transformer.

    Called like `LlamaGenPipeline`; the differences: token k of every region of the image is drawn by one call of the
    transformer, `guidance_interval` counts tokens of that phase, and callbacks see all ids with -1 where none is drawn yet.

    Args:
        tokenizer (`VQTokenizer`): decodes token ids to pixels.
        transformer (`AutoregressiveModel`): with transition tokens.
        decoding (`ParallelGroupsDecoding`): the decoding strategy.
        text_encoder (`T5EncoderModel`, *optional*), text_tokenizer (`T5Tokenizer`, *optional*): for prompts; the published
            models are class-conditional and have none.
        generation_config (`dict`, *optional*): settings of this checkpoint.

    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("par-c2i-xl-4x")
        >>> image = pipe(class_labels="red fox").images[0]
        ```
    """

    single_file_loader: ClassVar[str | None] = "armm.convert.par"

    def __init__(
        self,
        tokenizer: VQTokenizer,
        transformer: AutoregressiveModel,
        decoding: ParallelGroupsDecoding,
        text_encoder: Any = None,
        text_tokenizer: Any = None,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__(tokenizer, transformer, decoding, text_encoder, text_tokenizer, generation_config)

    def grid_of(self, height: int | None, width: int | None) -> tuple[int, ...]:
        grid = super().grid_of(height, width)
        self.decoding.groups(grid)  # a clear error where the grid has no such regions
        return grid
