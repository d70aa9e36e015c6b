"""`PUREPipeline`: perceives how a picture is degraded, says what it shows, and restores it (PURE, arXiv 2503.11073)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.sampling import Sampler
from tokenizers_visual.codes import Codes

from .color_fix import COLOR_FIXES
from .conversation import IMAGE, picture
from .crops import on_white
from .lumina_mgpt import LuminaMGPTPipeline
from .outputs import ARRestorationOutput

__all__ = ["DiffusionPipeline", "PUREPipeline"]

QUESTION = f"Perceive the degradation level, understand the image content, and restore the high-quality image. {IMAGE}"

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm
        >>> from PIL import Image

        >>> pipe = armm.PUREPipeline.from_single_file("nonwhy/PURE", tokenizer="vq_ds8_c2i.pt").to("cuda")
        >>> output = pipe(Image.open("blurred.png"))
        >>> output.images[0], output.texts[0]
        ```
"""


class PUREPipeline(LuminaMGPTPipeline):
    """Restores pictures: writes the degradation and a description, then the picture again, whole.

    The draw of codes keeps many candidates where the model is unsure and few where it is not (`armm.decoding.sampling.entropy_top_k`).
    """

    single_file_loader: ClassVar[str | None] = "armm.convert.pure"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 0.8,
        "temperature": 0.9,
        "text_top_k": 1,
        "fewest_candidates": 1,
        "most_candidates": 2000,
        "image_size": 512,
        "max_new_tokens": 8192,
        "color_fix": "wavelet",
    }
    default_question: ClassVar[str] = QUESTION

    def samplers(self, settings: Mapping[str, Any]) -> tuple[Sampler, Sampler]:
        temperature = settings["temperature"]
        common: dict[str, Any] = {"temperature": temperature or 1.0, "do_sample": temperature > 0}
        bounds = settings["fewest_candidates"], settings["most_candidates"]
        return Sampler(top_k=settings["text_top_k"], **common), Sampler(entropy_top_k=bounds, **common)

    def prepare_image(self, image: PIL.Image.Image) -> PIL.Image.Image:
        size = self.generation_config["image_size"]
        if image.size != (size, size):
            image = image.resize((size, size), PIL.Image.Resampling.BICUBIC)
        return super().prepare_image(image)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Any,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        color_fix: str | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARRestorationOutput | tuple:
        """Restores pictures.

        Args:
            image: a PIL image, an array [H, W, 3], a tensor [3, H, W], or a list of them; resized to the model's size. Pictures of
                128, 256 and 512 pixels are what it was trained for.
            guidance_scale (`float`, *optional*): 0.8 in the paper: below 1 it pulls towards what the image says alone.
            temperature (`float`, *optional*): of the draw; 0 takes the likeliest.
            max_new_tokens (`int`, *optional*): longest answer, the picture included.
            color_fix (`str`, *optional*): "wavelet", "adain" or "none": how the input's colors are given back.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each picture.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (codes [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARRestorationOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token.
            callback_on_step_end_tensor_inputs (`list`, *optional*): `"latents"`: the ids of the vocabulary so far.

        Examples:

        Returns:
            [`ARRestorationOutput`] or `tuple`: the pictures and what the model said of them.
        """
        self.check_output_type(output_type)
        settings = self.check_settings(
            guidance_scale=guidance_scale, temperature=temperature, max_new_tokens=max_new_tokens, color_fix=color_fix
        )
        if settings["color_fix"] not in (*COLOR_FIXES, "none"):
            choices = ", ".join(map(repr, (*COLOR_FIXES, "none")))
            raise ValueError(f"`color_fix` must be one of {choices}, got {settings['color_fix']!r}.")
        self._guidance_scale = settings["guidance_scale"]
        given = list(image) if isinstance(image, (list, tuple)) else [image]
        if not given:
            raise ValueError("`image` is an empty list: give at least one picture.")
        inputs = [self.prepare_image(on_white(picture(item))) for item in given]
        prompts = [self.describe_prompt(self.encode_image(item), QUESTION) for item in inputs]
        output = self.continue_prompts(
            prompts,
            settings,
            settings["max_new_tokens"],
            stop_ids=self.stop_ids,
            generator=generator,
            callback=callback_on_step_end,
            callback_names=callback_on_step_end_tensor_inputs,
        )
        texts, codes = [], []
        for row in output.tokens():
            text, drawn = self.read_answer(row)
            texts.append(text)
            codes.append(drawn)
        images = self.finish(codes, inputs, settings["color_fix"], output_type)
        self.maybe_free_model_hooks()
        return ARRestorationOutput(images=images, texts=texts) if return_dict else (images, texts)

    def read_answer(self, ids: Sequence[int]) -> tuple[str, Codes]:
        """What the model said, and the codes of the picture that it drew."""
        stops = set(self.stop_ids)
        parts = self.block.split([index for index in ids if index not in stops])
        pictures = [part for part in parts if isinstance(part, tuple)]
        if not pictures:
            raise RuntimeError(
                "the model ended its answer without a whole picture: raise `max_new_tokens`, or try another generator."
            )
        said = [token for part in parts if not isinstance(part, tuple) for token in part]
        values, grid = pictures[-1]
        text = "" if self.text_tokenizer is None else self.text_tokenizer.decode(said)
        return text, Codes(ids=values[None].to(self._execution_device), grid=(1, *grid))

    def finish(
        self, codes: Sequence[Codes], inputs: Sequence[PIL.Image.Image], color_fix: str, output_type: str
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor:
        """Pictures of `codes` with the colors of `inputs`."""
        if output_type == "latent":
            return torch.cat([item.tensor for item in codes])
        pictures = []
        for item, source in zip(codes, inputs, strict=True):
            pixels = (self.tokenizer.decode(item).float().clamp(-1, 1) + 1) / 2
            if color_fix != "none":
                size = (pixels.shape[-1], pixels.shape[-2])
                if source.size != size:
                    source = source.resize(size, PIL.Image.Resampling.BICUBIC)
                wanted = torch.from_numpy(np.array(source)).permute(2, 0, 1)[None].to(pixels) / 255
                pixels = COLOR_FIXES[color_fix](pixels, wanted).clamp(0, 1)
            pictures.append(pixels)
        sizes = {tuple(pixels.shape[-2:]) for pixels in pictures}
        if len(sizes) > 1:
            if output_type != "pil":
                raise ValueError(
                    f"the answers have pictures of several sizes, {sorted(sizes)}: ask for output_type='pil'."
                )
            return [
                image
                for pixels in pictures
                for image in VaeImageProcessor().postprocess(pixels, "pil", do_denormalize=[False])
            ]
        stacked = torch.cat(pictures)
        return VaeImageProcessor().postprocess(stacked, output_type=output_type, do_denormalize=[False] * len(stacked))
