"""Medusa (arXiv 2401.10774): heads on the last hidden state that guess the tokens further on, and typical acceptance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armm.decoding.speculative.chance import inverse_draw
from armm.decoding.speculative.draft import Draft, Drafting, DraftSource, Outcome, Window
from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.tree import DraftTree
from armm.decoding.speculative.verify import Verifier

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel


class _Residual(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.ModuleList):
    """K heads: residual blocks and a linear layer each; head k guesses the token k + 1 places behind the one that the model's own head
    predicts from the same hidden state. Names of the parameters are the authors' (`{k}.{layer}.linear.*`, `{k}.{layers}.weight`).

    Args:
        dim: of the hidden state. vocab_size: of the model. num_heads: K. num_layers: residual blocks of a head; new ones pass their
        input on.
    """

    def __init__(self, dim: int, vocab_size: int, num_heads: int = 5, num_layers: int = 1) -> None:
        blocks = [_Residual(dim) for _ in range(num_heads * num_layers)]
        heads = [blocks[k * num_layers : (k + 1) * num_layers] for k in range(num_heads)]
        super().__init__(nn.Sequential(*own, nn.Linear(dim, vocab_size, bias=False)) for own in heads)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> MedusaHeads:
        """From published tensors; sizes are read off them."""
        heads = 1 + max(int(name.split(".")[0]) for name in state)
        layers = max(int(name.split(".")[1]) for name in state)
        vocab_size, dim = state[f"0.{layers}.weight"].shape
        module = cls(dim, vocab_size, heads, layers)
        module.load_state_dict(dict(state))
        return module.eval()

    @classmethod
    def from_single_file(cls, path: str | Path) -> MedusaHeads:
        """From the authors' `medusa_lm_head.pt`."""
        return cls.from_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., K, V]."""
        return torch.stack([head(hidden).float() for head in self], dim=-2)


def medusa_candidates(root: Tensor, logits: Tensor, tree: DraftTree) -> Tensor:
    """Tokens [B, n] of the nodes of a tree, `root` [B] first: a node takes the likeliest token number `rank` of the head of its depth,
    from logits [B, K, V]."""
    most = max(tree.ranks, default=0) + 1
    ranked = logits.topk(most, dim=-1).indices
    head = torch.tensor(tree.depths[1:], dtype=torch.long, device=root.device) - 1
    rank = torch.tensor(tree.ranks, dtype=torch.long, device=root.device)
    return torch.cat([root[:, None], ranked[:, head, rank]], dim=1)


@dataclass(frozen=True)
class MedusaDrafts(DraftSource):
    """Drafts of Medusa heads.

    Args:
        heads: trained on the model's hidden states.
        tree: shape of the drafts, at most as deep as there are heads; None: one continuation, drawn from the heads' distributions
            (filtered as the model's), which verification by the ratio makes exact.
    """

    heads: MedusaHeads = field(repr=False, compare=False)
    tree: DraftTree | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.tree is not None and self.tree.depth > len(self.heads):
            raise ValueError(f"the tree is {self.tree.depth} deep, there are {len(self.heads)} heads")

    def check(self, model: AutoregressiveModel) -> None:
        size, dim = self.heads[0][-1].weight.shape
        if (size, dim) != (model.vocab_size, model.trunk.dim):
            raise ValueError(
                f"heads of {size} tokens on states of {dim} do not fit a model of {model.vocab_size} tokens and {model.trunk.dim}"
            )
        if model.window > 1 or model.sub_codes > 1:
            raise ValueError("Medusa heads need models with one code a token; use JacobiWindow")

    def start(self, target: Target) -> Drafting:
        self.check(target.model)
        return _Medusa(self, target)

    def width(self, done: int, before: int, units: int) -> int:
        return min((len(self.heads) if self.tree is None else self.tree.depth) + 1, units - done)


class _Medusa(Drafting):
    def __init__(self, source: MedusaDrafts, target: Target) -> None:
        self.source, self.target = source, target
        self.hidden: Tensor | None = None  # [R, D]: the state that the last certain token was drawn from

    def observe(self, outcome: Outcome) -> None:
        rows = torch.arange(len(outcome.kept), device=outcome.tokens.device)
        last = outcome.path[rows, torch.tensor(outcome.kept, device=rows.device) - 1]
        hidden = outcome.hidden
        copies = len(hidden) // len(rows)  # type: ignore[arg-type]
        self.hidden = hidden[torch.arange(len(hidden), device=rows.device), last.repeat(copies)]  # type: ignore

    def select(self, rows: Tensor) -> None:
        batch = len(self.hidden) // 2 if self.target.guided else len(self.hidden)  # type: ignore[arg-type]
        self.hidden = self.hidden[torch.cat([rows, rows + batch])] if self.target.guided else self.hidden[rows]  # type: ignore

    def propose(self, window: Window) -> Draft:
        target, count = self.target, window.length - 1
        hidden = self.hidden if target.guided else self.hidden[: len(window.done)]  # type: ignore
        logits = self.source.heads(hidden)[..., target.low : target.high]
        units = target.unit_numbers([done for done in window.done], logits.shape[1])
        logits = target.finish(target.guide(logits[:, :, None], units), units)  # [B, K, 1, V]
        tree = self.source.tree
        if tree is not None:
            tokens = medusa_candidates(window.codes[:, 0, 0], logits[:, :, 0], tree)
            return Draft(tokens[:, 1:, None], None, tree)
        logits = logits[:, :count]
        if not target.sampler.do_sample:
            return Draft(logits.argmax(-1))
        q = logits.softmax(-1)
        return Draft(inverse_draw(q, window.numbers.draft[:, :count]), q)


@dataclass(frozen=True)
class TypicalVerifier(Verifier):
    """Typical acceptance: a draft is taken if p(x) > min(epsilon, alpha * exp(-entropy of p)). Lossy; what follows is drawn from p.

    epsilon = 1 and alpha so large that nothing passes is plain sampling.
    """

    epsilon: float = 0.09
    alpha: float = 0.3

    def __post_init__(self) -> None:
        for name in ("epsilon", "alpha"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)!r}")

    @property
    def loosening(self) -> float:
        return 1.0

    def acceptance(self, logits: Tensor, p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
        return (p.gather(-1, tokens[..., None]).squeeze(-1) > self.threshold(p)).to(p.dtype)

    def threshold(self, p: Tensor) -> Tensor:
        entropy = -(p * (p + 1e-5).log()).sum(-1)
        return (self.alpha * (-entropy).exp()).clamp(max=self.epsilon)

    def residual(self, p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
        return p


def medusa_posterior(
    tree: DraftTree, tokens: Tensor, logits: Tensor, verifier: TypicalVerifier, temperature: float = 1.0
) -> tuple[int, int]:
    """The authors' choice of a path among all: (number of the leaf in `tree.leaf_paths()`, drafts taken).

    tokens [n] and the model's logits [n, V] of every node. temperature 0 compares with the likeliest token; otherwise `verifier`
    judges every node at its parent. Of equally long paths the likeliest is taken, of all-rejected ones leaf 0. As in the authors' code
    a short path is filled up with token 0 after the last node, which may be taken too; the loop has no such tokens.
    """
    paths = tree.leaf_paths()
    longest = max(map(len, paths))
    nodes = torch.tensor([path + [-1] * (longest - len(path)) for path in paths])
    candidates, before = torch.cat([tokens, tokens.new_zeros(1)])[nodes][:, 1:], logits[nodes][:, :-1]
    if temperature == 0:
        taken = candidates == before.argmax(-1)
    else:
        p = (before / temperature).softmax(-1)
        mine = p.gather(-1, candidates[..., None])[..., 0]
        taken = mine > verifier.threshold(p)
    lengths = taken.long().cumprod(1).sum(1)
    best = int(lengths.max())
    if best == 0:
        return 0, 0
    if temperature == 0:
        return int(lengths.argmax()), best
    scores = mine[:, :best].log().sum(1).masked_fill(lengths < best, -float("inf"))
    return int(scores.argmax()), best
