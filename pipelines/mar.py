"""`MARPipeline`: class-conditional images by masked autoregression over continuous tokens (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.condition import Condition
from armm.decoding.masked import MaskedLatentDecoding
from armm.masked_latent_model import MaskedLatentModel
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .imagenet import class_indices
from .masked_latents import MaskedLatentPipeline
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "MARPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("mar-base-256")
        >>> images = pipe(class_labels=[207, "red fox"], num_inference_steps=64).images
        >>> mixed = pipe(class_labels=[{"red fox": 1, "arctic fox": 1}]).images

        >>> pipe.enable_acceleration(armm.StepAnnealing.preset("mar-base"))
        >>> changed = pipe(class_labels=207, image=images[0], mask_image=mask).images  # white is redrawn
        ```
"""


class MARPipeline(MaskedLatentPipeline):
    """Generation and editing with a MAR transformer.

    Args:
        tokenizer (`KLTokenizer`): turns latents into pixels, and images into latents for editing.
        transformer (`MaskedLatentModel`): sees the tokens there are and denoises others.
        decoding (`MaskedLatentDecoding`): the decoding strategy.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    single_file_loader = "armm.convert.mar"

    def __init__(
        self,
        tokenizer: KLTokenizer,
        transformer: MaskedLatentModel,
        decoding: MaskedLatentDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_components(tokenizer, transformer, decoding, generation_config)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: Any = None,
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
    ) -> ARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        r"""Generates images, or redraws part of them.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            class_labels (`int`, `str`, `dict` or `list`): classes by number or, for ImageNet models, by name; -1 is no class; a
                dict of classes and weights mixes them. May be left out when an image is edited, which then follows the image alone.
            image (*optional*): the image to edit: PIL, an array or tensor in [0, 1], or a list; one for all classes or one for
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
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
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
        weights = self.class_weights(class_labels, editing=mask_image is not None)
        return self.generate(
            len(weights),
            lambda rows: self.condition_of(weights[rows]),
            self.transformer.null_condition,
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

    # ------------------------------------------------------------------ pieces of a call

    def class_weights(self, class_labels: Any, editing: bool = False) -> torch.Tensor:
        """`class_labels` as weights of classes [B, classes + 1], the last of which is no class; each row adds up to 1."""
        classes = self.transformer.num_classes
        if class_labels is None:
            if not editing:
                raise ValueError("give `class_labels`; -1 draws without a class.")
            class_labels = -1
        if hasattr(class_labels, "tolist"):
            class_labels = class_labels.tolist()
        labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
        if not labels:
            raise ValueError("`class_labels` is empty: give at least one class.")
        weights = torch.zeros(len(labels), classes + 1)
        for row, label in zip(weights, labels, strict=True):
            parts = (
                label
                if isinstance(label, Mapping)
                else {label: 1.0}
                if isinstance(label, (int, str, np.integer))
                else None
            )
            if parts is None:
                class_indices(label, classes)  # says what is wrong with it
                raise TypeError(
                    f"`class_labels` must be class numbers, names, or dicts of them with weights, got {label!r}."
                )
            for part, weight in parts.items():
                self.check_number("weight of a class", weight, low=0.0)
                is_null = isinstance(part, (int, np.integer)) and not isinstance(part, bool) and part == -1
                row[classes if is_null else class_indices(part, classes)[0]] += weight
            if not row.sum() > 0:
                raise ValueError(f"the weights of a mixture in `class_labels` must not all be 0, got {label!r}.")
            row /= row.sum()
        return weights

    def condition_of(self, weights: torch.Tensor) -> Condition:
        """The condition on classes with these weights [B, classes + 1]."""
        device = self._execution_device
        if bool((weights.max(1).values == 1).all()):
            return self.transformer.condition(weights.argmax(1).to(device))
        return self.transformer.mixed_condition(weights.to(device))
