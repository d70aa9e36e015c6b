"""NextScaleFlowModel: token maps of growing size, each denoised whole by a flow head (FlowAR, arXiv 2412.15205)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from armm.heads.flow import FlowHead
from armm.next_scale_model import ScalesModel
from armm.nn.embedders import LabelEmbedding
from armm.nn.positions import PositionTable, raster_coordinates
from armm.transformer import ARTransformer

__all__ = ["ModelMixin", "NextScaleFlowModel"]


class NextScaleFlowModel(ScalesModel):
    """Class-conditional next-scale prediction of continuous tokens.

    The token fed for the first scale is the class embedding, those of a later scale are the map before it, enlarged. The trunk's
    features of a scale are what the head denoises its tokens with. The class embedding also modulates the blocks.

    Args:
        latent_channels: width of a continuous token.
        num_classes: of the condition; class `num_classes` stands for "no class".
        scales: sides of the square token maps, coarsest first, beginning with 1.
        transformer: keyword arguments of `ARTransformer`; `learned_positions` (one for every token of all scales), `modulation` and
            `input_norm` are filled in. `rotary_axes` are (row, column), in tokens of the finest map.
        head: of `FlowHead`: `transformer` and `cross`.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        num_classes: int = 1000,
        scales: Sequence[int] = (1, 2, 4, 8, 16),
        transformer: dict | None = None,
        head: dict | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("latent_channels", latent_channels), ("num_classes", num_classes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.set_scales(scales)
        if self.scales[0] != 1:
            raise ValueError(f"scales must begin with 1, whose token is the class, got {list(scales)}")
        self.latent_channels = self.code_dim = latent_channels
        options = {"learned_positions": self.num_tokens, "modulation": "block", "input_norm": True}
        self.trunk = ARTransformer.from_dict({**options, **(transformer or {})})
        config = self.trunk.config
        if config.learned_positions != self.num_tokens:
            raise ValueError(
                f"learned_positions={config.learned_positions}, but scales {list(self.scales)} have {self.num_tokens} tokens"
            )
        if len(self.trunk.rotary_axes) not in (0, 2):
            raise ValueError(f"rotary_axes must be of (row, column), got {self.trunk.rotary_axes}")
        dim = self.trunk.dim
        self.class_embedding = LabelEmbedding(num_classes, dim)
        self.latent_projection = nn.Linear(latent_channels, dim)
        self.feature_position = nn.Embedding(self.num_tokens, dim)
        try:
            self.head = FlowHead(dim, latent_channels, **(head or {"transformer": {"dim": dim}}))
        except TypeError as error:
            raise ValueError(f"head: {error}") from error
        self.gradient_checkpointing = False
        for table in (self.class_embedding.embedding, self.feature_position):
            nn.init.normal_(table.weight, std=0.02)

    @property
    def stacks(self) -> tuple[ARTransformer, ...]:
        """The transformers of the model: the trunk, and the head's."""
        return (self.trunk, self.head.trunk)

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of a picture in tokens."""
        return (self.scales[-1], self.scales[-1])

    def start_tokens(self, condition: Tensor) -> Tensor:
        """The token fed for the first scale, [B, 1, D]."""
        return condition[:, None]

    def embed_codes(self, vectors: Tensor) -> Tensor:
        """The map before at the size of a scale, [B, n, C] -> [B, n, D]."""
        return self.latent_projection(vectors.to(self.latent_projection.weight.dtype))

    def coordinates(self) -> Tensor:
        """float32 [N, 2]: row and column of every token of all scales, in tokens of the finest map."""
        side = self.scales[-1]
        return torch.cat([raster_coordinates(scale, scale) / scale * side for scale in self.scales])

    def positions(self) -> PositionTable:
        """The table for all tokens of all scales."""
        device = self.latent_projection.weight.device
        places = self.coordinates().to(device) if self.trunk.rotary_axes else None
        return self.trunk.position_table(places, index=torch.arange(self.num_tokens, device=device))

    def features(self, hidden: Tensor, start: int = 0) -> Tensor:
        """What the head is conditioned on: hidden [B, n, D] of the tokens from number `start` on, plus learned positions."""
        return hidden + self.feature_position.weight[start : start + hidden.shape[1]]

    def forward(self, inputs: Tensor, condition: Tensor) -> Tensor:
        """Features [B, 1 + M, D] of all scales, with `inputs` as in `hidden`."""
        return self.features(self.hidden(inputs, condition))
