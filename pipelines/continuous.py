"""What the pipelines share that make pictures out of continuous tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import DiffusionPipeline

from armm.decoding.acceleration import Acceleration
from armm.decoding.annealing import StepAnnealing
from tokenizers_visual.base import VisualTokenizer

from .base import ARPipeline

__all__ = ["ContinuousPipeline", "DiffusionPipeline"]


class ContinuousPipeline(ARPipeline):
    """Base of pipelines over a continuous tokenizer. Subclasses name the classes of their components."""

    model_cpu_offload_seq = "transformer->tokenizer"
    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = (StepAnnealing,)

    def register_components(
        self, tokenizer: VisualTokenizer, transformer: Any, decoding: Any, generation_config: dict | None
    ) -> None:
        """Registers the components; a ValueError unless tokenizer and transformer belong together."""
        if tokenizer is not None and transformer is not None:
            width = transformer.latent_channels
            if tokenizer.is_discrete:
                raise ValueError(
                    f"`tokenizer` is a {type(tokenizer).__name__}, whose codes are discrete: this transformer makes latents of "
                    f"{width} channels; give the continuous tokenizer it was trained with (KL-16)."
                )
            if tokenizer.latent_channels != width:
                raise ValueError(
                    f"`tokenizer` has latents of {tokenizer.latent_channels} channels, the transformer makes {width}: they do not "
                    "belong together; give the tokenizer that the transformer was trained with (KL-16)."
                )
        self.register_modules(tokenizer=tokenizer, transformer=transformer, decoding=decoding)
        self.register_generation_config(generation_config)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of a picture in latents."""
        return self.transformer.grid

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        height, width = self.grid
        return (height * self.tokenizer.downsample, width * self.tokenizer.downsample)

    def annealing(self, given_steps: Any) -> StepAnnealing | None:
        """The step annealing that is enabled, unless the call itself says how many steps the head takes."""
        found = self.acceleration if given_steps is None else None
        return found if isinstance(found, StepAnnealing) else None
