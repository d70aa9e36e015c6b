"""From logits to ids: filters in one fixed order, then a draw whose randomness is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# entries that top-p looks at first where it has many rows
FEW = 32


def top_k_filter(logits: Tensor, k: int) -> Tensor:
    """Keep the entries not below the k-th largest of their row (ties at the k-th value stay); the rest become -inf."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = torch.topk(logits, k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def top_p_filter(logits: Tensor, p: float, from_tail: bool = False) -> Tensor:
    """Keep the most probable entries up to and including the one at which their total probability exceeds p.

    from_tail: count from the other end instead, and drop the least probable entries while their total is at most 1 - p (but
    never the largest). The two differ where the total meets p exactly, and in rounding.
    """
    if p >= 1.0:
        return logits
    if from_tail:
        ordered, order = torch.sort(logits, dim=-1)
        drop = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
        drop[..., -1] = False
        return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))
    if logits.device.type == "cpu" and logits.numel() > logits.shape[-1] > 4 * FEW and not logits.requires_grad:
        found = _top_p_of_few(logits, p)
        if found is not None:
            return found
    ordered, order = torch.sort(logits, descending=True, dim=-1)
    total = ordered.softmax(dim=-1).cumsum(dim=-1)
    drop = total > p
    drop = torch.cat([torch.zeros_like(drop[..., :1]), drop[..., :-1]], dim=-1)
    return logits.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), float("-inf"))


def _top_p_of_few(logits: Tensor, p: float) -> Tensor | None:
    """`top_p_filter` of many rows on a CPU, where sorting takes long; None unless a few entries of each row make up p."""
    ordered, order = logits.topk(FEW, dim=-1)
    total = (ordered - logits.logsumexp(dim=-1, keepdim=True)).exp_().cumsum(dim=-1)
    if not bool((total[..., -1] > p).all()):
        return None
    ordered[..., 1:].masked_fill_(total[..., :-1] > p, float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, order, ordered)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the distributions that `logits` [..., V] stand for: -sum p log(p + 1e-10)."""
    probabilities = logits.softmax(dim=-1)
    return -(probabilities * (probabilities + 1e-10).log()).sum(dim=-1)


def entropy_top_k(value: Tensor, fewest: int = 1, most: int = 2000) -> Tensor:
    """How many candidates an entropy in nats calls for: few where the model is sure (PURE, arXiv 2503.11073).

    round(fewest + (most - fewest) / (1 + exp(5 - e))), e = the entropy within 0 .. 10; int64, halves go to even numbers.
    """
    share = 1.0 / (1.0 + torch.exp(5.0 - value.double().clamp(0.0, 10.0)))
    return (fewest + (most - fewest) * share).round().clamp(fewest, most).long()


def entropy_top_k_filter(logits: Tensor, fewest: int = 1, most: int = 2000, shared: bool = False) -> Tensor:
    """Top-k with the k that `entropy_top_k` gives each row of `logits` [..., V] (ties at the k-th value stay).

    shared: one k for all rows of a window [..., L, V], from the mean of their entropies.
    """
    value = entropy(logits)
    if shared:
        value = value.mean(dim=-1, keepdim=True).expand(value.shape)
    k = entropy_top_k(value, fewest, most).clamp(max=logits.shape[-1])
    largest = torch.topk(logits, min(most, logits.shape[-1]), dim=-1).values
    return logits.masked_fill(logits < largest.gather(-1, k.unsqueeze(-1) - 1), float("-inf"))


def repetition_filter(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] of ids flagged in `seen` [B, V] divided by the penalty where positive, else multiplied (arXiv 1909.05858)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first id at which the cumulative sum of `probabilities` [..., V] exceeds `uniform` [..., 1] of their total, in float64."""
    total = probabilities.double().cumsum(dim=-1)
    reached = total <= uniform.to(device=total.device, dtype=total.dtype) * total[..., -1:]
    return reached.sum(dim=-1).clamp(max=probabilities.shape[-1] - 1)


@dataclass
class Sampler:
    """Draws ids from logits: repetition penalty, entropy top-k, / max(temperature, 1e-5), top-k, top-p, softmax, draw.

    The draw is argmax(p / noise), which with `noise` from Exp(1) is an exact one from the filtered distribution. top_k=0 and
    top_p=1 switch the filters off; do_sample=False takes the largest logit. top_p_from_tail: how top-p counts, see
    `top_p_filter`. entropy_top_k: (fewest, most) candidates, see `entropy_top_k`; None = off. repetition_penalty: of ids that
    are in the sequence already, where the decoder keeps account of them (1 = off).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    do_sample: bool = True
    top_p_from_tail: bool = False
    entropy_top_k: tuple[int, int] | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k must be an integer >= 0 (0 = off), got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1 = off), got {self.top_p!r}")
        if self.entropy_top_k is not None:
            bounds = tuple(self.entropy_top_k)
            if len(bounds) != 2 or any(not isinstance(k, int) for k in bounds) or not 1 <= bounds[0] <= bounds[1]:
                raise ValueError(f"entropy_top_k must be None or (fewest, most), 1 <= fewest <= most, got {bounds!r}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be a finite number > 0 (1 = off), got {self.repetition_penalty!r}"
            )

    def filter(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Temperature and filters on float32 logits [..., V]; removed entries are -inf. seen: bool [..., V], ids so far."""
        if seen is not None and self.repetition_penalty != 1.0:
            logits = repetition_filter(logits, seen, self.repetition_penalty)
        if self.entropy_top_k is not None:
            logits = entropy_top_k_filter(logits, *self.entropy_top_k)
        if self.temperature != 1.0:
            logits = logits / max(self.temperature, 1e-5)
        return top_p_filter(top_k_filter(logits, self.top_k), self.top_p, self.top_p_from_tail)

    def __call__(self, logits: Tensor, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """Logits [..., V] and Exp(1) noise [..., V] -> ids [...]. Without noise the global generator is used.

        Noise [..., 1] is uniform numbers below 1 instead: see `inverse_cdf`.
        """
        if not self.do_sample:
            if seen is not None and self.repetition_penalty != 1.0:
                logits = repetition_filter(logits, seen, self.repetition_penalty)
            return logits.argmax(dim=-1)
        probabilities = self.filter(logits, seen).softmax(dim=-1)
        if noise is None:
            noise = torch.empty_like(probabilities).exponential_()
        if noise.shape[-1] == 1:
            return inverse_cdf(probabilities, noise)
        return probabilities.div_(noise).argmax(dim=-1)


class NoiseSource:
    """Exp(1) noise for one draw of a whole batch at a time: `draw(step)` -> float32 [B, V].

    source: one `torch.Generator` for the batch; a list with one per sample, in which case a sample's noise does not
    depend on the batch it is in; None for the global generator; or recorded noise [B, N, V], step i of which is used.
    """

    def __init__(
        self,
        source: torch.Generator | Sequence[torch.Generator] | Tensor | None,
        batch: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch, self.vocab_size, self.device = batch, vocab_size, torch.device(device)
        self.generators: list[torch.Generator] | None = None
        self.recorded: Tensor | None = None
        if isinstance(source, Tensor):
            if source.dim() != 3 or source.shape[0] != batch or source.shape[2] != vocab_size:
                raise ValueError(f"recorded noise must be [{batch}, steps, {vocab_size}], got {tuple(source.shape)}")
            self.recorded = source.to(device=self.device, dtype=torch.float32)
        elif isinstance(source, torch.Generator):
            self.generators = [source]
        elif source is not None:
            generators = list(source)
            if any(not isinstance(generator, torch.Generator) for generator in generators):
                raise TypeError("noise must be a torch.Generator, a list of them, a tensor or None")
            if len(generators) != batch:
                raise ValueError(f"got {len(generators)} generators for a batch of {batch}; give one per sample")
            self.generators = generators

    def draw_group(self, start: int, count: int) -> Tensor:
        """Noise [B, count, V] of the tokens `start` .. `start + count - 1`, counted in decode order."""
        return torch.stack([self.draw(step) for step in range(start, start + count)], dim=1)

    def draw(self, step: int) -> Tensor:
        if self.recorded is not None:
            if step >= self.recorded.shape[1]:
                raise ValueError(f"the recorded noise has {self.recorded.shape[1]} steps, step {step} was asked for")
            return self.recorded[:, step]
        if self.generators is None:
            return torch.empty(self.batch, self.vocab_size, device=self.device).exponential_()
        if len(self.generators) == 1:
            generator = self.generators[0]
            noise = torch.empty(self.batch, self.vocab_size, device=generator.device).exponential_(generator=generator)
            return self._moved(noise)
        rows = [
            torch.empty(self.vocab_size, device=generator.device).exponential_(generator=generator)
            for generator in self.generators
        ]
        return self._moved(torch.stack(rows))

    def _moved(self, noise: Tensor) -> Tensor:
        # The host need not wait for a copy to a GPU; it must for one from it.
        return noise.to(self.device, non_blocking=self.device.type == "cuda")


class UniformSource(NoiseSource):
    """Recorded uniform numbers [B, N], step i of which decides the i-th draw by `inverse_cdf`."""

    def __init__(self, uniforms: Tensor, device: torch.device | str = "cpu") -> None:
        if uniforms.dim() != 2 or (uniforms.numel() and not 0 <= float(uniforms.min()) <= float(uniforms.max()) < 1):
            raise ValueError(f"uniforms must be numbers in [0, 1) of shape [batch, steps], got {tuple(uniforms.shape)}")
        super().__init__(None, len(uniforms), 1, device)
        self.recorded = uniforms[..., None].to(device=self.device, dtype=torch.float64)
