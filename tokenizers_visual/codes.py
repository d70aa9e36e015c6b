"""What a visual tokenizer makes and a decoding strategy consumes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Codes:
    """Discrete ids or continuous latents of a batch of images or videos.

    Args:
        ids: int64 `[B, N]`, or `[B, N, D]` where a position carries several sub-codes. None for continuous codes.
        latents: float `[B, N, C]`. None for discrete codes.
        grid: `(t, h, w)` with `t * h * w == N` in raster order, or None for codes without a spatial layout.
        scales: for token maps of growing size one after another, their sides; the squares add up to N. `grid` is then None.
        mask: bool `[B, N]`, True where a code is real, for batches of unequal lengths.
    """

    ids: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    grid: tuple[int, int, int] | None = None
    mask: torch.Tensor | None = None
    scales: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.latents is None):
            raise ValueError("Codes hold either `ids` (discrete) or `latents` (continuous): give exactly one of them.")
        if self.ids is not None and (self.ids.dtype != torch.int64 or self.ids.ndim not in (2, 3)):
            raise ValueError(
                f"`ids` must be int64 of shape [B, N] or [B, N, D], got {self.ids.dtype} of shape {tuple(self.ids.shape)}."
            )
        if self.latents is not None and (not self.latents.is_floating_point() or self.latents.ndim != 3):
            raise ValueError(
                f"`latents` must be floating point of shape [B, N, C], got {self.latents.dtype} of shape "
                f"{tuple(self.latents.shape)}."
            )
        if self.mask is not None and (
            self.mask.dtype != torch.bool or self.mask.shape != (self.batch_size, self.num_tokens)
        ):
            raise ValueError(
                f"`mask` must be bool of shape [{self.batch_size}, {self.num_tokens}], True where a code is real, got "
                f"{self.mask.dtype} of shape {tuple(self.mask.shape)}."
            )
        if self.grid is not None:
            t, h, w = self.grid
            if t * h * w != self.num_tokens:
                raise ValueError(f"`grid` {self.grid} holds {t * h * w} tokens, but the codes have {self.num_tokens}.")
        if self.scales is not None:
            if self.grid is not None:
                raise ValueError("Codes have either one `grid` or several `scales`, not both.")
            tokens = sum(side * side for side in self.scales)
            if tokens != self.num_tokens:
                raise ValueError(
                    f"`scales` {self.scales} hold {tokens} tokens, but the codes have {self.num_tokens}."
                )

    @property
    def tensor(self) -> torch.Tensor:
        """The ids or the latents, whichever these codes hold."""
        return self.ids if self.ids is not None else self.latents  # type: ignore[return-value]

    @property
    def is_discrete(self) -> bool:
        return self.ids is not None

    @property
    def batch_size(self) -> int:
        return self.tensor.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.tensor.shape[1]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Codes:
        """The same codes on another device and, for latents, in another dtype."""
        return replace(
            self,
            ids=None if self.ids is None else self.ids.to(device),
            latents=None if self.latents is None else self.latents.to(device=device, dtype=dtype),
            mask=None if self.mask is None else self.mask.to(device),
        )

    def __getitem__(self, rows: slice) -> Codes:
        """A slice of the batch."""
        return replace(
            self,
            ids=None if self.ids is None else self.ids[rows],
            latents=None if self.latents is None else self.latents[rows],
            mask=None if self.mask is None else self.mask[rows],
        )
