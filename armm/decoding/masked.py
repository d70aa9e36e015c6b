"""Masked decoding of continuous tokens: each step draws some of the open positions, in a random order (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.annealing import StepAnnealing
from armm.decoding.base import StepCallback, check_guided, wake
from armm.decoding.guidance import Guidance
from armm.decoding.mask_schedule import check_schedule, check_steps, open_counts
from armm.decoding.solvers.diffusion import DiffusionSolver, Steps, check_timestep
from armm.decoding.solvers.noise import GaussianNoise

if TYPE_CHECKING:
    from armm.masked_latent_model import MaskedLatentModel

__all__ = [
    "LatentPhase",
    "MaskedLatentDecoding",
    "MaskedLatentOutput",
    "PlacedNoise",
    "SchedulerMixin",
    "draw_tokens",
    "random_order",
]


@dataclass
class MaskedLatentOutput:
    """tokens [B, N, C]; num_calls of encoder and decoder; steps done; head_calls: calls of the head in each of them. If recorded,
    before each step: which positions were open, bool [B, N], the tokens [B, N, C], and the hidden states [rows, N, D]. drawn_from
    [B, N, D]: the (conditional) hidden states that each token was drawn from."""

    tokens: Tensor
    num_calls: int = 0
    steps: int = 0
    drawn_from: Tensor | None = None
    head_calls: list[int] = field(default_factory=list)
    open: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class LatentPhase:
    """What the loop needs to know of a model that draws more than one kind of tokens: how many of them there are and how wide they
    are, the head that denoises them, and states(tokens [R, N, C], kept [R, K], rows) -> hidden [R, N, D]."""

    num_tokens: int
    token_channels: int
    head: torch.nn.Module
    states: Callable[[Tensor, Tensor, Condition], Tensor]


class PlacedNoise:
    """Recorded normal noise [B, 1 + M, N, C] by place: the start of every position, then the noise of the solver's steps."""

    def __init__(self, recorded: Tensor, batch: int, tokens: int, channels: int) -> None:
        if recorded.dim() != 4 or (recorded.shape[0], *recorded.shape[2:]) != (batch, tokens, channels):
            raise ValueError(
                f"recorded noise must be [{batch}, 1 + steps of the head, {tokens}, {channels}], got {list(recorded.shape)}"
            )
        self.recorded = recorded

    def at(self, entry: int, places: Tensor) -> Tensor:
        """Entry `entry` at the positions `places` [B, n]: [B, n, C]."""
        if entry >= self.recorded.shape[1]:
            raise ValueError(
                f"the recorded noise is of {self.recorded.shape[1] - 1} steps, step {entry} of the head needs more"
            )
        return _gather(self.recorded[:, entry].to(places.device), places)


class MaskedLatentDecoding(SchedulerMixin, ConfigMixin):
    """A fixed number of steps, each of which draws the tokens at the end of what is open of a random order. A component of a
    pipeline, like a scheduler.

    A head that denoises all tokens of a picture together draws all open positions at each step; those that stay open are drawn again.
    After step k of K, floor(open at first * schedule((k + 1) / K)) positions are still open, at least one and fewer than before.
    Guidance is a function of the share of the tokens that are done (tokens are its steps), but in the last step of all but one.

    Args:
        num_inference_steps: K.
        mask_schedule: "cos" or "linear".
        head_steps: steps of the head's solver, see `respaced_timesteps`.
        last_timestep: the noisiest timestep (of 1000) that the head is asked at; None is all of them. There a value is the predicted
            noise times many thousands: a head that had little training needs a limit, such as 950.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 64,
        mask_schedule: str = "cos",
        head_steps: int | str = 100,
        last_timestep: int | None = None,
    ) -> None:
        check_steps(num_inference_steps)
        check_schedule(mask_schedule)
        check_timestep(last_timestep)
        self.solver = DiffusionSolver()
        self.solver.tables(head_steps)

    def counts(self, first_open: int, num_inference_steps: int | None = None) -> list[int]:
        """Open positions before each step and after the last."""
        steps = check_steps(self.config.num_inference_steps if num_inference_steps is None else num_inference_steps)
        if steps > first_open:
            raise ValueError(
                f"num_inference_steps={steps} is more than the {first_open} tokens to draw: each step draws at least one"
            )
        return open_counts(first_open, steps, self.config.mask_schedule)

    def num_calls(self, grid: Sequence[int], num_inference_steps: int | None = None) -> int:
        """Calls of encoder and decoder; the same for every grid."""
        return self.config.num_inference_steps if num_inference_steps is None else num_inference_steps

    def head_schedule(
        self, steps: int, head_steps: Steps | None = None, annealing: StepAnnealing | None = None
    ) -> list[dict]:
        """For each of so many steps the solver's `num_steps` and `last_timestep`."""
        own = self.config.head_steps if head_steps is None else head_steps
        if annealing is None:
            return [{"num_steps": own, "last_timestep": self.config.last_timestep}] * steps
        return [{"num_steps": number, "last_timestep": annealing.last_timestep} for number in annealing.table(steps)]

    @torch.no_grad()
    def __call__(
        self,
        model: MaskedLatentModel | LatentPhase,
        condition: Condition,
        null_condition: Condition | None = None,
        *,
        num_inference_steps: int | None = None,
        head_steps: Steps | None = None,
        annealing: StepAnnealing | None = None,
        temperature: float = 1.0,
        guidance: Guidance | None = None,
        noise: GaussianNoise | torch.Generator | Sequence[torch.Generator] | Sequence[Tensor] | Tensor | None = None,
        orders: Tensor | None = None,
        known_tokens: Tensor | None = None,
        known_mask: Tensor | None = None,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record: bool = False,
    ) -> MaskedLatentOutput:
        """Generate the tokens of one picture per row of `condition`.

        null_condition: as many rows, needed with active guidance. num_inference_steps, head_steps: in place of the configured
        ones; annealing: says the steps of the head for each step instead. temperature: of the noise in the head's steps. noise: one
        generator, one per sample, or recorded noise: [B, 1 + M, N, C], see `PlacedNoise`, or a list in the order of the
        draws. orders: int64 [B, N], permutations of the
        positions; the last ones are drawn first. known_tokens [B, N, C], known_mask bool [B, N]: tokens that are given where the
        mask is True, in every row equally many. callback(step, tokens): after each step, 0 at open positions; it may return their
        replacement. interrupt: asked before every step, True ends the loop. record: keep what was open, the tokens and the states.
        """
        if isinstance(model, torch.nn.Module):
            wake(model)
        batch, length, channels = condition.batch, model.num_tokens, model.token_channels
        states = model.states if isinstance(model, LatentPhase) else model
        device = condition.embeds.device
        tokens = torch.zeros(batch, length, channels, device=device)
        is_open = torch.ones(batch, length, dtype=torch.bool, device=device)
        if known_tokens is not None or known_mask is not None:
            known_tokens, known_mask = check_known_tokens(known_tokens, known_mask, tokens)
            tokens, is_open = torch.where(known_mask[..., None], known_tokens, tokens), ~known_mask
        first_open = check_equal(is_open)
        counts = self.counts(first_open, num_inference_steps)
        steps = len(counts) - 1
        schedule = self.head_schedule(steps, head_steps, annealing)
        guided = check_guided(guidance, condition, null_condition)
        rows = concatenate([condition, null_condition]) if guided else condition  # type: ignore[list-item]
        copies = rows.batch // batch
        source: GaussianNoise | PlacedNoise
        if isinstance(noise, Tensor):
            source = PlacedNoise(noise, batch, length, channels)
        else:
            source = noise if isinstance(noise, GaussianNoise) else GaussianNoise(noise, batch, device)
        order = random_order(orders, source, is_open)

        output = MaskedLatentOutput(tokens)
        for step, (now, following) in enumerate(zip(counts, counts[1:], strict=False)):
            if interrupt is not None and interrupt():
                break
            kept = order[:, now:].sort(1).values
            places = order[:, following:now].sort(1).values
            is_open = torch.ones_like(is_open).scatter(1, kept, False)
            hidden = states(tokens.repeat(copies, 1, 1), kept.repeat(copies, 1), rows)
            if record:
                output.open.append(is_open)
                output.states.append(tokens.clone())
                output.hidden.append(hidden)
            if output.drawn_from is None:
                output.drawn_from = hidden.new_zeros(batch, length, hidden.shape[2])
            drawn_from = places[..., None].expand(-1, -1, hidden.shape[2])
            output.drawn_from = output.drawn_from.scatter(1, drawn_from, hidden[:batch].gather(1, drawn_from))
            joint = {"known": tokens, "known_mask": ~is_open[..., None]} if model.head.joint else {}
            if joint:
                places = torch.arange(length, device=device).expand(batch, -1)
            drawn = draw_tokens(
                self.solver,
                model.head,
                _gather(hidden, places.repeat(copies, 1)),
                places,
                source,
                channels,
                temperature,
                guidance if guided else None,
                (first_open - max(following, 1) - 1, first_open),
                **schedule[step],
                **joint,
            )
            if joint:
                tokens = torch.where(is_open[..., None], drawn, tokens)
            else:
                tokens = tokens.scatter(1, places[..., None].expand(-1, -1, channels), drawn)
            output.num_calls += 1
            output.steps = step + 1
            output.head_calls.append(self.solver.num_calls(**schedule[step]))
            if callback is not None:
                replacement = callback(step, tokens)
                if replacement is not None:
                    tokens = replacement.to(tokens).view_as(tokens)
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
        output.tokens = tokens
        return output


def draw_tokens(
    solver: DiffusionSolver,
    head: torch.nn.Module,
    hidden: Tensor,
    places: Tensor,
    source: GaussianNoise | PlacedNoise,
    channels: int,
    temperature: float,
    guidance: Guidance | None,
    progress: tuple[int, int],
    **steps: Any,
) -> Tensor:
    """Tokens [B, n, C] at `places` [B, n], denoised from noise given their hidden states [B, n, D], or with guidance [2B, n, D].

    progress: the step and the number of steps that the guidance is told. The head's variance is that of the conditional rows.
    """
    condition = head.condition(hidden)

    def noise(entry: int) -> Tensor:
        if isinstance(source, PlacedNoise):
            return source.at(entry, places)
        return source.draw(places.shape[1], channels)

    def predict(x: Tensor, call: int, timestep: int) -> tuple[Tensor, Tensor | None]:
        index = torch.full((1, 1), timestep, device=x.device)
        both = x if guidance is None else torch.cat([x, x])
        predicted, variance = head.split(head(both, index, condition))
        if guidance is None:
            return predicted, variance
        return guidance.combine(predicted, *progress), None if variance is None else variance.chunk(2)[0]

    return solver(predict, noise(0), step_noise=lambda call: noise(call + 1), temperature=temperature, **steps)


def random_order(orders: Tensor | None, source: GaussianNoise | PlacedNoise, is_open: Tensor) -> Tensor:
    """Permutations int64 [B, N] of the positions, the open ones first: those given, or random ones."""
    batch, length = is_open.shape
    if orders is None:
        if isinstance(source, PlacedNoise):
            raise ValueError("recorded noise needs the recorded orders too: pass orders")
        order = source.draw(length).argsort(1)
    else:
        order = orders.to(is_open.device)
        straight = torch.arange(length, device=order.device).expand(batch, -1)
        if (
            order.shape != is_open.shape
            or order.dtype != torch.int64
            or not torch.equal(order.sort(1).values, straight)
        ):
            raise ValueError(f"orders must be int64 [{batch}, {length}], in each row every position once")
    closed = (~is_open).gather(1, order)
    return order.gather(1, closed.int().argsort(dim=1, stable=True))


def check_known_tokens(tokens: Tensor | None, mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the device of `like` [B, N, C]; a ValueError unless they belong together and fit it."""
    if tokens is None or mask is None:
        raise ValueError("known_tokens and known_mask belong together: give both or neither")
    if tokens.shape != like.shape or not tokens.is_floating_point():
        raise ValueError(
            f"known_tokens must be floating point {list(like.shape)}, got {tokens.dtype} {list(tokens.shape)}"
        )
    if mask.shape != like.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(f"known_mask must be bool {list(like.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
    return tokens.to(like), mask.to(like.device)


def check_equal(is_open: Tensor) -> int:
    """How many positions are open in each row; a ValueError unless they are as many in all, and any."""
    numbers = sorted(set(is_open.sum(1).tolist()))
    if len(numbers) > 1:
        raise ValueError(
            f"all rows must have the same number of positions to draw, got {numbers}: call once for each mask"
        )
    if not numbers or numbers[0] == 0:
        raise ValueError("known_mask leaves nothing to draw")
    return numbers[0]


def _gather(values: Tensor, places: Tensor) -> Tensor:
    """Rows `places` [B, n] of [B, N, C]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))
