"""`NextXTextToImagePipeline`: a picture from a sentence, entity by entity out of continuous tokens (next-X prediction, 2502.20388)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.next_x import NextXDecoding
from armm.next_x_model import NextXModel
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .captioned import CaptionedPipeline
from .flow import FlowPipeline
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "NextXTextToImagePipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.NextXTextToImagePipeline.from_pretrained("runs/scenes-next-x-cell-64/export")
        >>> image = pipe("a small red sphere to the left of a large blue cube", num_flow_steps=20).images[0]

        >>> pipe.transformer.config.entities  # what it was trained to predict; any of them may be chosen
        >>> pipe.decoding = armm.NextXDecoding.from_config(pipe.decoding.config, entity="subsample", size=2)
        ```
"""


class NextXTextToImagePipeline(CaptionedPipeline, FlowPipeline):
    """Draws images from text with a model trained by `armm train recipes/scenes-next-x-cell-64.yaml` (or another entity).

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels.
        transformer (`NextXModel`): with `vocab_size` words and `text_length` slots for them.
        decoding (`NextXDecoding`): the entity and the solver.
        vocabulary (`list[str]`): special tokens and words, by their ids.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    min_flow_steps: ClassVar[int] = 2

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: NextXModel,
        decoding: NextXDecoding,
        vocabulary: list[str] | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)
        self.register_vocabulary(vocabulary, transformer)

    @property
    def num_entities(self) -> int:
        """How many entities a picture is made of, one after the other."""
        return len(self.decoding.plan(self.grid).sizes)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str],
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        guidance_high: float | None = None,
        num_flow_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple:
        """Draws.

        Args:
            prompt (`str` or `list[str]`): what to draw, in words of the model's vocabulary.
            guidance_scale (`float`, *optional*): above 1, how strongly the prompt is followed; 1 turns guidance off.
            guidance_schedule (`str`, *optional*): how it changes over the entities, see `armm.Guidance`.
            guidance_high (`float`, *optional*): flow times above it are not guided; 1 guides all.
            num_flow_steps (`int`, *optional*): steps of the solver for each entity. Overrides step annealing.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images of each prompt, next to each other.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one for the call, or one for each image: then
                an image does not depend on its batch.
            noise (`list` of `torch.Tensor`, *optional*): recorded normal noise, see `NextXDecoding`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (latents [B, N, C]).
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARPipelineOutput` rather than a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each entity; a
                returned `"latents"` (the picture so far [B, N, C]) replaces this entity's.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): what the callback is given: `"latents"`.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images, and the codes if asked for.
        """
        return self.generate(
            prompt,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_high=guidance_high,
            num_flow_steps=num_flow_steps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            noise=noise,
            output_type=output_type,
            return_dict=return_dict,
            output_codes=output_codes,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
