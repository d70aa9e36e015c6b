"""`MARTextToImagePipeline`: a picture from a sentence by masked autoregression over continuous tokens (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.masked import MaskedLatentDecoding
from armm.masked_latent_model import MaskedLatentModel
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .captioned import CaptionedPipeline
from .masked_latents import MaskedLatentPipeline
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "MARTextToImagePipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.MARTextToImagePipeline.from_pretrained("runs/scenes-mar-64/export")
        >>> image = pipe("a small red sphere to the left of a large blue cube").images[0]
        >>> changed = pipe("a green cube", image=image, mask_image=mask).images[0]  # white is redrawn
        ```
"""


class MARTextToImagePipeline(CaptionedPipeline, MaskedLatentPipeline):
    """Draws and redraws images from text with a model trained by `armm train recipes/scenes-mar-64.yaml`.

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels, and images into latents for editing.
        transformer (`MaskedLatentModel`): with `vocab_size` words and `condition_tokens` slots for them.
        decoding (`MaskedLatentDecoding`): the decoding strategy.
        vocabulary (`list[str]`): special tokens and words, by their ids.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    request_name: ClassVar[str] = "prompt"

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: MaskedLatentModel,
        decoding: MaskedLatentDecoding,
        vocabulary: list[str] | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)
        self.register_vocabulary(vocabulary, transformer)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str],
        image: Any = None,
        mask_image: Any = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        num_inference_steps: int | None = None,
        head_steps: int | str | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        orders: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple:
        """Draws, or redraws part of an image.

        Args:
            prompt (`str` or `list[str]`): what to draw, in words of the model's vocabulary.
            image (*optional*): the image to edit: PIL, an array or tensor in [0, 1], or a list; one for all prompts or one for
                each. Cropped in the middle and resized to the model's size.
            mask_image (*optional*): white where the image is to be redrawn, in the same forms; a token is redrawn if any pixel of
                its cell is masked. All masks of a call must redraw equally many tokens.
            guidance_scale (`float`, *optional*): classifier-free guidance; 1 is off.
            guidance_schedule (`str`, *optional*): how guidance grows with the share of the tokens that are done: `"linear"`,
                `"constant"` or another one of `armm.decoding.guidance.SCHEDULES`.
            temperature (`float`, *optional*): of the noise in the steps of the head; less is less varied.
            num_inference_steps (`int`, *optional*): calls of the transformer, at most one for each token.
            head_steps (`int` or `str`, *optional*): denoising steps of the head in each of them, see `respaced_timesteps`.
                Overrides step annealing.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images of each prompt.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            latents (`torch.Tensor`, *optional*): latents [B, H * W, C] (or [1, ...]) to edit in place of `image`.
            noise (`torch.Tensor`, *optional*): recorded normal noise [B, 1 + head steps, N, C], see `PlacedNoise`; needs `orders`.
            orders (`torch.Tensor`, *optional*): int64 [B, N], the order of the positions; the last ones are drawn first.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (latents [B, H * W, C]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each call of
                the transformer; it may return replaced `latents`, set `pipe._guidance_scale`, or end the call with
                `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, 0 where none is drawn.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        count, condition_of, null_of = self.conditions(prompt, 1)
        return self.generate(
            count,
            lambda rows: condition_of().select(rows),
            lambda batch: null_of().select(torch.zeros(batch, dtype=torch.int64)),
            image=image,
            mask_image=mask_image,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            num_inference_steps=num_inference_steps,
            head_steps=head_steps,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            noise=noise,
            orders=orders,
            output_type=output_type,
            return_dict=return_dict,
            output_codes=output_codes,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
