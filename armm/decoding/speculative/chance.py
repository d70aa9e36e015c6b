"""Randomness of speculative decoding: uniform numbers of one iteration, and noise that belongs to a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from armm.decoding.sampling import NoiseSource


@dataclass
class Numbers:
    """Uniform numbers in [0, 1) of one iteration, float64. Which of them are used depends on draft source and verifier.

    draft, draw [B, L, S]: for the drafts, and for the draws from the L distributions of the window. accept [B, L, S]: number i is
    compared with the acceptance probability of the token at place i of the window (place 0 is unused); in a tree, they are used one
    after the other in the order of the tests, from place 1 on. residual [B, S]: for the draw after a rejection.
    """

    draft: Tensor
    draw: Tensor
    accept: Tensor
    residual: Tensor


class WindowNumbers:
    """Numbers for the rows that still run. A row's numbers depend on its own window only, so with one generator a row it is the same
    alone as in a batch.

    source: see `NoiseSource`; recorded numbers are a `Numbers` for every iteration.
    """

    def __init__(
        self,
        source: torch.Generator | Sequence[torch.Generator] | Sequence[Numbers] | None,
        batch: int,
        slots: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.slots, self.device = slots, torch.device(device)
        self.generators: list[torch.Generator | None] = [None] * batch
        self.recorded: list[Numbers] | None = None
        if isinstance(source, Tensor):
            raise ValueError(
                "recorded noise belongs to plain sampling; speculation takes it with the rule 'match' only"
            )
        if isinstance(source, torch.Generator):
            self.generators = [source] * batch
        elif source is not None:
            items = list(source)
            if items and all(isinstance(item, Numbers) for item in items):
                self.recorded = items  # type: ignore[assignment]
            elif not all(isinstance(item, torch.Generator) for item in items):
                raise TypeError("noise must be a torch.Generator, a list of them, or None")
            elif len(items) != batch:
                raise ValueError(f"got {len(items)} generators for a batch of {batch}; give one per sample")
            else:
                self.generators = items  # type: ignore[assignment]

    def draw(self, iteration: int, rows: Sequence[int], lengths: Sequence[int]) -> Numbers:
        """Numbers for `rows` (of the whole batch), whose windows have these `lengths`; the numbers behind a row's end are zero."""
        if self.recorded is not None:
            if iteration >= len(self.recorded):
                raise ValueError(f"{len(self.recorded)} iterations were recorded, iteration {iteration} was asked for")
            known, longest = self.recorded[iteration], max(lengths)
            return Numbers(known.draft[:, :longest], known.draw[:, :longest], known.accept[:, :longest], known.residual)
        longest = max(lengths)
        if len({id(self.generators[row]) for row in rows}) == 1 and len(rows) > 1:
            generator = self.generators[rows[0]]  # one for all: rows depend on each other anyway
            device = self.device if generator is None else generator.device
            shape = (len(rows), 3 * longest + 1, self.slots)
            numbers = torch.rand(shape, dtype=torch.float64, device=device, generator=generator).to(self.device)
            blocks = numbers[:, :-1].view(len(rows), 3, longest, self.slots)
            return Numbers(blocks[:, 0], blocks[:, 1], blocks[:, 2], numbers[:, -1])
        parts = []
        for row, length in zip(rows, lengths, strict=True):
            generator = self.generators[row]
            device = self.device if generator is None else generator.device
            numbers = torch.rand(3 * length + 1, self.slots, dtype=torch.float64, device=device, generator=generator)
            block = numbers[:-1].view(3, length, self.slots)
            if length < longest:
                block = torch.nn.functional.pad(block, (0, 0, 0, longest - length))
            parts.append((block, numbers[-1]))
        blocks = torch.stack([block for block, _ in parts]).to(self.device)
        residual = torch.stack([number for _, number in parts]).to(self.device)
        return Numbers(blocks[:, 0], blocks[:, 1], blocks[:, 2], residual)


class PlaceNoise:
    """Exp(1) noise of every place of a sequence, the one that plain decoding of `source` draws with there.

    Places are drawn in order when they are first asked for, and forgotten once no row needs them any more.
    """

    def __init__(self, source: NoiseSource, slots: int, places: int, draws: int = 1) -> None:
        """draws: how often plain decoding asks `source` at one place."""
        self.source, self.slots, self.places, self.draws = source, slots, places, draws
        self.kept: list[Tensor] = []
        self.first = 0

    def window(self, rows: Sequence[int], starts: Sequence[int], depths: Tensor) -> Tensor:
        """Noise [B, n, S, V] for `rows` at the places starts[b] + depths[b or 0, i]; places behind the end repeat the last one."""
        last = min(max(starts) + int(depths.max()), self.places - 1)
        while self.first + len(self.kept) <= last:
            noise = self.source.draw_group((self.first + len(self.kept)) * self.draws, self.draws)
            self.kept.append(noise.view(len(noise), self.slots, -1))
        while self.first < min(starts):
            self.kept.pop(0)
            self.first += 1
        noise = torch.stack(self.kept, dim=1)
        device = noise.device
        place = torch.tensor(list(starts), device=device)[:, None] + depths.to(device) - self.first
        row = torch.tensor(list(rows), device=device)[:, None]
        return noise[row, place.clamp(max=len(self.kept) - 1)]


def inverse_draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """Ids [...] from non-negative `weights` [..., V] and uniform numbers [...]: the first id whose cumulated weight exceeds
    u * total (float64)."""
    total = weights.double().cumsum(-1)
    wanted = uniform.to(total.dtype) * total[..., -1]
    return torch.searchsorted(total, wanted.unsqueeze(-1), right=True).squeeze(-1).clamp_(max=weights.shape[-1] - 1)
