"""NextXModel: the velocity of noisy entities of continuous tokens, given the entities before them (xAR, arXiv 2502.20388)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from armm.condition import Condition
from armm.heads.continuous import ContinuousHead
from armm.model_base import TrunkModel
from armm.nn.embedders import LabelEmbedding, TimeEmbedding
from armm.nn.positions import PositionTable, captioned_coordinates
from armm.transformer import ARTransformer

__all__ = ["ModelMixin", "NextXModel"]


class NextXModel(TrunkModel):
    """Flow matching inside the trunk: a token of an entity at time t goes in, its velocity comes out.

    The class embedding plus that of the time modulates the blocks, constant over the tokens of an entity. What an entity is, is
    not the model's business: it is told where tokens are and which belong together. Models of captions (`vocab_size`) have the
    words in front of all entities, as tokens at time 0.

    Args:
        latent_channels: width of a continuous token.
        grid: (height, width) of the pictures it was trained on; the default of decoding.
        num_classes: of the condition; class `num_classes` stands for "no class".
        vocab_size, text_length: words and their largest number, for models of captions; 0 is none.
        transformer: keyword arguments of `ARTransformer`; `modulation` ("block") and `input_norm` are filled in. With
            `learned_positions`, row i belongs to cell i of the grid in raster order; tokens of coarser scales and words follow.
            With three `rotary_axes`, they are (order of the word, row, column), else (row, column).
        entities: [entity, size] of all that it was trained to predict, see `NextXDecoding`; None: not known.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        grid: Sequence[int] = (16, 16),
        num_classes: int = 1000,
        vocab_size: int = 0,
        text_length: int = 0,
        transformer: dict | None = None,
        entities: Sequence[Sequence[Any]] | None = None,
    ) -> None:
        super().__init__()
        if len(grid) != 2:
            raise ValueError(f"grid must be (height, width), got {list(grid)}")
        sizes = {"latent_channels": latent_channels, "num_classes": num_classes}
        for name, value in {**sizes, "grid height": grid[0], "grid width": grid[1]}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < (0 if name == "num_classes" else 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if (vocab_size > 0) != (text_length > 0):
            raise ValueError(f"vocab_size={vocab_size} and text_length={text_length}: give both or neither")
        self.grid = (grid[0], grid[1])
        self.latent_channels, self.text_length = latent_channels, text_length
        self.trunk = ARTransformer.from_dict({"modulation": "block", "input_norm": True, **(transformer or {})})
        config = self.trunk.config
        if config.modulation not in ("block", "shared") or config.modulation_dim not in (None, self.trunk.dim):
            raise ValueError(
                "the transformer must have modulation 'block' or 'shared' of its own width, got "
                f"modulation={config.modulation!r}, modulation_dim={config.modulation_dim}"
            )
        if len(self.trunk.rotary_axes) not in (0, 2, 3):
            raise ValueError(
                f"rotary_axes must be of (row, column) or (order, row, column), got {self.trunk.rotary_axes}"
            )
        dim = self.trunk.dim
        self.latent_projection = nn.Linear(latent_channels, dim)
        self.class_embedding = LabelEmbedding(num_classes, dim)
        self.text_embedding = nn.Embedding(vocab_size, dim) if vocab_size else None
        self.time_embedding = TimeEmbedding(dim)
        self.head = ContinuousHead(dim, latent_channels)
        self.gradient_checkpointing = False
        layers = [self.latent_projection, self.time_embedding.fc1, self.time_embedding.fc2]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for table in (self.class_embedding.embedding, self.text_embedding):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    @property
    def num_classes(self) -> int:
        return self.class_embedding.num_classes

    @property
    def vocab_size(self) -> int:
        return 0 if self.text_embedding is None else self.text_embedding.num_embeddings

    # Inputs.

    @apply_forward_hook
    def condition(self, labels: Tensor) -> Condition:
        """Class `labels` [B] -> what the model is conditioned on; label `num_classes` is no class."""
        return self._without_text(self.class_embedding(self.class_embedding.checked(labels))[:, 0])

    @apply_forward_hook
    def caption_condition(self, ids: Tensor, mask: Tensor | None = None) -> Condition:
        """Words `ids` [B, T] (T up to `text_length`) -> the condition; mask: bool [B, T], False where a slot is padding."""
        if self.text_embedding is None:
            raise ValueError("this model has no words (vocab_size=0): it is conditioned on classes")
        if ids.dim() != 2 or not 0 < ids.shape[1] <= self.text_length:
            raise ValueError(f"ids must be [batch, 1 .. {self.text_length} words], got {tuple(ids.shape)}")
        vector = self.class_embedding.null(len(ids))[:, 0]
        return Condition(self.text_embedding(ids), mask, bidirectional=ids.shape[1], vector=vector)

    @apply_forward_hook
    def null_condition(self, batch: int) -> Condition:
        """What stands for "no class" in `batch` rows."""
        return self._without_text(self.class_embedding.null(batch)[:, 0])

    def _without_text(self, vector: Tensor) -> Condition:
        return Condition(vector.new_zeros(len(vector), 0, vector.shape[1]), vector=vector)

    def embed(self, latents: Tensor) -> Tensor:
        """Tokens, clean or noisy, [B, n, C] -> [B, n, D]."""
        return self.latent_projection(latents.to(self.latent_projection.weight.dtype))

    def modulation(self, vector: Tensor, index: Tensor) -> Tensor:
        """Vectors of conditions [B, D] and indices of times, [E] or [B, E] -> [B, E, D], one row for each entity."""
        return vector[:, None] + self.time_embedding(index)

    def positions(self, coordinates: Tensor, index: Tensor, words: int = 0) -> PositionTable:
        """The table of `words` words followed by tokens at `coordinates` [N, 2] with the rows `index` [N]."""
        device = self.latent_projection.weight.device
        trunk = self.trunk
        places = coordinates.float().to(device)
        if len(trunk.rotary_axes) == 3:
            places = captioned_coordinates(words, places, self.grid)
        elif words and trunk.rotary_axes:
            raise ValueError("words need three rotary_axes (order, row, column)")
        rows = index.to(device)
        if words:
            total = 0 if trunk.position_embedding is None else trunk.position_embedding.num_embeddings
            rows = torch.cat([torch.arange(total - words, total, device=device), rows])
        return trunk.position_table(places if trunk.rotary_axes else None, index=rows)

    # Outputs.

    def velocity(self, hidden: Tensor) -> Tensor:
        """Hidden [B, n, D] -> float32 velocity [B, n, C]."""
        return self.head(hidden)

    def forward(
        self,
        latents: Tensor,
        index: Tensor,
        condition: Condition,
        positions: PositionTable,
        segments: Tensor,
        mask: Tensor | None = None,
        trunk: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Velocities [B, N, C] of noisy tokens `latents` [B, N, C], all entities in one pass; see `NextXDecoding.velocities`.

        index: of the entities' times [B, E]. positions: of words and tokens. segments: [N], the entity of every token. mask: bool,
        [T + N, T + N] or [B, 1, T + N, T + N]. trunk: a compiled form of the model's.
        """
        words = condition.length
        embeds = torch.cat([condition.embeds, self.embed(latents)], dim=1)
        if words:  # they are an entity of their own, at time 0
            index = torch.nn.functional.pad(index.expand(len(latents), -1), (1, 0))
            segments = torch.nn.functional.pad(segments + 1, (words, 0))
        modulation = self.modulation(condition.vector, index.expand(len(latents), -1))
        run = trunk or self.trunk
        hidden = run(embeds, positions=positions, mask=mask, modulation=modulation, segments=segments)
        return self.velocity(hidden[:, words:])
