"""Verifiers: which drafts are taken, and what stands in the place of the first that is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armm.decoding.speculative.chance import Numbers, inverse_draw
from armm.decoding.speculative.draft import Draft
from armm.decoding.speculative.tree import DraftTree

if TYPE_CHECKING:
    from armm.decoding.speculative.stream import Target
    from armm.model import AutoregressiveModel


@dataclass
class Evidence:
    """What a verifier judges.

    logits [B, L, S, V]: filtered, of what follows every token of the window; place 0 is the last certain token, place i draft i - 1.
    lengths: tokens of each row's window (drafts behind are not looked at). forced: int64 [B, L, S], what is known to follow, or -1.
    noise [B, L, S, V]: Exp(1) of the places, for verifiers with `wants_noise`. all_draws: draw at every place, not only where needed.
    coupled: let these draws be the drafts with the greatest probability that leaves them draws from their distributions.
    """

    logits: Tensor
    draft: Draft | None
    lengths: Sequence[int]
    numbers: Numbers
    do_sample: bool = True
    forced: Tensor | None = None
    noise: Tensor | None = None
    all_draws: bool = False
    coupled: bool = False


@dataclass
class Verdict:
    """accepted: int64 [B], drafts that are taken. path: int64 [B, K], their places in the window after place 0. next: int64 [B, S],
    the token after them. draws: int64 [B, L, S], a draw at every place (where asked for). probabilities [B, L, S, V].
    acceptance: [B, n, S], the acceptance probabilities of a chain (None in a tree, and where tokens are compared)."""

    accepted: Tensor
    path: Tensor
    next: Tensor
    draws: Tensor | None
    probabilities: Tensor
    acceptance: Tensor | None = None


class Verifier:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192): draft x, drawn from q, is taken with probability
    min(1, p(x) / q(x)); in its place stands otherwise a draw from max(p - q, 0). The result is distributed as a draw from p.

    Slots of a unit are independent given what came before: each is kept or redrawn by itself, and the unit counts as taken if all are.
    Subclasses loosen `acceptance`.
    """

    wants_noise = False

    @property
    def loosening(self) -> float:
        """How far results may be from plain sampling, in the verifier's own unit; 0 is exact."""
        return 0.0

    def check(self, model: AutoregressiveModel, codebook: Tensor | None) -> None:  # noqa: B027
        """Raises ValueError where it cannot judge codes of `model`."""

    def prepare(self, target: Target, codebook: Tensor | None) -> Verifier:
        """Bound to a generation; codebook [V, C]: the vectors of the tokenizer's codes, where it has any."""
        return self

    # What a verifier may change.

    def acceptance(self, logits: Tensor, p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
        """Probability [...] of taking `tokens` [...], for filtered logits and p, q [..., V]."""
        return plain_ratio(p, q, tokens)

    def residual(self, p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
        """Weights [..., V] of the draw that replaces a rejected token; not normalised."""
        if q is None:
            return p.scatter(-1, tokens[..., None], 0.0)
        return (p - q).clamp(min=0)

    def keeps_greedily(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """Without sampling: whether `tokens` [...] are taken."""
        return tokens == logits.argmax(-1)

    # What is the same for all.

    def __call__(self, evidence: Evidence) -> Verdict:
        logits, draft = evidence.logits, evidence.draft
        if evidence.do_sample:
            p = logits.softmax(-1)
        else:
            p = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        draws = None
        if self.wants_noise or (evidence.all_draws and not self._couples(evidence)):
            draws = self._draws(evidence, p)
        if draft is None or draft.tokens.shape[1] == 0:
            rows = len(logits)
            nothing = torch.zeros(rows, dtype=torch.long, device=logits.device)
            if draws is None and evidence.all_draws:
                draws = self._draws(evidence, p)
            following = draws[:, 0] if draws is not None else self._draws(evidence, p, nothing)
            return Verdict(nothing, nothing[:, None], following, draws, p)
        judge = self._judge_chain if draft.tree is None else self._judge_tree
        return judge(evidence, draft, p, draws)

    def _draws(self, evidence: Evidence, p: Tensor, places: Tensor | None = None) -> Tensor:
        """Draws [B, L, S] from every place of a window, or [B, S] from one place of each row."""
        numbers = evidence.numbers.draw
        if places is not None:
            rows = torch.arange(len(p), device=p.device)
            p = p[rows, places]
            numbers = numbers[rows, places]
        if not evidence.do_sample:
            draws = p.argmax(-1)
        elif self.wants_noise:
            noise = evidence.noise if places is None else evidence.noise[rows, places]
            draws = (p / noise).argmax(-1)
        else:
            draws = inverse_draw(p, numbers)
        if evidence.forced is None:
            return draws
        forced = evidence.forced if places is None else evidence.forced[rows, places]
        return torch.where(forced >= 0, forced, draws)

    def _keeps(self, evidence: Evidence, draft: Draft, p: Tensor, draws: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Whether every draft of a chain is taken [B, n, S], each judged by itself; and the probabilities of that."""
        count = draft.tokens.shape[1]
        tokens = draft.tokens.clamp(0, p.shape[-1] - 1)
        logits, acceptance = evidence.logits[:, :count], None
        if self.wants_noise:
            keeps = tokens == draws[:, :count]  # type: ignore[index]
        elif not evidence.do_sample:
            keeps = self.keeps_greedily(logits, tokens)
        else:
            acceptance = self.acceptance(logits, p[:, :count], draft.q, tokens)
            keeps = evidence.numbers.accept[:, 1 : count + 1] < acceptance
        if evidence.forced is not None:
            forced = evidence.forced[:, :count]
            keeps = torch.where(forced >= 0, draft.tokens == forced, keeps)
        return keeps, acceptance

    def _couples(self, evidence: Evidence) -> bool:
        draft = evidence.draft
        return (
            evidence.coupled
            and evidence.do_sample
            and not self.wants_noise
            and draft is not None
            and draft.tree is None
        )

    def _coupled(
        self, evidence: Evidence, draft: Draft, p: Tensor, keeps: Tensor, within: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What stands at all places of a chain [B, L, S] if the first draft that is not taken stands there, and draws from p [B, L, S].

        Every draft is kept where exact verification would take it and drawn from what it left otherwise, each place by itself: that is
        a draw from p, and the draft again as often as can be (MC-SJD, arXiv 2510.24211). keeps: the drafts that this verifier takes.
        """
        count = draft.tokens.shape[1]
        tokens, mine = draft.tokens.clamp(0, p.shape[-1] - 1), p[:, :count]
        exact = type(self).acceptance is Verifier.acceptance
        stays = keeps if exact else evidence.numbers.accept[:, 1 : count + 1] < plain_ratio(mine, draft.q, tokens)
        weights = _nonzero(Verifier.residual(self, mine, draft.q, tokens), mine)
        if within is not None:
            weights = torch.where(within[..., None, None], weights, mine)
            keeps, stays = keeps & within[..., None], stays & within[..., None]
        instead, behind = inverse_draw(torch.cat([weights, p[:, count:]], dim=1), evidence.numbers.draw).split(
            [count, 1], 1
        )
        draws = torch.cat([torch.where(stays, draft.tokens, instead), behind], dim=1)
        fronts = draws if exact else torch.cat([torch.where(keeps, draft.tokens, instead), behind], dim=1)
        if evidence.forced is None:
            return fronts, draws
        given = evidence.forced >= 0
        return torch.where(given, evidence.forced, fronts), torch.where(given, evidence.forced, draws)

    def _judge_chain(self, evidence: Evidence, draft: Draft, p: Tensor, draws: Tensor | None) -> Verdict:
        count = draft.tokens.shape[1]
        keeps, acceptance = self._keeps(evidence, draft, p, draws)
        drafts, within = None, None
        whole = keeps.all(-1) if keeps.shape[-1] > 1 else keeps[..., 0]
        if min(evidence.lengths) <= count:
            drafts = torch.tensor(list(evidence.lengths), device=p.device) - 1
            within = torch.arange(count, device=p.device) < drafts[:, None]
            whole = whole & within
        accepted = whole.long().cumprod(1).sum(1)
        path = torch.arange(count + 1, device=p.device).expand(len(p), -1)
        rows = torch.arange(len(p), device=p.device)
        if self._couples(evidence):
            fronts, draws = self._coupled(evidence, draft, p, keeps, within)
            if type(self).residual is Verifier.residual:
                following = fronts[rows, accepted]
                return Verdict(accepted, path, following, draws, p, acceptance)
        following = self._draws(evidence, p, accepted) if draws is None else draws[rows, accepted]
        drafts = torch.full_like(accepted, count) if drafts is None else drafts
        place = accepted.clamp(max=count - 1)
        rejected = (accepted < drafts)[:, None] & ~keeps[rows, place]
        if evidence.do_sample and not self.wants_noise:
            tokens = draft.tokens[rows, place]
            target = p[rows, place]
            q = None if draft.q is None else draft.q[rows, place]
            weights = self.residual(target, q, tokens.clamp(0, p.shape[-1] - 1))
            instead = inverse_draw(_nonzero(weights, target), evidence.numbers.residual)
            if evidence.forced is not None:
                forced = evidence.forced[rows, place]
                instead = torch.where(forced >= 0, forced, instead)
            kept = torch.where((accepted < drafts)[:, None], tokens, following)
            following = torch.where(rejected, instead, kept)
        return Verdict(accepted, path, following, draws, p, acceptance)

    def _judge_tree(self, evidence: Evidence, draft: Draft, p: Tensor, draws: Tensor | None) -> Verdict:
        """From the root down: the children of a node are tested one after the other, each against what the earlier ones left of p."""
        tree: DraftTree = draft.tree  # type: ignore[assignment]
        if draft.tokens.shape[2] > 1 or draft.q is not None:
            raise ValueError("trees hold drafts of one slot without distributions")
        batch, device = len(p), p.device
        rows, table = torch.arange(batch, device=device), tree.child_table().to(device)
        tokens = torch.cat([draft.tokens[:, :1], draft.tokens], dim=1)[..., 0]  # by place; the root's is not looked at
        lengths = torch.tensor(list(evidence.lengths), device=device)
        node = torch.zeros(batch, dtype=torch.long, device=device)
        accepted, tests, alive = node.clone(), node.clone(), torch.ones(batch, dtype=torch.bool, device=device)
        path, left = [node], p[:, 0, 0]
        for depth in range(tree.depth):
            alive = alive & (accepted == depth) & (depth + 1 < lengths)
            current = torch.where(alive[:, None], p[rows, node, 0], left)
            found = torch.zeros_like(alive)
            chosen = node
            for number in range(table.shape[1]):
                child = table[node, number]
                open_ = alive & ~found & (child >= 0)
                token = tokens[rows, child.clamp(min=0)]
                hit = self._hits(evidence, node, token, current, draws, tests) & open_
                tests = tests + open_
                if evidence.do_sample and not self.wants_noise:
                    shrunk = self.residual(current, None, token.clamp(0, p.shape[-1] - 1))
                    shrunk = _nonzero(shrunk, current)
                    shrunk = shrunk / shrunk.sum(-1, keepdim=True)
                    current = torch.where((open_ & ~hit)[:, None], shrunk, current)
                chosen, found = torch.where(hit, child, chosen), found | hit
            # a row that found a child goes on from it; of the others, what its last tests left is drawn from
            left = torch.where((alive & found)[:, None], p[rows, chosen, 0], current)
            accepted, node = accepted + found, chosen
            path.append(node)
            if device.type == "cpu" and not bool(found.any()):
                break
        if self.wants_noise and draws is not None:
            following = draws[rows, node, 0]
        elif not evidence.do_sample:
            following = left.argmax(-1)
        else:
            number = torch.where(lengths > 1, evidence.numbers.residual[:, 0], evidence.numbers.draw[:, 0, 0])
            following = inverse_draw(left, number)
        if evidence.forced is not None:
            forced = evidence.forced[rows, node, 0]
            following = torch.where(forced >= 0, forced, following)
        return Verdict(accepted, torch.stack(path, dim=1), following[:, None], draws, p)

    def _hits(
        self, evidence: Evidence, node: Tensor, token: Tensor, current: Tensor, draws: Tensor | None, tests: Tensor
    ) -> Tensor:
        rows = torch.arange(len(node), device=node.device)
        inside = token.clamp(0, current.shape[-1] - 1)
        if self.wants_noise:
            hit = token == draws[rows, node, 0]  # type: ignore[index]
        elif not evidence.do_sample:
            hit = self.keeps_greedily(evidence.logits[rows, node, 0], inside)
        else:
            numbers = evidence.numbers.accept
            number = numbers[rows, (1 + tests).clamp(max=numbers.shape[1] - 1), 0]
            hit = number < self.acceptance(evidence.logits[rows, node, 0], current, None, inside)
        if evidence.forced is not None:
            forced = evidence.forced[rows, node, 0]
            hit = torch.where(forced >= 0, token == forced, hit)
        return hit


class MatchVerifier(Verifier):
    """A draft is taken if it is what would be drawn at its place, with noise that belongs to the place.

    Token for token the result of plain decoding with the same generator; fewer drafts are taken than by the ratio (of two draws from p and
    q with the same noise, at least (1 - d) / (1 + d) agree, where d is their total variation; the ratio takes 1 - d).
    """

    wants_noise = True


def plain_ratio(p: Tensor, q: Tensor | None, tokens: Tensor) -> Tensor:
    """p(x) / q(x), at most 1, for tokens [...] and p, q [..., V]; q = None is all of it at the token. 0 / 0 counts as 0."""
    mine = p.gather(-1, tokens[..., None]).squeeze(-1)
    if q is None:
        return mine
    return (mine / q.gather(-1, tokens[..., None]).squeeze(-1)).nan_to_num(nan=0.0).clamp(max=1.0)


def _nonzero(weights: Tensor, instead: Tensor) -> Tensor:
    """`weights`, or `instead` in rows where rounding left none."""
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, instead)
