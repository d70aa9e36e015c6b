"""`UnifiedInpaintPipeline`: redraws a masked region of a picture after a sentence; the codes outside it stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.utils import replace_example_docstring

from armm.decoding.acceleration import Acceleration
from armm.decoding.speculative import Speculative

from .arguments import common_count
from .images import loaded
from .outputs import ARPipelineOutput
from .unified import UnifiedPipeline, images_to_pixels

__all__ = ["DiffusionPipeline", "UnifiedInpaintPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm
        >>> from PIL import Image, ImageDraw

        >>> pipe = armm.pipeline("inpainting")
        >>> image = Image.open("scene.png")
        >>> mask = Image.new("L", image.size, 0)
        >>> ImageDraw.Draw(mask).rectangle((32, 0, 63, 63), fill=255)
        >>> pipe("a small red sphere to the left of a large green cone", image, mask).images[0].save("changed.png")
        ```
"""


class UnifiedInpaintPipeline(UnifiedPipeline):
    """Redraws part of an image.

    Two ways. In order: a code sees the prompt, the kept codes before it in decode order and what was drawn; kept codes that come
    later do not influence it. Infilling (CM3), for models whose vocabulary has sentinels for holes: what is redrawn is written
    after all that is kept, and sees it on every side.
    """

    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = (Speculative,)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str],
        image: Any,
        mask_image: Any,
        num_images_per_prompt: int = 1,
        keep_pixels: bool = False,
        infill: bool | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_codes: bool = False,
    ) -> ARPipelineOutput | tuple:
        """Redraws.

        Args:
            prompt (`str` or `list[str]`): describes the whole picture as it shall be; one for all images or one for each.
            image: as in `UnifiedImageToTextPipeline`: PIL, array, tensor, or a list.
            mask_image: white (above one half) where the image is to be redrawn; a PIL image, an array or tensor [H, W] or
                [B, H, W] (bool, uint8, or floats in [0, 1]), or a list; one for all images or one for each; cropped and
                resized as the image is. A code's cell is redrawn if any pixel of it is masked.
            num_images_per_prompt (`int`, *optional*, defaults to 1): results for each image, next to each other.
            keep_pixels (`bool`, *optional*, defaults to `False`): paste the original pixels back where no cell was redrawn
                (otherwise they pass through the tokenizer, which changes them slightly).
            infill (`bool`, *optional*): redraw by infilling; by default where the model can.
            guidance_scale, temperature, top_k, top_p, generator, output_type, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs, output_codes: as in `UnifiedTextToImagePipeline`.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images, and the codes if asked for.
        """
        self.check_output_type(output_type)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        guidance_scale, sampler = self.check_sampling(guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        prefix = self.encode_prompt(prompt)
        pixels = images_to_pixels(image, self.image_size)
        cells = self.mask_to_cells(mask_image)
        count = common_count({"prompt": len(prefix), "image": len(pixels), "mask_image": len(cells)})
        known = self.encode_image(pixels.add(1).div(2).clamp(0, 1))
        prefix, pixels, cells, known = (
            value.expand(count, *value.shape[1:]).repeat_interleave(num_images_per_prompt, 0)
            for value in (prefix, pixels, cells, known)
        )
        self.check_generator(generator, len(prefix))
        redrawn_cells = cells.flatten(1).to(known.device)
        watched: dict[str, Any] = {
            "callback": callback_on_step_end,
            "callback_names": callback_on_step_end_tensor_inputs,
        }
        if self.infills(infill, redrawn_cells):
            codes = self.fill_codes(prefix, guidance_scale, sampler, generator, known, redrawn_cells, **watched)
        else:
            given: dict[str, Any] = {"known_ids": known, "known_mask": ~redrawn_cells}
            codes = self.draw_codes(prefix, guidance_scale, sampler, generator, **given, **watched)
        if keep_pixels and output_type != "latent":
            drawn = self.tokenizer.decode(codes).float()
            redrawn = F.interpolate(cells[:, None].float(), size=drawn.shape[-2:], mode="nearest").to(drawn.device)
            images = self.pixels_to_images(torch.where(redrawn > 0, drawn, pixels.to(drawn.device)), output_type)
        else:
            images = self.decode_codes_to_images(codes, output_type)
        return self.wrap_output(images, codes, return_dict=return_dict, output_codes=output_codes)

    def infills(self, infill: bool | None, cells: torch.Tensor) -> bool:
        """Whether the masked `cells` [B, N] are redrawn by infilling; a ValueError if that is asked for and not possible."""
        if infill is False:
            return False
        if infill is not None and infill is not True:
            raise TypeError(f"`infill` must be True, False or None, got {infill!r}.")
        starts = cells & ~F.pad(cells, (1, 0))[:, :-1]
        fewest, most = (int(value) for value in starts.sum(1).aminmax())
        possible = 1 <= fewest and most <= len(self.words.holes)
        if infill and not possible:
            raise ValueError(
                f"`infill` needs a model that knows holes and masks of 1 to {len(self.words.holes)} of them (runs of codes, row by row); "
                f"these masks have {fewest} to {most}. Pass `infill=False` to redraw in order."
            )
        return possible

    def mask_to_cells(self, mask_image: Any) -> torch.Tensor:
        """Masks in any accepted form -> bool [B, h, w], True for the codes to redraw."""
        return mask_to_cells(mask_image, self.image_size, self.tokenizer.downsample)


def mask_to_cells(mask_image: Any, size: tuple[int, int], downsample: int) -> torch.Tensor:
    """Masks in any accepted form, cropped and resized to `size` pixels -> bool [B, h, w], True for the cells of `downsample`
    pixels with any masked one in them."""
    if isinstance(mask_image, (list, tuple)):
        if not mask_image:
            raise ValueError("`mask_image` is an empty list: give at least one mask.")
        return torch.cat([mask_to_cells(item, size, downsample) for item in mask_image])
    if isinstance(mask_image, PIL.Image.Image):
        planes = np.asarray(loaded(mask_image, "mask_image").convert("L"))[None]
    elif isinstance(mask_image, (np.ndarray, torch.Tensor)):
        if isinstance(mask_image, torch.Tensor):
            mask_image = mask_image.detach().cpu()
            mask_image = (mask_image.float() if mask_image.is_floating_point() else mask_image).numpy()
        planes = mask_image
        if planes.ndim not in (2, 3) or 0 in planes.shape:
            raise ValueError(f"`mask_image` must have shape [H, W] or [B, H, W], got {tuple(planes.shape)}.")
        planes = planes[None] if planes.ndim == 2 else planes
    else:
        raise TypeError(
            f"`mask_image` must be a PIL image, an array, a tensor or a list of them, got {type(mask_image).__name__}."
        )
    if planes.dtype == np.uint8:
        planes = planes > 127
    elif planes.dtype != np.bool_:
        if not np.issubdtype(planes.dtype, np.floating):
            raise TypeError(f"`mask_image` must be bool, uint8 or floating point, got {planes.dtype}.")
        if not np.isfinite(planes).all() or planes.min() < 0 or planes.max() > 1:
            raise ValueError(
                f"`mask_image` must lie in [0, 1], got values from {planes.min():.3g} to {planes.max():.3g}."
            )
        planes = planes > 0.5
    # The same crop as the image's; a masked pixel stays visible however much the mask shrinks.
    rgb = np.repeat(planes[..., None].astype(np.uint8) * 255, 3, axis=-1)
    masked = images_to_pixels(rgb, size, "mask_image")[:, :1] > -1 + 1e-6
    cells = F.max_pool2d(masked.float(), downsample)[:, 0] > 0
    if not cells.flatten(1).any(1).all():
        raise ValueError("`mask_image` masks nothing: paint the region to redraw white.")
    return cells
