"""Next-X prediction: a picture entity by entity, each denoised by flow matching inside the trunk (xAR, arXiv 2502.20388)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition, concatenate
from armm.decoding.annealing import StepAnnealing, solver_steps
from armm.decoding.base import Trunk, check_guided, wake
from armm.decoding.entities import EntityPlan
from armm.decoding.guidance import Guidance
from armm.decoding.solvers.flow import FlowSolver, time_index
from armm.decoding.solvers.noise import GaussianNoise

if TYPE_CHECKING:
    from armm.next_x_model import NextXModel
    from armm.nn.positions import PositionTable

__all__ = ["NextXDecoding", "NextXOutput", "SchedulerMixin"]

# callback(entity, picture so far [B, H * W, C]) -> replacement of it, or None
EntityCallback = Callable[[int, Tensor], "Tensor | None"]


@dataclass
class NextXOutput:
    """latents [B, H * W, C] in raster order; num_calls of the trunk; steps: entities really drawn (the rest are 0 after an
    interruption). If recorded, for each entity: states [calls, B, n, C] that the velocity was asked at, and velocities
    [calls, rows, n, C] that the model answered (rows: conditional, then null where guided)."""

    latents: Tensor
    num_calls: int = 0
    steps: int = 0
    states: list[Tensor] | None = None
    velocities: list[Tensor] | None = None


class NextXDecoding(SchedulerMixin, ConfigMixin):
    """Entities one after the other. A component of a pipeline, like a scheduler.

    Each entity starts as noise and takes so many calls of the trunk as the solver has steps. The first of them also brings the
    entity before it, now clean and at time 0, whose keys and values stay in the cache: it is stored once, noisy tokens never.

    Args:
        entity, size: what is predicted at a step, see `EntityPlan.of`.
        solver, last_time: `method` and `last_time` of the `FlowSolver`.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(
        self, entity: str = "cell", size: int = 8, solver: str = "euler_maruyama", last_time: float = 0.04
    ) -> None:
        self.solver = FlowSolver(solver, last_time=last_time)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size must be a positive integer, got {size!r}")
        EntityPlan.of(entity, (size, size), size)

    def plan(self, grid: Sequence[int]) -> EntityPlan:
        """The entities of a grid (height, width); a ValueError where they do not divide it."""
        return EntityPlan.of(self.config.entity, tuple(grid), self.config.size)

    def groups(self, grid: Sequence[int]) -> list[Tensor]:
        """The raster cells that each entity is the first to draw: of scales the first one draws all."""
        plan = self.plan(grid)
        if plan.factors:
            cells = torch.arange(plan.grid[0] * plan.grid[1])
            return [cells, *(cells[:0] for _ in plan.sizes[1:])]
        return list(plan.index.split(plan.sizes))

    def steps(self, grid: Sequence[int], num_steps: int = 50, annealing: StepAnnealing | None = None) -> list[int]:
        """Steps of the solver for every entity."""
        return solver_steps(len(self.plan(grid).sizes), num_steps, annealing)

    def num_calls(self, grid: Sequence[int], num_steps: int = 50, annealing: StepAnnealing | None = None) -> int:
        """Calls of the trunk for a picture."""
        return sum(self.solver.num_calls(steps) for steps in self.steps(grid, num_steps, annealing))

    def velocities(
        self,
        model: NextXModel,
        condition: Condition,
        tokens: Tensor,
        index: Tensor,
        plan: EntityPlan,
        positions: PositionTable | None = None,
        trunk: Trunk | None = None,
    ) -> Tensor:
        """Velocities [B, M, C] of noisy tokens, in one pass without a cache: an entity sees itself and those before it, noisy as
        they are (Noisy Context Learning, section 3.3).

        tokens: [B, M, C], the first E entities of `plan`. index: of their times, [E] or [B, E]. positions: the table of the whole
        plan, to spare making it. trunk: a compiled form of the model's.
        """
        words, length = condition.length, tokens.shape[1]
        if positions is None:
            positions = model.positions(plan.coordinates, plan.index, words)
        segments = plan.segments(tokens.device)[:length]
        index = index.to(tokens.device).expand(len(tokens), -1)
        mask = _visible(segments, condition)
        return model(tokens, index, condition, positions[: words + length], segments, mask, trunk)

    @torch.no_grad()
    def __call__(
        self,
        model: NextXModel,
        condition: Condition,
        null_condition: Condition | None = None,
        *,
        grid: Sequence[int] | None = None,
        num_steps: int = 50,
        annealing: StepAnnealing | None = None,
        guidance: Guidance | None = None,
        noise: GaussianNoise | torch.Generator | Sequence[Any] | None = None,
        callback: EntityCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        use_cache: bool = True,
        record: bool = False,
    ) -> NextXOutput:
        """Generate one picture per row of `condition`.

        null_condition: as many rows, needed with active guidance; a step of the guidance is an entity. grid: (height, width),
        default the model's. num_steps: of the solver, for every entity, or as `annealing` says. noise: one generator, one per
        sample, or recorded normal noise in the order of the draws: for every entity its start [B, n, C], then the noise of each
        step that adds some. callback(entity, picture so far): after every entity; may return a replacement of the picture, of
        which this entity's tokens count. interrupt: asked before every entity, True ends the loop. use_cache: False computes the
        context anew at every call, which gives the same. record: keep what the solver asked and the model answered.
        """
        wake(model)
        plan = self.plan(grid or model.grid)
        steps = self.steps(plan.grid, num_steps, annealing)
        for count in steps:
            self.solver.times(count)
        guided = check_guided(guidance, condition, null_condition)
        batch, words = condition.batch, condition.length
        device, channels = model.latent_projection.weight.device, model.latent_channels
        if not isinstance(noise, GaussianNoise):
            noise = GaussianNoise(noise, batch, device)
        stream = _EntityStream(self, model, plan, condition, null_condition if guided else None, use_cache)
        tokens = torch.zeros(batch, plan.num_tokens, channels, device=device)
        output = NextXOutput(tokens, 0, 0, [] if record else None, [] if record else None)
        start = 0
        for entity, (size, count) in enumerate(zip(plan.sizes, steps, strict=True)):
            if interrupt is not None and interrupt():
                break
            stop = start + size
            scale = guidance.scale_at(entity, len(steps)) if guided and guidance is not None else 1.0
            # before anything is in the cache, null rows that do not guide are not needed
            stream.begin(tokens[:, :start], size, scale > 1.0 or entity > 0 or words > 0)
            combine = partial(guidance.combine, step=entity, steps=len(steps)) if scale > 1.0 and guidance else None
            high = guidance.high if guidance is not None else 1.0
            tokens[:, start:stop] = self._draw(stream, count, noise, combine, high, output)
            output.num_calls += self.solver.num_calls(count)
            output.steps = entity + 1
            if callback is not None:
                replacement = callback(entity, _picture(plan, tokens, stop))
                if replacement is not None:
                    tokens[:, start:stop] = _taken(plan, replacement, start, stop)
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
            start = stop
        output.latents = _picture(plan, tokens, start)
        return output

    def _draw(
        self,
        stream: _EntityStream,
        steps: int,
        noise: GaussianNoise,
        combine: Callable[[Tensor], Tensor] | None,
        high: float,
        output: NextXOutput,
    ) -> Tensor:
        """The next entity [B, n, C]. combine: the guidance of flow times up to `high`. What `output` records is appended."""
        batch, shape = noise.batch, (stream.size, stream.model.latent_channels)
        index = time_index(self.solver.times(steps)).to(noise.device)
        asked: list[Tensor] = []
        answered: list[Tensor] = []

        def velocity(x: Tensor, call: int, time: float) -> Tensor:
            values = stream(x, index[call : call + 1])
            if output.states is not None:
                asked.append(x)
                answered.append(values)
            if combine is None or time > high:
                return values[:batch]
            return combine(values.to(x.dtype))

        start = noise.draw(*shape)
        drawn = self.solver(velocity, start, num_steps=steps, step_noise=lambda step: noise.draw(*shape))
        if output.states is not None and output.velocities is not None:
            output.states.append(torch.stack(asked))
            output.velocities.append(torch.stack(answered))
        return drawn


def _picture(plan: EntityPlan, tokens: Tensor, done: int) -> Tensor:
    """The picture so far [B, H * W, C]: of scales, the finest one that is done, enlarged to the grid."""
    if not plan.factors or done == plan.num_tokens or done == 0:
        return plan.join(tokens)
    level = next(k for k in range(len(plan.sizes)) if sum(plan.sizes[: k + 1]) == done)
    factor, size = plan.factors[level], plan.sizes[level]
    shape = (plan.grid[0] // factor, plan.grid[1] // factor)
    coarse = tokens[:, done - size : done].unflatten(1, shape)
    return coarse.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1, 2)


def _taken(plan: EntityPlan, picture: Tensor, start: int, stop: int) -> Tensor:
    return plan.split(picture)[:, start:stop]


def _visible(segments: Tensor, condition: Condition) -> Tensor:
    """bool, [T + M, T + M] or [B, 1, T + M, T + M]: words see each other, an entity sees all words, itself and those before it."""
    words = condition.length
    order = torch.nn.functional.pad(segments + 1, (words, 0))
    mask = order[:, None] >= order[None, :]
    if condition.mask is None:
        return mask
    real = torch.nn.functional.pad(condition.mask.bool(), (0, len(segments)), value=True)
    return (mask & real[:, None, :] | torch.eye(len(order), dtype=torch.bool, device=mask.device))[:, None]


class _EntityStream:
    """The calls of the trunk: rows, cache, and the clean entity that is still to be stored."""

    def __init__(
        self,
        decoding: NextXDecoding,
        model: NextXModel,
        plan: EntityPlan,
        condition: Condition,
        null_condition: Condition | None,
        use_cache: bool,
    ) -> None:
        self.decoding, self.model, self.plan = decoding, model, plan
        self.condition = condition
        self.rows = condition if null_condition is None else concatenate([condition, null_condition])
        self.words = self.rows.length
        self.positions = model.positions(plan.coordinates, plan.index, self.words)
        self.use_cache = use_cache
        self.cache = None
        if use_cache:
            self.cache = model.trunk.allocate_cache(self.rows.batch, self.words + plan.num_tokens)
        self.real = None
        if self.rows.mask is not None:
            self.real = torch.nn.functional.pad(self.rows.mask.bool(), (0, plan.num_tokens), value=True)

    def begin(self, clean: Tensor, size: int, all_rows: bool) -> None:
        """A new entity of `size` tokens follows the `clean` ones [B, M, C]. all_rows: False runs the conditional rows only."""
        self.clean, self.size, self.pending = clean, size, True
        self.active = self.rows if all_rows else self.condition

    def __call__(self, x: Tensor, index: Tensor) -> Tensor:
        """Velocity [rows, n, C] of the noisy entity `x` [B, n, C] at the time with this `index` [1]."""
        model, rows = self.model, self.active
        noisy = _repeat(x.float(), rows.batch)
        if not self.use_cache:
            tokens = torch.cat([_repeat(self.clean, rows.batch), noisy], dim=1)
            done = int(self.plan.segments()[self.clean.shape[1]]) if self.clean.shape[1] else 0
            times = torch.nn.functional.pad(index, (done, 0))
            return self.decoding.velocities(model, rows, tokens, times, self.plan, self.positions)[:, -self.size :]
        embeds = model.embed(noisy)
        end = self.words + self.clean.shape[1]
        kept = self.cache.length
        fresh = end - kept if self.pending else 0  # words, or the entity before, clean: seen for the first time
        self.pending = False
        mask = segments = None
        if fresh:
            clean = rows.embeds if kept == 0 and self.words else embeds[:, :0]
            latents = self.clean[:, max(kept - self.words, 0) :]
            embeds = torch.cat([clean, model.embed(_repeat(latents, rows.batch)), embeds], dim=1)
            index = torch.nn.functional.pad(index, (1, 0))
            segments = torch.arange(2, device=index.device).repeat_interleave(
                torch.tensor([fresh, self.size], device=index.device), output_size=fresh + self.size
            )
            keys = torch.nn.functional.pad(segments, (kept, 0))
            mask = segments[:, None] >= keys[None, :]
        if self.real is not None:
            own = self.real[: rows.batch, None, None, : end + self.size]
            if mask is None:
                mask = own
            else:
                queries = torch.arange(kept, end + self.size, device=own.device)
                itself = queries[:, None] == torch.arange(end + self.size, device=own.device)
                mask = own & mask | itself
        hidden = model.trunk(
            embeds,
            positions=self.positions[end - fresh : end + self.size],
            mask=mask,
            cache=self.cache if len(embeds) == self.cache.batch else None,
            modulation=model.modulation(rows.vector, index),
            segments=segments,
            discard=self.size,
        )
        return model.velocity(hidden[:, fresh:])


def _repeat(x: Tensor, rows: int) -> Tensor:
    """The same tokens for the conditional and the null rows."""
    return x if len(x) == rows else x.repeat(rows // len(x), 1, 1)
