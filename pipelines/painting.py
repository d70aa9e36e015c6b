"""Pixels from codes of meaning: diffusion models as optional image decoders of pipelines with a `SemanticTokenizer`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from tokenizers_visual.codes import Codes
from tokenizers_visual.semantic import ImageCondition

from .base import ARPipeline

__all__ = ["DiffusionPipeline", "PaintingPipeline", "StableDiffusionPainter", "UnCLIPPainter", "XLPainter"]

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
Pictures: TypeAlias = list[PIL.Image.Image] | np.ndarray | torch.Tensor


@dataclass
class UnCLIPPainter:
    """Paints from the embedding of an image in CLIP's space (SEED).

    Args:
        pipe: a `StableUnCLIPImg2ImgPipeline` of diffusers, such as `stabilityai/stable-diffusion-2-1-unclip`.
        guidance_scale, num_inference_steps, noise_level: of its calls; the defaults are those of SEED's authors.
        height, width: of the images in pixels; None is the model's own size.
    """

    pipe: Any
    guidance_scale: float = 10.0
    num_inference_steps: int = 20
    noise_level: int = 0
    height: int | None = None
    width: int | None = None

    def __call__(self, condition: ImageCondition, generator: Generators, output_type: str) -> Pictures:
        """Images of `condition.pooled`, as `output_type` "pil", "np" or "pt"."""
        if condition.pooled is None:
            raise ValueError("an unCLIP model paints from a pooled embedding, which this condition has not.")
        embeds = condition.pooled.to(self.pipe.device, self.pipe.unet.dtype)
        return self.pipe(
            prompt=[""] * len(embeds),
            image_embeds=embeds,
            noise_level=self.noise_level,
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            height=self.height,
            width=self.width,
            generator=_listed(generator),
            output_type=output_type,
        ).images


@dataclass
class XLPainter:
    """Paints from features in the place of a text's and a pooled vector, with SDXL (LaVIT's images of 1024 pixels).

    Args:
        pipe: a `StableDiffusionXLPipeline` of diffusers; it needs no text encoders.
        guidance_scale, num_inference_steps: of its calls; the defaults are those of LaVIT's authors.
        height, width: of the images in pixels; None is the model's own size.
    """

    pipe: Any
    guidance_scale: float = 7.0
    num_inference_steps: int = 25
    height: int | None = None
    width: int | None = None

    def __call__(self, condition: ImageCondition, generator: Generators, output_type: str) -> Pictures:
        """Images of `condition`, as `output_type` "pil", "np" or "pt"; without condition are zeros."""
        if condition.embeds is None or condition.pooled is None:
            raise ValueError("SDXL paints from features and a pooled vector: take a decoder that makes both.")
        embeds, pooled = (
            value.to(self.pipe.device, self.pipe.unet.dtype) for value in (condition.embeds, condition.pooled)
        )
        return self.pipe(
            prompt_embeds=embeds,
            pooled_prompt_embeds=pooled,
            negative_prompt_embeds=torch.zeros_like(embeds),
            negative_pooled_prompt_embeds=torch.zeros_like(pooled),
            guidance_scale=self.guidance_scale,
            num_inference_steps=self.num_inference_steps,
            height=self.height,
            width=self.width,
            generator=_listed(generator),
            output_type=output_type,
        ).images


@dataclass
class StableDiffusionPainter:
    """Paints from features in the place of a text's, with Stable Diffusion 1.5 (LaVIT's images of 512 pixels).

    Args:
        unet, vae, scheduler: of the diffusion model.
        unconditional: features `[1, M, C]` of the empty text, for guidance. They may be shorter than the condition.
        guidance_scale, num_inference_steps: of a call; the defaults are those of LaVIT's authors.
        height, width: of the images in pixels.
    """

    unet: Any
    vae: Any
    scheduler: Any
    unconditional: torch.Tensor
    guidance_scale: float = 5.0
    num_inference_steps: int = 50
    height: int = 512
    width: int = 512

    @torch.no_grad()
    def __call__(self, condition: ImageCondition, generator: Generators, output_type: str) -> Pictures:
        """Images of `condition.embeds`, as `output_type` "pil", "np" or "pt"."""
        if condition.embeds is None:
            raise ValueError("Stable Diffusion paints from features, which this condition has not.")
        device, dtype = self.unet.device, self.unet.dtype
        embeds = condition.embeds.to(device, dtype)
        null = self.unconditional.to(device, dtype).expand(len(embeds), -1, -1)
        step = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (len(embeds), self.unet.config.in_channels, self.height // step, self.width // step)
        self.scheduler.set_timesteps(self.num_inference_steps, device=device)
        latents = randn_tensor(shape, generator=_listed(generator), device=device, dtype=dtype)
        latents = latents * self.scheduler.init_noise_sigma
        for time in self.scheduler.timesteps:
            model_input = self.scheduler.scale_model_input(latents, time)
            # two calls: the two texts need not be equally long
            noise = self.unet(model_input, time, encoder_hidden_states=embeds).sample
            if self.guidance_scale > 1:
                free = self.unet(model_input, time, encoder_hidden_states=null).sample
                noise = free + self.guidance_scale * (noise - free)
            latents = self.scheduler.step(noise, time, latents).prev_sample
        pixels = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return ARPipeline.pixels_to_images(pixels, output_type)


def _listed(generator: Generators) -> Any:
    return list(generator) if isinstance(generator, (list, tuple)) else generator


class PaintingPipeline(ARPipeline):
    """Base of pipelines whose codes become pixels through a diffusion model, which is optional and not saved with the pipeline.

    Without `image_decoder`, images are asked for as codes (`output_type="latent"`), or as what a decoder would be given
    (`condition`).

    Attributes:
        image_decoder: called as `image_decoder(condition, generator, output_type)`; a `UnCLIPPainter`, `XLPainter`,
            `StableDiffusionPainter` or anything alike.
    """

    image_decoder: Any = None
    _painting_generator: Generators = None

    @abstractmethod
    def condition(self, codes: Codes) -> ImageCondition:
        """What a diffusion model paints the images of `codes` from."""

    def check_output_type(self, output_type: str) -> None:  # type: ignore[override]
        """Raises ValueError unless `output_type` is known and can be made with what is loaded."""
        ARPipeline.check_output_type(output_type)
        if output_type != "latent" and self.image_decoder is None:
            raise ValueError(
                f"`output_type` {output_type!r} needs an image decoder, which is not loaded: call `load_image_decoder(...)` or set "
                "`image_decoder`, or ask for the codes with output_type='latent'."
            )

    def decode_codes_to_images(self, codes: Codes, output_type: str = "pil") -> Pictures:
        self.check_output_type(output_type)
        if output_type == "latent":
            return codes.tensor
        return self.image_decoder(self.condition(codes), self._painting_generator, output_type)
