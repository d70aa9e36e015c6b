"""A small model of the same codes that drafts for a large one (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.condition import Condition
from armm.decoding.speculative.chance import inverse_draw
from armm.decoding.speculative.draft import Draft, Drafting, DraftSource, Outcome, Window, check_window
from armm.decoding.speculative.stream import Target

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


@dataclass(frozen=True)
class DraftModel(DraftSource):
    """Drafts that `model` draws one after the other, with the sampler and the guidance of the call.

    Args:
        model: with the codes, the grid and the kind of condition of the model it drafts for; it makes its own condition from the
            same labels, text features or prompt.
        window: tokens that one call of the large model takes: window - 1 drafts, each of which is a call of the small one.
    """

    model: AutoregressiveModel = field(repr=False, compare=False)
    window: int = 5

    def __post_init__(self) -> None:
        check_window(self.window)

    def check(self, model: AutoregressiveModel) -> None:
        facts = ("vocab_size", "window", "sub_codes", "prefix_slots", "condition_type")
        differing = [name for name in facts if getattr(self.model, name) != getattr(model, name)]
        if differing:
            told = ", ".join(
                f"{name} {getattr(self.model, name)!r} instead of {getattr(model, name)!r}" for name in differing
            )
            raise ValueError(f"this draft model does not fit the model it is to draft for: it has {told}")

    def start(self, target: Target) -> Drafting:
        self.check(target.model)
        return _ModelDrafting(self, target)


class _ModelDrafting(Drafting):
    def __init__(self, source: DraftModel, target: Target) -> None:
        model = source.model
        condition = same_condition(model, target.condition)
        null = None
        if target.guided and model.condition_type is not None:
            null = model.null_condition(condition.batch, condition)
        elif target.guided and target.null_condition is not None:
            null = same_condition(model, target.null_condition)
        self.target = Target(
            model, condition, null, target.grid,
            guidance=target.guidance, low=target.low, high=target.high, sampler=target.sampler, spare=source.window + 1,
        )  # fmt: skip
        self.started: list[int] | None = None

    def observe(self, outcome: Outcome) -> None:
        if self.started is not None:  # forget what was drafted in vain
            self.target.rewind([first + kept for first, kept in zip(self.started, outcome.kept, strict=True)])
            self.started = None

    def select(self, rows: Tensor) -> None:
        self.target.select(rows)

    def propose(self, window: Window) -> Draft:
        target = self.target
        if not target.num_calls:
            target.prefill()
        batch = len(window.done)
        rows = torch.arange(batch, device=window.codes.device)
        token = window.codes[rows, torch.tensor(window.done, device=rows.device) - 1]
        self.started = list(target.cached)
        tokens, distributions = [], []
        for step in range(window.length):
            logits = target.forward(token[:, None])[:, 0]
            target.keep([1] * batch)
            if step == window.length - 1:
                break  # the last draft is only fed, so that all of them are there if all are taken
            if target.sampler.do_sample:
                q = logits.softmax(-1)
                token = inverse_draw(q, window.numbers.draft[:, step])
                distributions.append(q)
            else:
                token = logits.argmax(-1)
            tokens.append(token)
        return Draft(torch.stack(tokens, dim=1), torch.stack(distributions, dim=1) if distributions else None)


def same_condition(model: AutoregressiveModel, condition: Condition) -> Condition:
    """What `condition` was made from, as a condition of `model`."""
    if condition.origin is None:
        raise ValueError("this condition does not say what it was made from, so a draft model cannot be given the same")
    make = model.prefix_condition if "ids" in condition.origin else model.condition
    return make(**condition.origin)
