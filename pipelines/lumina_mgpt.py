"""`LuminaMGPTPipeline`: images of flexible shape, text and both in turn from one transformer (Lumina-mGPT, arXiv 2408.02657)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.sampling import Sampler

from .crops import crop_sizes, variable_crop
from .interleaved import InterleavedPipeline
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "LuminaMGPTPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.LuminaMGPTPipeline.from_single_file(
        ...     "Alpha-VLLM/Lumina-mGPT-7B-768", tokenizer="vqgan.ckpt", dtype="bfloat16"
        ... ).to("cuda")
        >>> image = pipe("a red fox in the snow", height=768, width=768).images[0]
        >>> pipe.describe(image).texts[0]
        >>> pipe.converse([["What comes next?", image]]).contents[0]
        ```
"""


class LuminaMGPTPipeline(InterleavedPipeline):
    """Draws images of any shape that its sizes can say, describes images, and converses in text and images."""

    single_file_loader: ClassVar[str | None] = "armm.convert.lumina_mgpt"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 4.0,
        "temperature": 1.0,
        "text_top_k": 10,
        "image_top_k": 2000,
        "image_size": 768,
        "max_new_tokens": 8192,
    }
    stop_names: ClassVar[dict[str, int]] = {"<reserved08706>": 8710}

    def samplers(self, settings: Mapping[str, Any]) -> tuple[Sampler, Sampler]:
        temperature = settings["temperature"]
        common: dict[str, Any] = {"temperature": temperature or 1.0, "do_sample": temperature > 0}
        return Sampler(top_k=settings["text_top_k"], **common), Sampler(top_k=settings["image_top_k"], **common)

    def crop_shapes(self) -> list[tuple[int, int]]:
        """(width, height) of the shapes in which images are read."""
        side = max(1, self.generation_config["image_size"] // self.unit)
        return crop_sizes(side * side, self.unit)

    def prepare_image(self, image: PIL.Image.Image) -> PIL.Image.Image:
        return variable_crop(image, self.crop_shapes())

    def grid_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The codes of an image of `height` x `width` pixels."""
        sides = []
        for name, value in (("height", height), ("width", width)):
            value = self.generation_config["image_size"] if value is None else value
            self.check_number(name, value, low=self.unit, high=self.block.max_size * self.unit, integer=True)
            if value % self.unit:
                raise ValueError(f"`{name}` must be a multiple of {self.unit} pixels, got {value}.")
            sides.append(value // self.tokenizer.downsample)
        return sides[0], sides[1]

    def encode_prompt(self, prompt: str, height: int, width: int) -> list[int]:
        """The ids of a request for an image of `height` x `width` pixels."""
        text = f"Generate an image of {width}x{height} according to the following prompt:\n{prompt}"
        return [self.start_id, *self.encode_text(text), self.turn_id]

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        image_top_k: int | None = None,
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
            height, width (`int`, *optional*): in pixels, multiples of 32; default the checkpoint's `image_size`.
            guidance_scale (`float`, *optional*): 1 turns guidance off; its unconditional row sees the image alone.
            temperature (`float`, *optional*): of the draw; 0 takes the likeliest code.
            image_top_k (`int`, *optional*): draw from the k likeliest codes; 0 from all.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images of each prompt, next to each other.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each image.
            noise (*optional*): recorded noise in place of the generator, see `armm.NoiseSource`.
            prompt_ids (`list` or `torch.Tensor`, *optional*): whole prompts as ids, in place of `prompt`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (codes [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARPipelineOutput` rather than a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token.
            callback_on_step_end_tensor_inputs (`list`, *optional*): `"latents"`: the ids of the vocabulary so far, ends of lines
                included.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images, and the codes if asked for.
        """
        self.check_output_type(output_type)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        grid = self.grid_of(height, width)
        settings = self.check_settings(guidance_scale=guidance_scale, temperature=temperature, image_top_k=image_top_k)
        pixels = [side * self.tokenizer.downsample for side in grid]
        rows = [
            self.encode_prompt(item, pixels[0], pixels[1]) if isinstance(item, str) else item
            for item in self.check_prompts(prompt, prompt_ids)
        ]
        return self.generate(
            rows,
            grid,
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
