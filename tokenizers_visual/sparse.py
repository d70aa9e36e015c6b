"""Patches of pictures of any size, of videos and of voxels as one set of features with coordinates (AToken, arXiv 2509.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class SparseTokens:
    """Tokens of a batch of things that may all have different shapes.

    Args:
        features: float `[N, C]`.
        coordinates: int64 `[N, 5]`: number in the batch, time, row, column, depth.
    """

    features: torch.Tensor
    coordinates: torch.Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or not self.features.is_floating_point() or not len(self.features):
            raise ValueError(
                f"`features` must be floating point [N, C] with at least one token, got {self.features.dtype} of shape "
                f"{tuple(self.features.shape)}."
            )
        if self.coordinates.dtype != torch.int64 or tuple(self.coordinates.shape) != (len(self.features), 5):
            raise ValueError(
                f"`coordinates` must be int64 [{len(self.features)}, 5] (batch, time, row, column, depth), got "
                f"{self.coordinates.dtype} of shape {tuple(self.coordinates.shape)}."
            )
        if bool((self.coordinates < 0).any()):
            raise ValueError("`coordinates` must not be negative: shift them so that the smallest is 0.")

    def replace(self, features: torch.Tensor) -> SparseTokens:
        """Other features at the same coordinates."""
        return SparseTokens(features, self.coordinates)


@dataclass(frozen=True)
class Windows:
    """Tokens sorted into windows that are looked at apart from each other.

    Args:
        index: int64 `[G, L]`, the tokens of each window, filled up with token 0.
        real: bool `[G, L]`, False where it is filled up.
        coordinates: int64 `[G, L, 4]`, time (from the window's begin on), row, column, depth.
        batch: int64 `[G]`, the number in the batch that each window belongs to.
    """

    index: torch.Tensor
    real: torch.Tensor
    coordinates: torch.Tensor
    batch: torch.Tensor

    @property
    def mask(self) -> torch.Tensor | None:
        """What attention is to be called with: bool `[G, 1, 1, L]`, or None where no window is filled up."""
        return None if bool(self.real.all()) else self.real[:, None, None]

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """`[N, C]` -> `[G, L, C]`."""
        return features[self.index]

    def scatter(self, values: torch.Tensor) -> torch.Tensor:
        """`[G, L, C]` -> `[N, C]`, in the tokens' own order."""
        out = values.new_empty(int(self.real.sum()), values.shape[-1])
        out[self.index[self.real]] = values[self.real]
        return out


def windows(coordinates: torch.Tensor, frames: int | None) -> Windows:
    """Tokens at `coordinates` `[N, 5]` in windows of `frames` times each, one thing of the batch after the other.

    The first window begins at the smallest time of the whole batch. `frames` None: each thing is one window.
    """
    batch, time = coordinates[:, 0], coordinates[:, 1]
    if frames is None:
        group, local = batch, coordinates[:, 1:]
    else:
        time = time - time.min()
        group = batch * (time.max() // frames + 1) + time // frames
        local = torch.cat([(time % frames)[:, None], coordinates[:, 2:]], dim=1)
    return _sorted(group, local, batch)


def voxel_windows(coordinates: torch.Tensor, side: int, shift: int = 0) -> Windows:
    """Tokens at `coordinates` `[N, 5]` in cubes of `side` rows, columns and depths, whose borders are `shift` cells lower than at the
    multiples of `side`; see shifted windows (Liu et al., arXiv 2103.14030). All times are in one window."""
    cubes = torch.cat([coordinates[:, :1], (coordinates[:, 2:] + shift) // side], dim=1)
    _, group = torch.unique(cubes, dim=0, return_inverse=True)
    return _sorted(group, coordinates[:, 1:], coordinates[:, 0])


def _sorted(group: torch.Tensor, local: torch.Tensor, batch: torch.Tensor) -> Windows:
    """The windows of tokens whose numbers are `group` `[N]`, at `local` `[N, 4]`, of the things `batch` `[N]`."""
    _, group, counts = torch.unique(group, return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(order), device=order.device) - starts[group[order]]
    index = order.new_zeros(len(counts), int(counts.max()))
    real = torch.zeros_like(index, dtype=torch.bool)
    index[group[order], place] = order
    real[group[order], place] = True
    return Windows(index, real, local[index], batch[index[:, 0]])


def patchify(videos: Sequence[torch.Tensor], patch: tuple[int, int, int]) -> SparseTokens:
    """Videos `[C, T, H, W]`, which may differ in size, as patches (frames, rows, columns) in raster order.

    What does not fill a patch is left out: the last frames, and rows and columns on both sides alike. A single frame is filled up with
    frames of zeros.
    """
    features, coordinates = [], []
    for number, video in enumerate(videos):
        if video.ndim != 4:
            raise ValueError(f"a video must be [C, T, H, W], got shape {tuple(video.shape)}.")
        if video.shape[1] == 1:
            video = F.pad(video, (0, 0, 0, 0, 0, patch[0] - 1))
        grid = [size // step for size, step in zip(video.shape[1:], patch, strict=True)]
        if min(grid) < 1:
            raise ValueError(
                f"frames of {video.shape[2]}x{video.shape[3]}, {video.shape[1]} of them, do not fill a patch of {patch[1]}x{patch[2]} "
                f"pixels in {patch[0]} frames: give a larger or longer video, or one frame."
            )
        height, width = grid[1] * patch[1], grid[2] * patch[2]
        top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
        video = video[:, : grid[0] * patch[0], top : top + height, left : left + width]
        cells = (
            video.unflatten(3, (grid[2], patch[2])).unflatten(2, (grid[1], patch[1])).unflatten(1, (grid[0], patch[0]))
        )
        features.append(cells.permute(1, 3, 5, 2, 4, 6, 0).flatten(3).flatten(0, 2))
        coordinates.append(grid_coordinates(grid, number, video.device))
    return SparseTokens(torch.cat(features), torch.cat(coordinates))


def grid_coordinates(grid: Sequence[int], number: int = 0, device: torch.device | None = None) -> torch.Tensor:
    """int64 `[t * h * w, 5]`: the cells of a grid (t, h, w) in raster order, of thing `number` of a batch, with depth 0."""
    axes = [torch.arange(size, device=device) for size in grid]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    return F.pad(F.pad(cells, (1, 0), value=number), (0, 1))


def unpatchify(tokens: SparseTokens, patch: tuple[int, int, int]) -> list[torch.Tensor]:
    """Undoes `patchify`, for patches in raster order: videos `[C, T, H, W]`."""
    videos = []
    for number in tokens.coordinates[:, 0].unique().tolist():
        own = tokens.coordinates[:, 0] == number
        grid = [int(size) + 1 for size in tokens.coordinates[own, 1:4].amax(0)]
        features = tokens.features[own]
        if len(features) != grid[0] * grid[1] * grid[2]:
            raise ValueError(
                f"thing {number} of the batch has {len(features)} tokens, which do not fill its grid {tuple(grid)}."
            )
        cells = features.unflatten(1, (*patch, -1)).unflatten(0, grid)
        videos.append(cells.permute(6, 0, 3, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4).flatten(1, 2))
    return videos
