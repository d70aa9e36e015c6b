"""Pictures of images that are still being decoded: the tokens known so far through the tokenizer, the rest neutral."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizers_visual import Codes, VisualTokenizer

__all__ = ["appearing", "decode_groups", "image_tokenizer", "known_so_far", "partial_images", "progress"]

NEUTRAL = (226, 228, 232)
NEUTRAL_EDGE = (208, 211, 217)
MAX_FRAMES = 64


def decode_groups(pipe: Any, grid: Sequence[int]) -> list[Tensor]:
    """Raster cells in the order in which the pipeline's decoding strategy fills them, those of one call together."""
    groups = getattr(getattr(pipe, "decoding", None), "groups", None)
    if not callable(groups):
        raise ValueError(f"{type(pipe).__name__} does not decode token by token on a grid")
    return groups(grid)


def image_tokenizer(pipe: Any) -> VisualTokenizer:
    """The component that turns codes into pixels."""
    for component in pipe.components.values():
        if isinstance(component, VisualTokenizer):
            return component
    raise ValueError(f"{type(pipe).__name__} has no image tokenizer, so its tokens cannot be shown")


def known_so_far(latents: Tensor, count: int) -> Tensor:
    """What `callback_on_step_end` is given as `"latents"` while an image is decoded -> ids [B, N], -1 where none is known.

    latents: [B, n], the first n of `count` cells in raster order, or [B, N] with -1 in cells to come.
    """
    if latents.ndim != 2 or latents.shape[1] > count:
        raise ValueError(f"latents must be ids [B, n] of at most {count} cells, got {tuple(latents.shape)}")
    return F.pad(latents, (0, count - latents.shape[1]), value=-1)


def progress(latents: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What `callback_on_step_end` is given as `"latents"` -> tokens in raster order, ids [B, N] or latents [B, N, C], and where they
    are known, bool [B, N]: not where latents are 0."""
    if latents.ndim == 3:
        return latents, (latents != 0).any(-1)
    ids = known_so_far(latents, count)
    return ids, ids >= 0


@torch.no_grad()
def partial_images(
    tokenizer: VisualTokenizer, tokens: Tensor, grid: Sequence[int], size: int, visible: Tensor | None = None
) -> list[PIL.Image.Image]:
    """One picture for each row of tokens, cells that are not known drawn neutral.

    Args:
        tokenizer: of one token per cell.
        tokens: int64 ids [B, N] or latents [B, N, C], in raster order.
        grid: (height, width) in cells.
        size: shorter side of the pictures in pixels.
        visible: bool [B, N], which cells are known; None is all whose id is not negative.
    """
    rows, columns = grid
    cells = torch.arange(tokens.shape[1], device=tokens.device)
    corners = torch.stack([cells // columns, cells % columns], dim=1).float()
    visible = tokens >= 0 if visible is None else visible
    # The decoder wants a token everywhere: cells to come repeat the nearest one and are painted over.
    nearest = torch.cdist(corners, corners).masked_fill(~visible[:, None], float("inf")).argmin(dim=2)
    source = torch.where(visible, cells, nearest)
    if tokens.ndim == 2:
        filled = Codes(ids=tokens.gather(1, source).clamp(min=0), grid=(1, rows, columns))
    else:
        filled = Codes(latents=tokens.take_along_dim(source[..., None], dim=1), grid=(1, rows, columns))
    pixels = tokenizer.decode(filled).float().clamp(-1, 1)
    pixels = ((pixels + 1) * 127.5).round().byte().cpu()
    shown = visible.view(-1, rows, columns).cpu()
    return [_paint(image, mask, size) for image, mask in zip(pixels, shown, strict=True)]


def appearing(pipe: Any, codes: Codes, size: int, max_frames: int = MAX_FRAMES) -> Iterator[list[PIL.Image.Image]]:
    """The tokens of pictures appearing in the order in which they were decoded: the pictures of one frame after the other, from
    no token to all of them.

    Args:
        pipe: by which they were drawn.
        codes: `ids` [B, N] or `latents` [B, N, C] on a grid (1, h, w).
        size: shorter side of the pictures in pixels.
        max_frames: several calls share a frame where there would be more.

    Raises:
        ValueError: pictures that are not made of one token per cell, or not decoded on a grid.
    """
    tokenizer = image_tokenizer(pipe)
    tokens, dimensions = codes.tensor, 3 if codes.ids is None else 2
    if tokens.ndim != dimensions or codes.grid is None or codes.grid[0] != 1:
        raise ValueError("only pictures made of one token per grid cell can be shown token by token")
    grid = codes.grid[1:]
    groups = decode_groups(pipe, grid)
    number = torch.empty(tokens.shape[1], dtype=torch.long, device=tokens.device)
    for index, group in enumerate(groups):
        number[group] = index
    per_frame = -(-len(groups) // max_frames)
    for known in (*range(0, len(groups), per_frame), len(groups)):
        visible = (number < known).expand(tokens.shape[:2])
        yield partial_images(tokenizer, tokens, grid, size, visible)


def _paint(pixels: Tensor, visible: Tensor, size: int) -> PIL.Image.Image:
    """`pixels` uint8 [3, H, W] on a shorter side of `size`, cells not `visible` [h, w] neutral."""
    image = PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), PIL.Image.Resampling.BICUBIC)
    draw = PIL.ImageDraw.Draw(image)
    rows, columns = visible.shape
    for row, column in (~visible).nonzero().tolist():
        left, right = round(column * image.width / columns), round((column + 1) * image.width / columns) - 1
        top, bottom = round(row * image.height / rows), round((row + 1) * image.height / rows) - 1
        draw.rectangle((left, top, right, bottom), fill=NEUTRAL, outline=NEUTRAL_EDGE)
    return image
