"""Next-scale decoding of continuous tokens: one call of the trunk for each map, many of the flow head (FlowAR, arXiv 2412.15205)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.decoding.annealing import StepAnnealing, solver_steps
from armm.decoding.base import wake
from armm.decoding.guidance import Guidance
from armm.decoding.solvers.flow import FlowSolver, time_index
from armm.decoding.solvers.noise import GaussianNoise

if TYPE_CHECKING:
    from armm.next_scale_flow_model import NextScaleFlowModel
    from armm.nn.positions import PositionTable

__all__ = ["NextScaleFlowDecoding", "NextScaleFlowOutput", "SchedulerMixin", "next_map", "teacher_maps"]

# callback(step, picture so far [B, H * W, C]) -> replacement of it, or None
MapCallback = Callable[[int, Tensor], "Tensor | None"]


@dataclass
class NextScaleFlowOutput:
    """latents [B, H * W, C] of the finest map (0 after an interruption); num_calls of the trunk and head_calls of the head; steps:
    maps really drawn. If recorded, the tokens [B, n, C] and the features [rows, n, D] of every map."""

    latents: Tensor
    num_calls: int = 0
    head_calls: int = 0
    steps: int = 0
    tokens: list[Tensor] | None = None
    features: list[Tensor] | None = None


def next_map(tokens: Tensor, side: int, finest: int) -> Tensor:
    """A square map [B, n, C] -> what is fed for a map of `side`, [B, side * side, C]: enlarged bicubically to the `finest` side
    (without antialiasing), then averaged."""
    size = round(tokens.shape[1] ** 0.5)
    picture = tokens.transpose(1, 2).unflatten(2, (size, size))
    picture = F.interpolate(picture, size=(finest, finest), mode="bicubic", align_corners=False)
    return F.interpolate(picture, size=(side, side), mode="area").flatten(2).transpose(1, 2)


def teacher_maps(latents: Tensor, scales: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A picture [B, H * W, C] -> its maps [B, N, C], averaged to every scale, and what is fed for all but the first [B, N - 1, C]."""
    finest = scales[-1]
    if latents.dim() != 3 or latents.shape[1] != finest * finest:
        raise ValueError(f"latents must be [batch, {finest * finest}, channels], got {tuple(latents.shape)}")
    picture = latents.transpose(1, 2).unflatten(2, (finest, finest))
    maps = [F.interpolate(picture, size=(side, side), mode="area").flatten(2).transpose(1, 2) for side in scales]
    inputs = [next_map(tokens, side, finest) for tokens, side in zip(maps, scales[1:], strict=False)]
    return torch.cat(maps, dim=1), torch.cat([latents[:, :0], *inputs], dim=1)


class NextScaleFlowDecoding(SchedulerMixin, ConfigMixin):
    """Maps of growing size, each denoised at once. A component of a pipeline, like a scheduler.

    Args:
        solver, grid: `method` and `grid` of the `FlowSolver`.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(self, solver: str = "euler", grid: str = "dense_end") -> None:
        self.solver = FlowSolver(solver, grid)

    def num_calls(self, scales: Sequence[int]) -> int:
        """Calls of the trunk for token maps of these sides."""
        return len(scales)

    @torch.no_grad()
    def __call__(
        self,
        model: NextScaleFlowModel,
        condition: Tensor,
        null_condition: Tensor | None = None,
        *,
        num_steps: int = 25,
        annealing: StepAnnealing | None = None,
        guidance: Guidance | None = None,
        noise: GaussianNoise | torch.Generator | Sequence[Any] | None = None,
        callback: MapCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record: bool = False,
    ) -> NextScaleFlowOutput:
        """Generate one picture per row of `condition` [B, D].

        null_condition: [B, D], needed with active guidance; a step of the guidance is a scale. num_steps: of the solver, for every
        scale, or as `annealing` says. noise: one generator, one per sample, or recorded normal noise [B, n, C], one for each scale.
        callback(step, picture so far, enlarged to the finest map): after every scale; may return a replacement of the picture, which
        is averaged to this scale. interrupt: asked before every scale, True ends the loop. record: keep tokens and features.
        """
        wake(model)
        scales, sizes = model.scales, model.sizes
        steps = solver_steps(len(scales), num_steps, annealing)
        for count in steps:
            self.solver.times(count)
        guided = guidance is not None and guidance.active
        _check(model, condition, null_condition if guided else condition)
        batch, device = condition.shape[0], model.latent_projection.weight.device
        if not isinstance(noise, GaussianNoise):
            noise = GaussianNoise(noise, batch, device)
        rows = torch.cat([condition, null_condition]) if guided else condition  # type: ignore[list-item]
        positions, places = model.positions(), model.coordinates()
        cache = model.trunk.allocate_cache(len(rows), model.num_tokens)
        empty = torch.zeros(batch, sizes[-1], model.latent_channels, device=device)
        output = NextScaleFlowOutput(empty, tokens=[] if record else None, features=[] if record else None)
        tokens, start, finest = empty, 0, scales[-1]
        for step, (side, size, count) in enumerate(zip(scales, sizes, steps, strict=True)):
            if interrupt is not None and interrupt():
                break
            if step == 0:
                embeds = model.start_tokens(rows)
            else:
                embeds = model.embed_codes(next_map(tokens, side, finest))
                embeds = torch.cat([embeds, embeds]) if guided else embeds
            hidden = model.trunk(embeds, positions=positions[start : start + size], cache=cache, modulation=rows)
            features = model.features(hidden, start)
            head_positions = model.head.positions(places[start : start + size])
            scale = guidance.scale_at(step, len(scales)) if guided and guidance is not None else 1.0
            combine = partial(guidance.combine, step=step, steps=len(scales)) if scale > 1.0 and guidance else None
            high = guidance.high if guidance is not None else 1.0
            tokens = self._draw(model, features, head_positions, count, noise, combine, high)
            output.num_calls += 1
            output.head_calls += self.solver.num_calls(count)
            output.steps = step + 1
            if record:
                output.tokens.append(tokens)
                output.features.append(features)
            if callback is not None:
                replacement = callback(step, next_map(tokens, finest, finest))
                if replacement is not None:
                    picture = replacement.transpose(1, 2).unflatten(2, model.grid)
                    tokens = F.interpolate(picture, size=(side, side), mode="area").flatten(2).transpose(1, 2)
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
            start += size
        if output.steps:
            output.latents = tokens if output.steps == len(scales) else next_map(tokens, finest, finest)
        return output

    def _draw(
        self,
        model: NextScaleFlowModel,
        features: Tensor,
        positions: PositionTable,
        steps: int,
        noise: GaussianNoise,
        combine: Callable[[Tensor], Tensor] | None,
        high: float,
    ) -> Tensor:
        """The next map [B, n, C] from features [rows, n, D]. combine: the guidance of flow times up to `high`."""
        batch, shape = noise.batch, (features.shape[1], model.latent_channels)
        index = time_index(self.solver.times(steps)).to(noise.device)

        def velocity(x: Tensor, call: int, time: float) -> Tensor:
            now, state = index[call : call + 1], x.float()
            if combine is None or time > high:
                return model.head(state, now, features[:batch], positions)
            return combine(model.head(torch.cat([state, state]), now, features, positions).to(x.dtype))

        start = noise.draw(*shape)
        return self.solver(velocity, start, num_steps=steps, step_noise=lambda call: noise.draw(*shape))


def _check(model: NextScaleFlowModel, condition: Tensor, null_condition: Tensor | None) -> None:
    if condition.dim() != 2 or condition.shape[1] != model.trunk.dim:
        raise ValueError(f"condition must be [batch, {model.trunk.dim}], got {tuple(condition.shape)}")
    if null_condition is None:
        raise ValueError("guidance needs a null_condition")
    if null_condition.shape != condition.shape:
        raise ValueError(f"null_condition is {tuple(null_condition.shape)}, but condition is {tuple(condition.shape)}")
