"""Masked decoding in two phases: a small picture of pivots, then the full one around them (Hi-MAR, arXiv 2505.20288)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition
from armm.decoding.annealing import StepAnnealing
from armm.decoding.base import StepCallback, wake
from armm.decoding.guidance import Guidance
from armm.decoding.mask_schedule import check_schedule, check_steps
from armm.decoding.masked import LatentPhase, MaskedLatentDecoding, MaskedLatentOutput
from armm.decoding.solvers.diffusion import Steps
from armm.decoding.solvers.noise import GaussianNoise

if TYPE_CHECKING:
    from armm.pivot_latent_model import PivotLatentModel

__all__ = ["PivotLatentDecoding", "PivotLatentOutput", "SchedulerMixin"]

Noise: TypeAlias = GaussianNoise | torch.Generator | Sequence[torch.Generator] | Sequence[Tensor] | Tensor


@dataclass
class PivotLatentOutput:
    """What each phase gave, and pivot_states [B, P, D]: the hidden states of the pivots that the second one saw. `picture` is None
    after an interruption of the first."""

    pivots: MaskedLatentOutput
    pivot_states: Tensor
    picture: MaskedLatentOutput | None = None


class PivotLatentDecoding(SchedulerMixin, ConfigMixin):
    """`MaskedLatentDecoding` of the pivots, then of the picture, which sees the hidden states that the pivots were drawn from. A
    component of a pipeline, like a scheduler.

    Both rows of guidance see the pivots' conditional states in the second phase. There the head denoises all open positions
    together at each step, and those that stay open are drawn again.

    Args:
        num_inference_steps: of the picture.
        num_pivot_steps: of the pivots; None takes four for each row of them.
        mask_schedule: of both.
        head_steps, pivot_head_steps: steps of the two heads.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(
        self,
        num_inference_steps: int = 4,
        num_pivot_steps: int | None = None,
        mask_schedule: str = "cos",
        head_steps: int | str = 250,
        pivot_head_steps: int | str = 100,
    ) -> None:
        check_steps(num_inference_steps)
        check_schedule(mask_schedule)
        if num_pivot_steps is not None:
            check_steps(num_pivot_steps)
        self.picture_decoding = MaskedLatentDecoding(num_inference_steps, mask_schedule, head_steps)
        self.pivot_decoding = MaskedLatentDecoding(num_pivot_steps or 1, mask_schedule, pivot_head_steps)

    def num_calls(self, grid: Sequence[int] = (), num_inference_steps: int | None = None) -> int:
        """Calls of the trunk for the picture, to which `pivot_steps` are added."""
        return self.picture_decoding.num_calls(grid, num_inference_steps)

    def pivot_steps(self, model: PivotLatentModel, num_pivot_steps: int | None = None) -> int:
        """Steps of the first phase."""
        return num_pivot_steps or self.config.num_pivot_steps or 4 * model.pivot_grid[0]

    @torch.no_grad()
    def __call__(
        self,
        model: PivotLatentModel,
        condition: Condition,
        null_condition: Condition | None = None,
        *,
        num_inference_steps: int | None = None,
        num_pivot_steps: int | None = None,
        head_steps: Steps | None = None,
        pivot_head_steps: Steps | None = None,
        annealing: StepAnnealing | None = None,
        temperature: float = 1.0,
        guidance: Guidance | None = None,
        pivot_guidance: Guidance | None = None,
        noise: Noise | None = None,
        pivot_noise: Noise | None = None,
        orders: Tensor | None = None,
        callback: StepCallback | None = None,
        pivot_callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record: bool = False,
    ) -> PivotLatentOutput:
        """Generate one small and one full picture per row of `condition`.

        guidance and pivot_guidance: of the two phases; null_condition is needed if one of them is active. annealing: says the
        steps of the heads in both phases. noise: as of `MaskedLatentDecoding`; pivot_noise: for the first phase alone. orders:
        int64 [B, P + N], the pivots first, in each row every position once. The rest is as of `MaskedLatentDecoding`.
        """
        wake(model)
        pivots, device = model.num_pivots, condition.embeds.device
        if orders is not None and (orders.dim() != 2 or orders.shape[1] != pivots + model.num_tokens):
            raise ValueError(
                f"orders must be [{condition.batch}, {pivots} + {model.num_tokens}], got {list(orders.shape)}"
            )
        if not isinstance(noise, (Tensor, GaussianNoise)):
            noise = GaussianNoise(noise, condition.batch, device)  # one source for both phases

        def pivot_states(tokens: Tensor, kept: Tensor, rows: Condition) -> Tensor:
            wake(model)  # a callback may have decoded a preview, which swaps models under offloading
            return model.pivot_states(tokens, kept, rows)

        shared = {"annealing": annealing, "temperature": temperature, "interrupt": interrupt, "record": record}
        first = self.pivot_decoding(
            LatentPhase(pivots, model.latent_channels, model.head, pivot_states),
            condition,
            null_condition,
            num_inference_steps=self.pivot_steps(model, num_pivot_steps),
            head_steps=pivot_head_steps,
            guidance=pivot_guidance,
            noise=noise if pivot_noise is None else pivot_noise,
            orders=None if orders is None else orders[:, :pivots],
            callback=pivot_callback,
            **shared,
        )
        output = PivotLatentOutput(first, first.drawn_from)
        if interrupt is not None and interrupt():
            return output
        wake(model)
        seen = model.embed_pivots(output.pivot_states)

        def states(tokens: Tensor, kept: Tensor, rows: Condition) -> Tensor:
            wake(model)
            return model(tokens, kept, rows, seen.repeat(rows.batch // len(seen), 1, 1))

        output.picture = self.picture_decoding(
            LatentPhase(model.num_tokens, model.token_channels, model.dense_head, states),
            condition,
            null_condition,
            num_inference_steps=num_inference_steps,
            head_steps=head_steps,
            guidance=guidance,
            noise=noise,
            orders=None if orders is None else orders[:, pivots:] - pivots,
            callback=callback,
            **shared,
        )
        return output
