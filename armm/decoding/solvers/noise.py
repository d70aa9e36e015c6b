"""Standard normal noise whose source is an argument."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["GaussianNoise"]


class GaussianNoise:
    """Standard normal noise for a whole batch, draw after draw: `draw(n, C)` -> [B, n, C].

    source: one `torch.Generator` for the batch; a list with one per sample, in which case a sample's noise does not depend on the
    batch it is in; None for the global generator; or recorded noise, a sequence of tensors [B, ...] in the order of the draws.
    Draws are float32, made on the generator's device.
    """

    def __init__(
        self,
        source: torch.Generator | Sequence[torch.Generator] | Sequence[Tensor] | None,
        batch: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch, self.device = batch, torch.device(device)
        self.generators: list[torch.Generator] | None = None
        self.recorded: Iterator[Tensor] | None = None
        if isinstance(source, torch.Generator):
            self.generators = [source]
        elif source is not None:
            items: list[Any] = list(source)
            if items and all(isinstance(item, Tensor) for item in items):
                self.recorded = iter(items)
            elif not items or any(not isinstance(item, torch.Generator) for item in items):
                raise TypeError(
                    "noise must be a torch.Generator, a list of them with one per sample, a list of tensors, or None"
                )
            elif len(items) != batch:
                raise ValueError(f"got {len(items)} generators for a batch of {batch}; give one per sample")
            else:
                self.generators = items

    def draw(self, *shape: int) -> Tensor:
        """The next noise [B, *shape]."""
        if self.recorded is not None:
            noise = next(self.recorded, None)
            if noise is None:
                raise ValueError(f"the recorded noise is used up, and {[self.batch, *shape]} more is needed")
            if tuple(noise.shape) != (self.batch, *shape):
                raise ValueError(f"the next recorded noise must be {[self.batch, *shape]}, got {list(noise.shape)}")
            return noise.to(self.device)
        if self.generators is None:
            return torch.randn(self.batch, *shape, device=self.device)
        if len(self.generators) == 1:
            generator = self.generators[0]
            return self._moved(torch.randn(self.batch, *shape, generator=generator, device=generator.device))
        rows = [torch.randn(*shape, generator=item, device=item.device) for item in self.generators]
        return self._moved(torch.stack(rows))

    def _moved(self, noise: Tensor) -> Tensor:
        # The host need not wait for a copy to a GPU; it must for one from it.
        return noise.to(self.device, non_blocking=self.device.type == "cuda")
