"""`NARPipeline`: near-to-far generation of images and videos (NAR, arXiv 2503.10696)."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from armm.decoding.neighboring import NeighboringDecoding, check_neighboring
from armm.model import AutoregressiveModel
from tokenizers_visual.base import VisualTokenizer

from .llamagen import LlamaGenPipeline

__all__ = ["DiffusionPipeline", "NARPipeline"]


class NARPipeline(LlamaGenPipeline):
    """Class- or text-conditional images and class-conditional videos with a NAR transformer.

    Called like `LlamaGenPipeline`; the differences: all tokens of one Manhattan distance are drawn by one call of the
    transformer, `guidance_interval` counts tokens instead of calls, and callbacks see all ids with -1 where none is drawn yet.
    A video model returns `ARVideoOutput` with `frames`, and its size is its tokenizer's.

    Args:
        tokenizer (`VisualTokenizer`): `VQTokenizer` for images, `LARPTokenizer` for videos.
        transformer (`AutoregressiveModel`): with a neighboring head.
        decoding (`NeighboringDecoding`): the decoding strategy.
        text_encoder (`T5EncoderModel`, *optional*), text_tokenizer (`T5Tokenizer`, *optional*): for prompts.
        generation_config (`dict`, *optional*): settings of this checkpoint.

    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.NARPipeline.from_single_file("c2i_B.pt", tokenizer="vq_ds16_c2i.pt")
        >>> image = pipe(class_labels="red fox", guidance_scale=4.0).images[0]
        ```
    """

    single_file_loader: ClassVar[str | None] = "armm.convert.nar"

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        transformer: AutoregressiveModel,
        decoding: NeighboringDecoding,
        text_encoder: Any = None,
        text_tokenizer: Any = None,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__(tokenizer, transformer, decoding, text_encoder, text_tokenizer, generation_config)
        if transformer is not None:
            check_neighboring(transformer)
        if transformer is not None and tokenizer is not None and tokenizer.is_video != (len(transformer.grid) == 3):
            what = "videos" if tokenizer.is_video else "images"
            raise ValueError(
                f"`tokenizer` codes {what}, but `transformer` has a grid of {list(transformer.grid)}: these components do not "
                "belong together."
            )

    def grid_of(self, height: int | None, width: int | None) -> tuple[int, ...]:
        if not self.tokenizer.is_video:
            return super().grid_of(height, width)
        own = self.tokenizer.config.sample_size
        for name, value in (("height", height), ("width", width)):
            if value is not None and value != own:
                raise ValueError(
                    f"`{name}` must be {own} (or None), the size of this checkpoint's videos, got {value}."
                )
        return self.transformer.grid
