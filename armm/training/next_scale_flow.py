"""The loss of next-scale prediction with a flow head (FlowAR, arXiv 2412.15205, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from armm.decoding.next_scale_flow import teacher_maps
from armm.decoding.solvers.flow import time_index
from armm.next_scale_flow_model import NextScaleFlowModel

__all__ = ["next_scale_flow_loss"]


def next_scale_flow_loss(
    model: NextScaleFlowModel,
    condition: Tensor,
    latents: Tensor,
    *,
    times: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Squared error of the velocities, a mean over each map and a sum over maps, weighted by (side / finest side)^2: a scalar.

    Args:
        condition: [B, D], see `NextScaleFlowModel.condition`.
        latents: clean pictures [B, H * W, C] in raster order.
        times: [B, scales] in 0 .. 1 (1 is noise); None draws them uniformly, one for each map.
        noise: standard normal [B, N, C] for all maps; None draws it.
        generator: of what is drawn, on the latents' device.
    """
    clean, inputs = teacher_maps(latents.float(), model.scales)
    batch, device = len(clean), clean.device
    if times is None:
        times = torch.rand(batch, len(model.scales), generator=generator, device=device)
    if noise is None:
        noise = torch.randn(clean.shape, generator=generator, device=device)
    features = model(inputs, condition)
    coordinates = model.coordinates()
    total = clean.new_zeros(())
    stop = 0
    for step, (side, size) in enumerate(zip(model.scales, model.sizes, strict=True)):
        start, stop = stop, stop + size
        time = times[:, step, None, None]
        data, eps = clean[:, start:stop], noise[:, start:stop]
        positions = model.head.positions(coordinates[start:stop])
        velocity = model.head(
            (1 - time) * data + time * eps, time_index(times[:, step]), features[:, start:stop], positions
        )
        total = total + (velocity - (eps - data)).square().mean() * (side / model.scales[-1]) ** 2
    return total
