"""`VARPipeline`: class-conditional images by next-scale prediction (VAR, arXiv 2404.02905)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.guidance import Guidance
from armm.decoding.next_scale import NextScaleDecoding, scale_masks
from armm.decoding.sampling import Sampler
from armm.next_scale_model import NextScaleModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.multi_scale import MultiScaleQuantizer
from tokenizers_visual.multi_scale_tokenizer import MultiScaleVQTokenizer

from .arguments import check_noise, common_count, known_ids
from .base import ARPipeline
from .imagenet import class_indices
from .outputs import ARPipelineOutput
from .unified import images_to_pixels
from .unified_inpaint import mask_to_cells

__all__ = ["DiffusionPipeline", "VARPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("var-d16-256")
        >>> images = pipe(class_labels=[207, "red fox"], guidance_scale=4.0).images

        >>> pipe = armm.VARPipeline.from_single_file("var_d16.pth", tokenizer="vae_ch160v4096z32.pth")
        >>> changed = pipe(class_labels=207, image=images[0], mask_image=mask).images  # white is redrawn
        ```
"""


class VARPipeline(ARPipeline):
    """Generation and editing with a VAR transformer.

    Args:
        tokenizer (`MultiScaleVQTokenizer`): turns token maps into pixels, and images into token maps for editing.
        transformer (`NextScaleModel`): predicts the token maps.
        decoding (`NextScaleDecoding`): the decoding strategy.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    model_cpu_offload_seq = "transformer->tokenizer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "features"]
    single_file_loader = "armm.convert.var"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 4.0,
        "temperature": 1.0,
        "top_k": 900,
        "top_p": 0.95,
        "do_sample": True,
        "more_smooth": False,
    }

    def __init__(
        self,
        tokenizer: MultiScaleVQTokenizer,
        transformer: NextScaleModel,
        decoding: NextScaleDecoding,
        generation_config: dict | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, transformer=transformer, decoding=decoding)
        self.register_generation_config(generation_config)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the images in pixels."""
        side = self.transformer.scales[-1] * self.tokenizer.downsample
        return (side, side)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        image: Any = None,
        mask_image: Any = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool | None = None,
        more_smooth: bool | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        r"""Generates images, or redraws part of them.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            class_labels (`int`, `str` or `list`): classes by number or, for ImageNet models, by name; -1 is no class. May be
                left out when an image is edited: in- and outpainting then follow the image alone.
            image (*optional*): the image to edit: PIL, an array or tensor in [0, 1], or a list; one for all classes or one
                for each. Cropped in the middle and resized to the model's size.
            mask_image (*optional*): white where `image` is to be redrawn, in the same forms; a token is redrawn if any
                pixel of its cell on the finest map is masked.
            guidance_scale (`float`, *optional*): classifier-free guidance in the authors' measure: at scale number k of K the
                logits are (1 + t) conditional - t unconditional with t = guidance_scale * (k - 1) / (K - 1); 0 is off.
            temperature (`float`, *optional*), top_k (`int`, *optional*, 0: off), top_p (`float`, *optional*, 1: off): the
                sampling filters, applied in this order.
            do_sample (`bool`, *optional*): False takes the most likely token.
            more_smooth (`bool`, *optional*): add averages of code vectors to the image instead of single ones (Gumbel
                softmax); for pictures only, it spoils measured quality.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            latents (`torch.Tensor`, *optional*): token ids [B, L] of all scales to keep, -1 where tokens are to be generated.
            noise (`torch.Tensor`, *optional*): recorded exponential noise [B, L, vocabulary] that replaces the generator.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (token ids [B, L]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each scale;
                it may return replaced `latents`, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the token ids so far,
                and `"features"` [B, C, h, w], which `pipe.tokenizer.decode_features` turns into a preview.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        settings = self.check_settings(
            guidance_scale=guidance_scale,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            do_sample=do_sample,
            more_smooth=more_smooth,
        )
        device = self._execution_device
        labels = self.class_indices(class_labels, editing=image is not None or mask_image is not None)
        kept = None if image is None and mask_image is None else self.kept_tokens(image, mask_image)
        if kept is not None:
            if latents is not None:
                raise ValueError("give either `image` and `mask_image`, or `latents`, not both.")
            count = common_count({"class_labels": len(labels), "image": len(kept)})
            labels = labels * count if len(labels) < count else labels
            latents = kept.expand(count, -1).repeat_interleave(num_images_per_prompt, 0)
        labels = [label for label in labels for _ in range(num_images_per_prompt)]
        batch = len(labels)
        self.check_generator(generator, batch)
        tokens, codes = self.transformer.num_tokens, self.transformer.vocab_size
        known, known_mask = known_ids(latents, batch, [tokens], codes, device)
        check_noise(noise, (batch, tokens, codes), "batch, tokens, vocabulary")

        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        scales = self.transformer.scales
        self._num_timesteps = self.decoding.num_calls(scales)
        # The authors' t grows from 0 to their scale, the shared guidance from 1 to its own: scale 1 + t.
        guidance = Guidance(1.0 + self._guidance_scale, schedule="linear")
        filters = {name: settings[name] for name in ("temperature", "top_k", "top_p", "do_sample")}
        condition = self.transformer.condition(torch.tensor(labels, device=device))
        null_condition = self.transformer.null_condition(batch) if guidance.active else None

        with self.progress_bar(total=self._num_timesteps) as bar:

            def after_scale(step: int, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                if callback_on_step_end is None:
                    return None
                tensors = {"latents": ids, "features": features}
                replaced = self.step_end(callback_on_step_end, callback_on_step_end_tensor_inputs, step, tensors)
                guidance.scale = 1.0 + self._guidance_scale
                return replaced.get("latents")

            output = self.decoding(
                self.transformer,
                self.quantizer_on(device),
                condition,
                null_condition,
                sampler=Sampler(**filters, top_p_from_tail=True),
                guidance=guidance,
                noise=generator if noise is None else noise,
                smooth=settings["more_smooth"],
                known_ids=known,
                known_mask=known_mask,
                callback=after_scale,
                interrupt=lambda: self._interrupt,
            )
        drawn = Codes(ids=output.ids, scales=scales)
        if output_type == "latent":
            images = output.ids
        else:
            images = self.pixels_to_images(self.tokenizer.decode_features(output.features), output_type)
        return self.wrap_output(images, drawn, return_dict=return_dict, output_codes=output_codes)

    # ------------------------------------------------------------------ pieces of a call

    def class_indices(self, class_labels: Any, editing: bool = False) -> list[int]:
        """`class_labels` as checked class indices; the index after the last class is no class."""
        classes = self.transformer.num_classes
        if class_labels is None:
            if editing:
                return [classes]
            raise ValueError("give `class_labels`; -1 draws without a class.")
        if hasattr(class_labels, "tolist"):
            class_labels = class_labels.tolist()
        labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
        if not labels:
            raise ValueError("`class_labels` is empty: give at least one class.")
        return [classes if _is_null(label) else class_indices(label, classes)[0] for label in labels]

    def kept_tokens(self, image: Any, mask_image: Any) -> torch.Tensor:
        """Token ids [B, L] of `image`, -1 where `mask_image` asks for new ones."""
        if image is None or mask_image is None:
            raise ValueError("editing takes both `image` and `mask_image`: the image, and white where it is redrawn.")
        pixels = images_to_pixels(image, self.image_size)
        redraw = mask_to_cells(mask_image, self.image_size, self.tokenizer.downsample)
        count = common_count({"image": len(pixels), "mask_image": len(redraw)})
        weight = next(self.tokenizer.parameters())
        pixels = pixels.to(device=self._execution_device, dtype=weight.dtype)
        scales = self.transformer.scales
        # One image at a time: an image's codes do not depend on what it is batched with, bit for bit.
        ids = torch.cat([self.tokenizer.encode(row[None], scales=scales).ids for row in pixels])
        keep = scale_masks(~redraw, scales).to(ids.device)
        return torch.where(keep, ids.expand(count, -1), -1)

    def check_settings(self, **given: Any) -> dict[str, Any]:
        settings = super().check_settings(**given)
        if settings["more_smooth"] and not settings["do_sample"]:
            raise ValueError("`more_smooth` averages over noise, so it needs `do_sample=True`.")
        return settings

    def quantizer_on(self, device: torch.device) -> MultiScaleQuantizer:
        """The tokenizer's quantizer on `device`; a copy of it, which is small, where offloading keeps the tokenizer elsewhere."""
        quantizer = self.tokenizer.quantizer
        weight = quantizer.codes.embedding.weight
        return quantizer if weight.device == device else copy.deepcopy(quantizer).to(device)


def _is_null(label: Any) -> bool:
    return isinstance(label, (int, np.integer)) and not isinstance(label, bool) and label == -1
