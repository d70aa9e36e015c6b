"""`XARPipeline`: class-conditional images by next-X prediction with flow matching (xAR, arXiv 2502.20388)."""

from __future__ import annotations

from typing import ClassVar

from diffusers import DiffusionPipeline

from armm.decoding.next_x import NextXDecoding
from armm.next_x_model import NextXModel
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .class_flow import ClassFlowPipeline

__all__ = ["DiffusionPipeline", "XARPipeline"]


class XARPipeline(ClassFlowPipeline):
    """Generation with an xAR transformer, cell by cell (or whichever entity `decoding` names).

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels.
        transformer (`NextXModel`): predicts the velocities of noisy entities.
        decoding (`NextXDecoding`): the entity and the solver.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.

    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("xar-base-256")
        >>> images = pipe(class_labels=[207, "red fox"], guidance_scale=2.7, num_flow_steps=40).images

        >>> pipe = armm.XARPipeline.from_single_file("xAR-B.pth", tokenizer="kl16.ckpt")
        >>> pipe.enable_acceleration(armm.StepAnnealing.preset("xar-base-256"))
        >>> pipe.decoding = armm.NextXDecoding("cell", 8, solver="euler")  # the deterministic sampler
        ```
    """

    single_file_loader = "armm.convert.xar"
    min_flow_steps: ClassVar[int] = 3

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: NextXModel,
        decoding: NextXDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)

    @property
    def num_entities(self) -> int:
        """How many entities a picture is made of, one after the other."""
        return len(self.decoding.plan(self.grid).sizes)
