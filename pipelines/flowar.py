"""`FlowARPipeline`: class-conditional images by next-scale prediction with a flow head (FlowAR, arXiv 2412.15205)."""

from __future__ import annotations

from typing import ClassVar

from diffusers import DiffusionPipeline

from armm.decoding.next_scale_flow import NextScaleFlowDecoding
from armm.next_scale_flow_model import NextScaleFlowModel
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .class_flow import ClassFlowPipeline

__all__ = ["DiffusionPipeline", "FlowARPipeline"]


class FlowARPipeline(ClassFlowPipeline):
    """Generation with a FlowAR transformer, map by map, each twice as fine as the one before.

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels.
        transformer (`NextScaleFlowModel`): predicts features of the next map, and denoises it.
        decoding (`NextScaleFlowDecoding`): the decoding strategy with its solver.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.

    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("flowar-small-256")
        >>> images = pipe(class_labels=[207, "red fox"], guidance_scale=4.3).images

        >>> pipe = armm.FlowARPipeline.from_single_file("FlowAR-S.pth", tokenizer="kl16.ckpt")
        >>> pipe.enable_acceleration(armm.StepAnnealing.preset("flowar-small-256"))
        ```
    """

    single_file_loader = "armm.convert.flowar"
    min_flow_steps: ClassVar[int] = 2

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: NextScaleFlowModel,
        decoding: NextScaleFlowDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)

    @property
    def num_entities(self) -> int:
        """How many maps a picture is made of, one after the other."""
        return len(self.transformer.scales)
