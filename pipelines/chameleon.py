"""`ChameleonPipeline`: text and images from one transformer (Chameleon, arXiv 2405.09818; Anole, arXiv 2407.06135)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.guidance import ContextGuidance
from armm.decoding.sampling import Sampler

from .conversation import IMAGE
from .crops import square
from .interleaved import InterleavedPipeline
from .outputs import ARPipelineOutput

__all__ = ["ChameleonPipeline", "DiffusionPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.ChameleonPipeline.from_single_file("Anole-7b-v0.1/models/7b", tokenizer="vqgan.ckpt").to("cuda")
        >>> image = pipe("a red fox in the snow").images[0]
        >>> pipe.describe(image, "What animal is this?").texts[0]
        ```
"""


class ChameleonPipeline(InterleavedPipeline):
    """Draws images of one size, describes images, and converses in text and images.

    Meta's released weights were tuned not to draw: their images are noise. Anole's, of the same architecture, draw.
    """

    single_file_loader: ClassVar[str | None] = "armm.convert.chameleon"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 3.0,
        "image_guidance_scale": 1.2,
        "temperature": 0.7,
        "text_top_p": 0.9,
        "image_temperature": 0.7,
        "image_top_p": 0.9,
        "repetition_penalty": 1.2,
        "max_new_tokens": 4096,
    }
    default_question: ClassVar[str] = f"{IMAGE}Describe the image in detail."

    def samplers(self, settings: Mapping[str, Any]) -> tuple[Sampler, Sampler]:
        text, image = settings["temperature"], settings["image_temperature"]
        return (
            Sampler(
                text or 1.0,
                top_p=settings["text_top_p"],
                do_sample=text > 0,
                repetition_penalty=settings["repetition_penalty"],
            ),
            Sampler(image or 1.0, top_p=settings["image_top_p"], do_sample=image > 0),
        )

    def guidance_of(self, settings: Mapping[str, Any]) -> ContextGuidance:
        return ContextGuidance(self._guidance_scale, settings["image_guidance_scale"], null="start_image")

    def prepare_image(self, image: PIL.Image.Image) -> PIL.Image.Image:
        height, width = self.block.grid  # type: ignore[misc]
        if height != width:
            raise ValueError(f"images of this checkpoint have {height}x{width} codes; only square ones can be read.")
        return square(image, height * self.tokenizer.downsample)

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a request for an image."""
        return [self.start_id, *self.encode_text(prompt), self.turn_id]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        image_temperature: float | None = None,
        image_top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Any = None,
        prompt_ids: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple:
        """Draws images.

        Args:
            prompt (`str` or `list[str]`): what to draw.
            height, width (`int`, *optional*): must be the model's own size.
            guidance_scale (`float`, *optional*): how strongly the text is followed; with `image_guidance_scale` 1 it is off at 1.
            image_guidance_scale (`float`, *optional*): how strongly images in the prompt are followed.
            image_temperature, image_top_p (`float`, *optional*): of the draw of codes; temperature 0 takes the likeliest.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images of each prompt, next to each other.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each image.
            noise (*optional*): recorded noise in place of the generator, see `armm.NoiseSource`.
            prompt_ids (`list` or `torch.Tensor`, *optional*): whole prompts as ids, in place of `prompt`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (codes [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARPipelineOutput` rather than a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token.
            callback_on_step_end_tensor_inputs (`list`, *optional*): `"latents"`: the ids of the vocabulary so far.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images, and the codes if asked for.
        """
        self.check_output_type(output_type)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        grid = self.block.grid
        for name, value, side in zip(("height", "width"), (height, width), grid, strict=True):  # type: ignore[arg-type]
            own = side * self.tokenizer.downsample
            if value not in (None, own):
                raise ValueError(f"`{name}` must be {own} (or None), the size of this model's images, got {value}.")
        settings = self.check_settings(
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            image_temperature=image_temperature,
            image_top_p=image_top_p,
        )
        rows = [
            self.encode_prompt(item) if isinstance(item, str) else item
            for item in self.check_prompts(prompt, prompt_ids)
        ]
        return self.generate(
            rows,
            grid,  # type: ignore[arg-type]
            settings,
            num_images_per_prompt=num_images_per_prompt,
            output_type=output_type,
            return_dict=return_dict,
            output_codes=output_codes,
            generator=generator,
            noise=noise,
            callback=callback_on_step_end,
            callback_names=callback_on_step_end_tensor_inputs,
        )
