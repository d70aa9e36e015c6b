"""A flow head over the tokens of a picture: a small transformer that turns noisy tokens and the trunk's features into velocities
(FlowAR, arXiv 2412.15205, section 3.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from armm.nn.embedders import TimeEmbedding
from armm.nn.modulation import Modulation, modulate
from armm.nn.norms import rms_norm
from armm.nn.positions import PositionTable
from armm.transformer import ARTransformer


class FlowHead(nn.Module):
    """Tokens that are denoised together see each other whole; features of the trunk and the time modulate every block.

    Args:
        dim: width of the trunk's features.
        channels: width of a token.
        transformer: keyword arguments of `ARTransformer`; `final_norm` (False), `modulation` and `context_dim` are filled in.
        cross: the blocks look at the features by cross-attention as well, and the features modulate the feed-forward branch only.
    """

    num_states = 1  # hidden states of the trunk that the head reads

    def __init__(self, dim: int, channels: int, transformer: dict[str, Any], cross: bool = False) -> None:
        super().__init__()
        kind = {"modulation": "branches", "context_dim": dim} if cross else {"modulation": "block"}
        self.trunk = ARTransformer.from_dict({**transformer, **kind, "final_norm": False})
        self.cross, self.norm_eps = cross, float(self.trunk.config.norm_eps)
        width = self.trunk.dim
        self.time_embedding = TimeEmbedding(width)
        self.feature_projection = nn.Linear(dim, width)
        self.input_projection = nn.Linear(channels, width)
        self.modulation = Modulation(width, width, chunks=2)
        self.projection = nn.Linear(width, channels)

    def positions(self, coordinates: Tensor) -> PositionTable:
        """The table of tokens at `coordinates` [n, 2], to be made once and handed to every call."""
        return self.trunk.position_table(coordinates.to(self.projection.weight.device))

    def forward(self, x: Tensor, index: Tensor, features: Tensor, positions: PositionTable) -> Tensor:
        """Noisy tokens [B, n, C], indices of their times [1] or [B], and features [B, n, D] -> float32 velocities [B, n, C]."""
        time = self.time_embedding(index)[:, None].expand(len(x), -1, -1)
        both = time + self.feature_projection(features)
        embeds = self.input_projection(x.to(self.input_projection.weight.dtype))
        hidden = self.trunk(
            embeds,
            positions=positions,
            modulation=(time, both) if self.cross else both,
            context=features if self.cross else None,
        )
        shift, scale = self.modulation(both).chunk(2, dim=-1)
        return self.projection(modulate(rms_norm(hidden, None, self.norm_eps), shift, scale)).float()

    def fuse(self) -> bool:
        """Nothing to merge: modulated blocks stay as they are."""
        return False

    def unfuse(self) -> None:
        pass
