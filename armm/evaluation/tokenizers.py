"""Tokenizers side by side: what each keeps of the same pictures, in how many bits, in what time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F

from armm.auto import tokenizer as load
from pipelines.images import images_to_pixels, pictures
from tokenizers_visual.base import VisualTokenizer
from tokenizers_visual.codes import Codes
from tokenizers_visual.semantic import SemanticTokenizer

from .common import check_count, sample_generator
from .metrics import psnr, ssim

SSIM_WINDOW = 11
LABEL_HEIGHT, GAP = 16, 4


@dataclass(frozen=True)
class Reconstruction:
    """What one tokenizer made of some pictures.

    Args:
        name: of the tokenizer.
        pixels: float32 [B, 3, H, W] in [-1, 1], as large as the pictures.
        tokens, sub_codes: positions of a picture and ids of each; channels: numbers of each, for continuous tokenizers (else 0).
        bits: bits of a picture's ids; None for continuous tokenizers.
        psnr, ssim: float64 [B]; ssim is NaN for pictures smaller than its window.
        encode_seconds, decode_seconds: of a picture.
    """

    name: str
    pixels: torch.Tensor
    tokens: int
    sub_codes: int
    channels: int
    bits: float | None
    psnr: torch.Tensor
    ssim: torch.Tensor
    encode_seconds: float
    decode_seconds: float

    @property
    def bits_per_pixel(self) -> float | None:
        """Bits for each pixel of the picture, as it was compared."""
        height, width = self.pixels.shape[-2:]
        return None if self.bits is None else self.bits / (height * width)

    def figures(self) -> dict[str, Any]:
        """The means, ready for JSON."""
        return {
            "tokenizer": self.name,
            "codes": self.tokens * self.sub_codes,
            "numbers": self.tokens * self.channels,
            "bits_per_pixel": None if self.bits_per_pixel is None else round(self.bits_per_pixel, 5),
            "psnr": round(float(self.psnr.mean()), 4),
            "ssim": round(float(self.ssim.mean()), 5),
            "encode_seconds": round(self.encode_seconds, 5),
            "decode_seconds": round(self.decode_seconds, 5),
        }


@dataclass(frozen=True)
class TokenizerComparison:
    """What `compare_tokenizers` returns: the pictures as they were compared, [B, 3, H, W] in [-1, 1], and a row for each tokenizer."""

    pixels: torch.Tensor
    rows: list[Reconstruction]

    def table(self) -> list[dict[str, Any]]:
        """The figures of each tokenizer, ready for JSON or pandas."""
        return [row.figures() for row in self.rows]

    def sheet(self) -> PIL.Image.Image:
        """One picture: a row for each picture, the original and then what each tokenizer made of it."""
        columns = [("original", self.pixels), *((row.name, row.pixels) for row in self.rows)]
        count, _, height, width = self.pixels.shape
        size = (len(columns) * (width + GAP) - GAP, LABEL_HEIGHT + count * (height + GAP) - GAP)
        sheet = PIL.Image.new("RGB", size, "white")
        draw = PIL.ImageDraw.Draw(sheet)
        for column, (name, pixels) in enumerate(columns):
            left = column * (width + GAP)
            draw.text((left + 2, 2), shortened(name, width - 4, draw), fill="black")
            for row, picture in enumerate(to_pictures(pixels)):
                sheet.paste(picture, (left, LABEL_HEIGHT + row * (height + GAP)))
        return sheet


def compare_tokenizers(
    images: Any,
    tokenizers: Sequence[str | Path | VisualTokenizer] | dict[str, Any] | str,
    *,
    size: int | tuple[int, int] = 256,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> TokenizerComparison:
    """Encodes and decodes the same pictures with several tokenizers.

    Args:
        images: pictures in any form that `pipelines.images.pictures` reads.
        tokenizers: each what `armm.tokenizer` takes; a dict gives them names.
        size: (height, width), or side, to which the pictures are cropped and resized, and at which they are compared. A tokenizer
            that wants another size is given that; what it makes of it is resized back.
        batch_size: pictures at once.
        seed: of tokenizers that decode with noise; picture i has the generator of seed and i, so that it does not depend on the others.
        device: where to compute; None is where each tokenizer is.

    Raises:
        ValueError: a tokenizer of videos, of depth or without a decoder, no tokenizer, sizes that are none.
    """
    check_count("batch_size", batch_size)
    shape = (size, size) if isinstance(size, int) else tuple(size)
    if len(shape) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in shape):
        raise ValueError(f"`size` must be a side or (height, width) in pixels, got {size!r}.")
    named = named_tokenizers(tokenizers)
    given = pictures(images, "images")
    pixels = images_to_pixels(given, shape, "images")
    rows = [
        reconstruct(model, pixels, name=name, batch_size=batch_size, seed=seed, device=device) for name, model in named
    ]
    return TokenizerComparison(pixels, rows)


def named_tokenizers(tokenizers: Any) -> list[tuple[str, VisualTokenizer]]:
    """The tokenizers with different names, loaded."""
    if isinstance(tokenizers, dict):
        items = list(tokenizers.items())
    else:
        single = isinstance(tokenizers, (str, Path, VisualTokenizer))
        items = [(name_of(item), item) for item in ([tokenizers] if single else tokenizers)]
    if not items:
        raise ValueError("`tokenizers` is empty: give at least one.")
    found: dict[str, VisualTokenizer] = {}
    for name, item in items:
        number, unique = 1, name
        while unique in found:
            number += 1
            unique = f"{name} ({number})"
        found[unique] = check_pictures(unique, load(item))
    return list(found.items())


def name_of(tokenizer: str | Path | VisualTokenizer) -> str:
    """How a tokenizer is called in tables."""
    if isinstance(tokenizer, VisualTokenizer):
        return type(tokenizer).__name__
    return Path(tokenizer).name or str(tokenizer)


def check_pictures(name: str, tokenizer: VisualTokenizer) -> VisualTokenizer:
    """`tokenizer`; a ValueError unless it codes color pictures."""
    if isinstance(tokenizer, SemanticTokenizer):
        raise ValueError(f"{name} ({type(tokenizer).__name__}) has no decoder to pixels: there is nothing to compare.")
    channels = tokenizer.config.get("in_channels", 3)
    if tokenizer.is_video or channels != 3:
        what = "videos" if tokenizer.is_video else f"maps of {channels} channels"
        raise ValueError(f"{name} ({type(tokenizer).__name__}) codes {what}, not pictures.")
    return tokenizer


def fitting_size(tokenizer: VisualTokenizer, height: int, width: int) -> tuple[int, int]:
    """The size nearest to `height` x `width` that `tokenizer` takes."""
    if tokenizer.required_size is not None:
        return tokenizer.required_size
    step, least = tokenizer.downsample, tokenizer.smallest_size
    return max(round(height / step) * step, least), max(round(width / step) * step, least)


@torch.no_grad()
def reconstruct(
    tokenizer: VisualTokenizer,
    pixels: torch.Tensor,
    *,
    name: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Reconstruction:
    """What `tokenizer` makes of pixels [B, 3, H, W] in [-1, 1]; arguments as of `compare_tokenizers`."""
    if device is not None:
        tokenizer = tokenizer.to(device)
    parameter = next(tokenizer.parameters())
    height, width = pixels.shape[-2:]
    wanted = fitting_size(tokenizer, height, width)
    restored, codes, seconds = [], None, [0.0, 0.0]
    for first in range(0, len(pixels), batch_size):
        batch = resized(pixels[first : first + batch_size], wanted).to(device=parameter.device, dtype=parameter.dtype)
        generators = [sample_generator(seed, first + i) for i in range(len(batch))]
        started = moment(parameter.device)
        codes = tokenizer.encode(batch)
        between = moment(parameter.device)
        made = tokenizer.decode(codes, generator=generators, **size_options(tokenizer, wanted))  # type: ignore[arg-type]
        ended = moment(parameter.device)
        seconds = [seconds[0] + between - started, seconds[1] + ended - between]
        restored.append(resized(made.float().cpu().clamp(-1, 1), (height, width)))
    result = torch.cat(restored)
    similarity = torch.full((len(pixels),), float("nan"), dtype=torch.float64)
    if min(height, width) >= SSIM_WINDOW:
        similarity = ssim(result, pixels)
    tokens, bits = _codes_of(codes), tokenizer.bits_per_token
    return Reconstruction(
        name=name or type(tokenizer).__name__,
        pixels=result,
        tokens=tokens,
        sub_codes=tokenizer.sub_codes if tokenizer.is_discrete else 0,
        channels=0 if tokenizer.is_discrete else tokenizer.latent_channels,
        bits=None if bits is None else bits * tokens,
        psnr=psnr(result, pixels),
        ssim=similarity,
        encode_seconds=seconds[0] / len(pixels),
        decode_seconds=seconds[1] / len(pixels),
    )


def _codes_of(codes: Codes | None) -> int:
    if codes is None:
        raise ValueError("there are no pictures to encode.")
    return codes.num_tokens


def size_options(tokenizer: VisualTokenizer, size: tuple[int, int]) -> dict[str, int]:
    """What `decode` must be told of the size, by tokenizers whose codes do not say it."""
    return {"height": size[0], "width": size[1]} if hasattr(tokenizer, "start_decoding") else {}


def moment(device: torch.device) -> float:
    """Now, when all work of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels [B, 3, H, W] at another size, bicubic and without aliasing."""
    if tuple(pixels.shape[-2:]) == tuple(size):
        return pixels
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def to_pictures(pixels: torch.Tensor) -> list[PIL.Image.Image]:
    """Pixels [B, 3, H, W] in [-1, 1] as pictures."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(picture) for picture in bytes_]


def shortened(text: str, width: int, draw: PIL.ImageDraw.ImageDraw) -> str:
    """As much of `text` as fits."""
    while len(text) > 1 and draw.textlength(text) > width:
        text = text[:-1]
    return text
