"""A GIF of a picture's tokens appearing in the order in which they were decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

FRAME_MILLISECONDS = 60
SHORTEST = 1500  # milliseconds of all frames but the last, however few calls there are
LAST_MILLISECONDS = 2500


def appearing_tokens(pipe: Any, codes: Any, size: int, *, quiet: bool = True) -> tuple[list[Image.Image], list[int]]:
    """Frames and their durations in milliseconds. Cells that are not decoded yet are drawn neutral; several pictures
    share a grid. `codes` holds `ids` [B, N] on a grid (1, h, w)."""
    from tqdm import tqdm

    from armm.cli.output import image_grid
    from pipelines.preview import appearing

    try:
        steps = list(tqdm(appearing(pipe, codes, size), desc="animation", disable=quiet, leave=False))
    except ValueError as error:
        raise ValueError(f"--animate: {error}") from None
    frames = [image_grid(images, gap=4) if len(images) > 1 else images[0] for images in steps]
    return frames, [max(FRAME_MILLISECONDS, SHORTEST // len(frames))] * (len(frames) - 1) + [LAST_MILLISECONDS]


def previews(stages: list[list[Image.Image]], size: int) -> tuple[list[Image.Image], list[int]]:
    """Frames and their durations in milliseconds of images that become clearer stage by stage; several pictures share a grid."""
    from PIL import Image as PILImage

    from armm.cli.output import image_grid

    frames = []
    for images in stages:
        factor = size / min(images[0].size)
        shape = (round(images[0].width * factor), round(images[0].height * factor))
        tiles = [image.resize(shape, PILImage.Resampling.BICUBIC) for image in images]
        frames.append(image_grid(tiles, gap=4) if len(tiles) > 1 else tiles[0])
    return frames, [max(FRAME_MILLISECONDS, SHORTEST // len(frames))] * (len(frames) - 1) + [LAST_MILLISECONDS]
