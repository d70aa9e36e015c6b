"""Noisy Context Learning: flow matching of all entities of a picture at once, each in the context of noisy ones
(xAR, arXiv 2502.20388, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from armm.condition import Condition
from armm.decoding.base import Trunk
from armm.decoding.next_x import NextXDecoding
from armm.decoding.solvers.flow import time_index
from armm.next_x_model import NextXModel

__all__ = ["noisy_context_loss"]


def noisy_context_loss(
    model: NextXModel,
    decoding: NextXDecoding,
    condition: Condition,
    latents: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    times: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    trunk: Trunk | None = None,
) -> Tensor:
    """Mean squared error of the velocities of all tokens: a scalar.

    Every entity is at a time of its own, so that later ones learn from contexts as imperfect as their own drafts and the model is
    not thrown off by its errors when it generates.

    Args:
        condition: of as many rows as `latents`; dropped conditions are the caller's business.
        latents: clean pictures [B, H * W, C] in raster order.
        grid: (height, width), default the model's.
        times: [B, E] in 0 .. 1 (1 is noise); None draws them logit-normal, sigmoid(N(0, 1)), independently.
        noise: standard normal [B, N, C] in the order of the entities; None draws it.
        generator: of what is drawn, on the latents' device.
        trunk: a compiled form of the model's.
    """
    plan = decoding.plan(grid or model.grid)
    clean = plan.split(latents.float())
    batch, device = len(clean), clean.device
    if times is None:
        times = torch.randn(batch, len(plan.sizes), generator=generator, device=device).sigmoid()
    if noise is None:
        noise = torch.randn(clean.shape, generator=generator, device=device)
    if times.shape != (batch, len(plan.sizes)) or noise.shape != clean.shape:
        raise ValueError(
            f"times must be [{batch}, {len(plan.sizes)}] and noise {list(clean.shape)}, got {list(times.shape)} and {list(noise.shape)}"
        )
    spread = times[:, plan.segments(device)][..., None]
    noisy = (1 - spread) * clean + spread * noise
    velocity = decoding.velocities(model, condition, noisy, time_index(times), plan, trunk=trunk)
    return (velocity - (noise - clean)).square().mean()
