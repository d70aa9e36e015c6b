"""PivotLatentModel: a masked autoencoder that draws a small picture first, and the full one around it (Hi-MAR, arXiv 2505.20288)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from armm.condition import Condition
from armm.heads.diffusion import build_diffusion_head
from armm.masked_latent_model import MaskedLatentModel
from armm.model_base import TrunkModel
from armm.nn.modulation import WITHOUT_SHIFT

__all__ = ["ModelMixin", "PivotLatentModel"]

PIVOTS, PICTURE = 0, 1  # the two phases, which are the tasks of the stacks


class PivotLatentModel(MaskedLatentModel):
    """Two phases of one masked autoencoder, told apart by positions, mask tokens and the modulation of its blocks.

    In the sequence stand the condition, the pivots (latents of a small picture) and the tokens of the picture. Phase 1 draws the
    pivots, with no token of the picture there; phase 2 the picture, in which the pivots are seen as phase 1's hidden states.

    Args:
        latent_channels, grid, num_classes, condition_tokens, encoder, decoder: as of `MaskedLatentModel`; the modulation of encoder
            and decoder is filled in.
        pivot_grid: (height, width) of the small picture in latents.
        head: denoises the pivots, token by token; see `build_diffusion_head`.
        dense_head: denoises the picture, all its tokens together.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        grid: Sequence[int] = (16, 16),
        pivot_grid: Sequence[int] = (8, 8),
        num_classes: int = 1000,
        condition_tokens: int = 64,
        encoder: dict | None = None,
        decoder: dict | None = None,
        head: dict | None = None,
        dense_head: dict | None = None,
    ) -> None:
        TrunkModel.__init__(self)
        if len(pivot_grid) != 2 or any(
            isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in pivot_grid
        ):
            raise ValueError(f"pivot_grid must be two positive integers (height, width), got {list(pivot_grid)}")
        self.pivot_grid = (pivot_grid[0], pivot_grid[1])
        self.num_pivots = pivot_grid[0] * pivot_grid[1]
        tasks = {"modulation": "tasks", "modulation_tasks": 2, "modulation_order": list(WITHOUT_SHIFT)}
        self._build(
            latent_channels,
            grid,
            1,
            num_classes,
            condition_tokens,
            {**tasks, **(encoder or {})},
            {**tasks, **(decoder or {})},
            head,
            extra_tokens=self.num_pivots,
            phases=2,
        )
        if any(stack.config.modulation_tasks != 2 for stack in self.stacks):
            raise ValueError(
                "encoder and decoder must have modulation 'tasks' with modulation_tasks=2, one for each phase"
            )
        dim = self.encoder.dim
        self.pivot_projection = nn.Linear(latent_channels, dim)
        self.pivot_state_projection = nn.Linear(dim, dim)
        self.unknown_pivots = nn.Parameter(torch.zeros(self.num_pivots, latent_channels))
        self.dense_head = build_diffusion_head(
            {"type": "transformer", "positions": self.num_tokens, **(dense_head or {})}, dim, latent_channels
        )
        self._initialize()
        for layer in (self.pivot_projection, self.pivot_state_projection):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.unknown_pivots, std=0.02)

    # Phase 1.

    def encode_pivots(self, pivots: Tensor, kept: Tensor, condition: Condition) -> Tensor:
        """Pivots [B, P, C] of which those at `kept` (int64 [B, K], ascending) are there -> [B, T + K, D]."""
        chosen = pivots.gather(1, kept[..., None].expand(-1, -1, pivots.shape[2]))
        embeds = self.pivot_projection(chosen.to(self.pivot_projection.weight.dtype))
        return self._encode(embeds, kept, condition, PIVOTS, modulation=self._task(PIVOTS))

    def decode_pivots(self, encoded: Tensor, kept: Tensor) -> Tensor:
        """What `encode_pivots` gave -> hidden states [B, P, D] of all pivots."""
        return self._decode(encoded, kept, PIVOTS, modulation=self._task(PIVOTS))[:, : self.num_pivots]

    def pivot_states(self, pivots: Tensor, kept: Tensor, condition: Condition) -> Tensor:
        """Hidden states [B, P, D] of all pivots, seeing only those at `kept`."""
        return self.decode_pivots(self.encode_pivots(pivots, kept, condition), kept)

    # Phase 2.

    def embed_pivots(self, states: Tensor | None = None, latents: Tensor | None = None) -> Tensor:
        """Pivots as the second phase sees them, [B, P, D]: hidden states of the first [B, P, D], or latents [B, P, C]."""
        if (states is None) == (latents is None):
            raise ValueError("give either the hidden states of the pivots or their latents")
        if states is not None:
            return self.pivot_state_projection(states.to(self.pivot_state_projection.weight.dtype))
        return self.pivot_projection(latents.to(self.pivot_projection.weight.dtype))

    def encode(self, tokens: Tensor, kept: Tensor, condition: Condition, pivots: Tensor | None = None) -> Tensor:
        """Tokens [B, N, C] of which those at `kept` [B, K] are there, and `embed_pivots` -> [B, T + P + K, D].

        Without pivots the learned unknown ones are seen.
        """
        if pivots is None:
            pivots = self.embed_pivots(latents=self.unknown_pivots.expand(len(tokens), -1, -1))
        chosen = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        embeds = self.token_projection(chosen.to(self.token_projection.weight.dtype))
        sequence = torch.cat([pivots.to(embeds.dtype), embeds], dim=1)
        return self._encode(sequence, self._places(kept), condition, PICTURE, modulation=self._task(PICTURE))

    def decode(self, encoded: Tensor, kept: Tensor, decoder: Callable[..., Tensor] | None = None) -> Tensor:
        """What `encode` gave -> hidden states [B, N, D] of the picture's tokens."""
        hidden = self._decode(encoded, self._places(kept), PICTURE, decoder, modulation=self._task(PICTURE))
        return hidden[:, self.num_pivots :]

    def forward(self, tokens: Tensor, kept: Tensor, condition: Condition, pivots: Tensor | None = None) -> Tensor:
        """Hidden states [B, N, D] of all tokens of the picture, seeing the pivots and the tokens at `kept`; see `encode`."""
        return self.decode(self.encode(tokens, kept, condition, pivots), kept)

    def _task(self, phase: int) -> Tensor:
        return torch.full((1,), phase, device=self.mask_token.device)

    def _places(self, kept: Tensor) -> Tensor:
        """Positions in the sequence of all pivots and of the tokens `kept` [B, K]."""
        front = torch.arange(self.num_pivots, device=kept.device).expand(len(kept), -1)
        return torch.cat([front, kept + self.num_pivots], dim=1)
