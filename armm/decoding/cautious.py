"""Cautious next-token sampling of text (CNTP, arXiv 2507.03038): where the model is unsure, try several ways to go on.

At each step the entropy of the filtered distribution says how many continuations are tried, each drawn up to the next
punctuation; the one of the lowest perplexity is kept. It costs speed for quality, and how much depends on the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition
from armm.decoding.base import TokenStream, prefix_index, wake
from armm.decoding.sampling import NoiseSource, Sampler, entropy
from armm.decoding.text import TextOutput

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

PAUSES = (".", ",", "\n", "?", "!", ":", ";", ")", "]", "}")


@dataclass
class CautiousSampler(Sampler):
    """A sampler that tries 1 to `max_trials` continuations, more of them the more the entropy rises from `low` to `high` nats.

    pause_ids: the ids at which a continuation ends (of `PAUSES`, say).
    """

    max_trials: int = 10
    low: float = 0.01
    high: float = 1.5
    pause_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.max_trials, int) or self.max_trials < 1:
            raise ValueError(f"max_trials must be an integer >= 1 (1 = ordinary sampling), got {self.max_trials!r}")
        if not 0 <= self.low < self.high:
            raise ValueError(f"low and high must be entropies with 0 <= low < high, got {self.low!r} and {self.high!r}")
        if not self.do_sample:
            raise ValueError("do_sample=False has one continuation only: use a plain Sampler")

    def __call__(self, logits: Tensor, noise: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        raise ValueError(
            "a CautiousSampler draws whole continuations: use `decode_text_cautiously`, or a plain Sampler here"
        )

    def trials(self, value: float) -> int:
        """How many continuations an entropy in nats calls for."""
        share = min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)
        return int(1 + (self.max_trials - 1) * share)


@torch.no_grad()
def decode_text_cautiously(
    model: AutoregressiveModel,
    prefix: Condition,
    *,
    stop_ids: Sequence[int],
    max_tokens: int,
    sampler: CautiousSampler,
    noise: torch.Generator | Sequence[torch.Generator] | None = None,
    grid: Sequence[int] | None = None,
    allowed: Tensor | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> TextOutput:
    """Continue each row of `prefix` until one of `stop_ids`.

    noise: one generator for all rows, or one for each. allowed: bool [V], the ids that may be said. The text takes the positions
    behind the prefix's last. ids of the result are filled up with the first stop id; lengths are without it.
    """
    if not stop_ids or max_tokens < 1:
        raise ValueError(f"give at least one stop id and max_tokens >= 1, got {list(stop_ids)} and {max_tokens}")
    wake(model)
    generators: list[torch.Generator | None]
    if noise is None or isinstance(noise, torch.Generator):
        generators = [noise] * prefix.batch
    else:
        generators = list(noise)
        if len(generators) != prefix.batch:
            raise ValueError(f"got {len(generators)} generators for a batch of {prefix.batch}; give one per sample")
    texts, calls = [], 0
    for row in range(prefix.batch):
        writer = _Writer(model, prefix.select(slice(row, row + 1)), max_tokens, sampler, generators[row], grid, allowed)
        texts.append(writer.write(list(stop_ids), interrupt))
        calls += writer.stream.num_calls
    stop, device = int(stop_ids[0]), prefix.embeds.device
    lengths = [len(text) - (text[-1] in stop_ids) if text else 0 for text in texts]
    out = torch.full((prefix.batch, max(1, *map(len, texts), *lengths)), stop, dtype=torch.long, device=device)
    for row, text in enumerate(texts):
        out[row, : lengths[row]] = torch.tensor(text[: lengths[row]], dtype=torch.long, device=device)
    return TextOutput(out, torch.tensor(lengths, device=device), calls)


class _Writer:
    """One text."""

    def __init__(
        self,
        model: AutoregressiveModel,
        prefix: Condition,
        max_tokens: int,
        sampler: CautiousSampler,
        generator: torch.Generator | None,
        grid: Sequence[int] | None,
        allowed: Tensor | None,
    ) -> None:
        index = prefix_index(model, prefix)
        following = index[..., -1:] + torch.arange(1, max_tokens, device=index.device)
        positions = model.positions_for(index, grid), model.positions_for(following, grid)
        self.stream = TokenStream(model, prefix, *positions)
        self.model, self.sampler, self.generator = model, sampler, generator
        self.max_tokens, self.allowed = max_tokens, allowed

    def filtered(self, hidden: Tensor) -> Tensor:
        logits = self.model.logits(hidden)
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, float("-inf"))
        return self.sampler.filter(logits)

    def write(self, stop_ids: list[int], interrupt: Callable[[], bool] | None) -> list[int]:
        text: list[int] = []
        hidden = self.stream.prefill()
        while len(text) < self.max_tokens and not (interrupt is not None and interrupt()):
            trials = self.sampler.trials(float(entropy(self.filtered(hidden))))
            tokens, hidden = self.segment(hidden, len(text), trials, stop_ids)
            text += tokens
            if text[-1] in stop_ids:
                break
        return text

    def segment(self, hidden: Tensor, start: int, trials: int, stop_ids: list[int]) -> tuple[list[int], Tensor]:
        """The best of so many continuations behind `start` tokens of text, and the hidden state [1, D] behind it."""
        stream, device = self.stream, hidden.device
        if trials > 1:
            stream.cache.repeat(trials)
        states = hidden.expand(trials, -1)
        ends = torch.tensor([*stop_ids, *(self.sampler.pause_ids if trials > 1 else ())], device=device)
        going = torch.ones(trials, dtype=torch.bool, device=device)
        surprise, lengths = torch.zeros(trials, device=device), torch.zeros(trials, dtype=torch.long, device=device)
        behind, tokens = states.clone(), []
        limit = self.max_tokens - start if trials > 1 else 1
        noise = NoiseSource(self.generator, trials, self.model.vocab_size, device)
        for step in range(limit):
            logits = self.filtered(states)
            probabilities = logits.softmax(-1)
            token = (probabilities / noise.draw(step)).argmax(-1)
            surprise -= torch.where(going, probabilities.gather(1, token[:, None])[:, 0].log(), 0.0)
            lengths += going
            tokens.append(token)
            last = start + step + 1 == self.max_tokens
            if not last:
                states = stream.feed(token, start + step)
                behind = torch.where(going[:, None], states, behind)
            going = going & ~torch.isin(token, ends)
            if last or not bool(going.any()):
                break
        best = int((surprise / lengths).argmin())
        length = int(lengths[best])
        if trials > 1:
            stream.cache.reorder(torch.tensor([best], device=device))
        stream.cache.crop(stream.length + start + length)
        return torch.stack(tokens, dim=1)[best, :length].tolist(), behind[best : best + 1]
