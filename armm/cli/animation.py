"""A GIF of a picture's tokens appearing in the order in which they were decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_FRAMES = 64
FRAME_MILLISECONDS = 60
SHORTEST = 1500  # milliseconds of all frames but the last, however few calls there are
LAST_MILLISECONDS = 2500
NEUTRAL = (226, 228, 232)
NEUTRAL_EDGE = (208, 211, 217)


def decode_groups(pipe: Any, grid: tuple[int, int]) -> list[list[int]]:
    """Raster cells in the order in which the pipeline's decoding strategy fills them, those of one call together."""
    groups = getattr(getattr(pipe, "decoding", None), "groups", None)
    if not callable(groups):
        raise ValueError(f"--animate: {type(pipe).__name__} does not decode token by token on a grid")
    return [group.tolist() for group in groups(grid)]


def image_tokenizer(pipe: Any) -> Any:
    """The component that turns codes into pixels."""
    from tokenizers_visual import VisualTokenizer

    for component in pipe.components.values():
        if isinstance(component, VisualTokenizer):
            return component
    raise ValueError(f"--animate: {type(pipe).__name__} has no image tokenizer, so its tokens cannot be shown")


def appearing_tokens(pipe: Any, codes: Any, size: int, *, quiet: bool = True) -> tuple[list[Image.Image], list[int]]:
    """Frames and their durations in milliseconds. Cells that are not decoded yet are drawn neutral; several pictures
    share a grid. `codes` holds `ids` [B, N] on a grid (1, h, w)."""
    import torch
    from tqdm import tqdm

    from armm.cli.output import image_grid
    from tokenizers_visual import Codes

    tokenizer = image_tokenizer(pipe)
    ids = codes.ids
    if ids is None or ids.ndim != 2 or codes.grid is None or codes.grid[0] != 1:
        raise ValueError("--animate: only pictures made of one token per grid cell can be shown token by token")
    batch, count = ids.shape
    rows, columns = codes.grid[1:]
    groups = decode_groups(pipe, (rows, columns))
    cells = torch.arange(count, device=ids.device)
    corners = torch.stack([cells // columns, cells % columns], dim=1).float()
    distance = torch.cdist(corners, corners)
    per_frame = -(-len(groups) // MAX_FRAMES)
    known_counts = [*range(0, len(groups), per_frame), len(groups)]

    frames = []
    with torch.no_grad():
        for known in tqdm(known_counts, desc="animation", disable=quiet, leave=False):
            visible = torch.zeros(count, dtype=torch.bool, device=ids.device)
            visible[[cell for group in groups[:known] for cell in group]] = True
            # The decoder wants a code everywhere: cells to come repeat the nearest one and are painted over.
            nearest = distance.masked_fill(~visible[None], float("inf")).argmin(dim=1)
            partial = ids[:, torch.where(visible, cells, nearest)]
            pixels = tokenizer.decode(Codes(ids=partial, grid=codes.grid)).float().clamp(-1, 1)
            tiles = [
                paint(image, visible.view(rows, columns), size) for image in ((pixels + 1) * 127.5).round().byte().cpu()
            ]
            frames.append(image_grid(tiles, gap=4) if batch > 1 else tiles[0])
    return frames, [max(FRAME_MILLISECONDS, SHORTEST // len(frames))] * (len(frames) - 1) + [LAST_MILLISECONDS]


def paint(pixels: Any, visible: Any, size: int) -> Image.Image:
    """One frame: `pixels` uint8 [3, H, W] on a shorter side of `size`, cells not `visible` [h, w] neutral."""
    from PIL import Image as PILImage
    from PIL import ImageDraw

    image = PILImage.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), PILImage.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    rows, columns = visible.shape
    for row, column in (~visible).nonzero().tolist():
        left, right = round(column * image.width / columns), round((column + 1) * image.width / columns) - 1
        top, bottom = round(row * image.height / rows), round((row + 1) * image.height / rows) - 1
        draw.rectangle((left, top, right, bottom), fill=NEUTRAL, outline=NEUTRAL_EDGE)
    return image
