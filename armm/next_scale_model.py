"""NextScaleModel: predicts whole token maps of growing size (VAR, arXiv 2404.02905)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from armm.heads.adaptive import AdaptiveHead
from armm.model_base import TrunkModel
from armm.nn.embedders import LabelEmbedding
from armm.nn.masks import block_causal_mask
from armm.nn.positions import PositionTable
from armm.transformer import ARTransformer

__all__ = ["ModelMixin", "NextScaleModel", "ScalesModel"]


class ScalesModel(TrunkModel):
    """What models of growing token maps share: the scales, a class as the condition, teacher forcing.

    A subclass has `trunk` and `class_embedding`, and says what is fed for the first scale (`start_tokens`) and for later ones
    (`embed_codes`), and where the tokens are (`positions`).
    """

    class_embedding: LabelEmbedding
    code_dim: int

    def set_scales(self, scales: Sequence[int]) -> None:
        """Keeps the sides of the square token maps, coarsest first."""
        self.scales = tuple(scales)
        if not self.scales or any(not isinstance(side, int) or side < 1 for side in self.scales):
            raise ValueError(f"scales must be positive integers, the sides of the token maps, got {list(scales)}")
        self.sizes = tuple(side * side for side in self.scales)
        self.num_tokens = sum(self.sizes)

    @property
    def num_classes(self) -> int:
        return self.class_embedding.num_classes

    # Inputs.

    @apply_forward_hook
    def condition(self, labels: Tensor) -> Tensor:
        """Class `labels` [B] -> what the model is conditioned on, [B, D]; label `num_classes` is no class."""
        return self.class_embedding(self.class_embedding.checked(labels))[:, 0]

    @apply_forward_hook
    def null_condition(self, batch: int) -> Tensor:
        """What stands for "no class" in `batch` rows: [batch, D]."""
        return self.class_embedding.null(batch)[:, 0]

    @abstractmethod
    def start_tokens(self, condition: Tensor) -> Tensor:
        """The tokens fed for the first scale, [B, n_1, D]."""

    @abstractmethod
    def embed_codes(self, vectors: Tensor) -> Tensor:
        """What the maps so far say at the size of a scale, [B, n, C] -> [B, n, D]."""

    @abstractmethod
    def positions(self) -> PositionTable:
        """The table for all tokens of all scales."""

    def hidden(self, inputs: Tensor, condition: Tensor) -> Tensor:
        """Teacher forcing without a cache: hidden states [B, n_1 + M, D].

        inputs: [B, M, C], for the tokens of scales 2, 3, ... the accumulated code vectors pooled to that scale
        (`MultiScaleQuantizer.inputs`); M = 0, or the tokens of any number of whole scales. condition: [B, D].
        """
        ends = [sum(self.sizes[: count + 1]) for count in range(len(self.sizes))]
        allowed = [end - self.sizes[0] for end in ends]
        if inputs.dim() != 3 or inputs.shape[2] != self.code_dim or inputs.shape[1] not in allowed:
            raise ValueError(
                f"inputs must be [batch, tokens, {self.code_dim}] with one of {allowed} tokens (whole scales after the first), "
                f"got {tuple(inputs.shape)}"
            )
        if condition.shape != (inputs.shape[0], self.trunk.dim):
            raise ValueError(
                f"condition must be [{inputs.shape[0]}, {self.trunk.dim}] (see `condition`), got {tuple(condition.shape)}"
            )
        length = self.sizes[0] + inputs.shape[1]
        embeds = torch.cat([self.start_tokens(condition), self.embed_codes(inputs)], dim=1)
        mask = block_causal_mask(self.sizes, inputs.device)[:length, :length]
        return self.trunk(embeds, positions=self.positions()[:length], mask=mask, modulation=condition)


class NextScaleModel(ScalesModel):
    """Class-conditional next-scale prediction: the map of one scale is predicted at once, from the maps before it.

    The tokens fed for the first scale are the class embedding plus a learned start. Those of a later scale are the code
    vectors accumulated so far, pooled to its size and projected. A token sees its own scale and all earlier ones. The class
    embedding also modulates the blocks and the head.

    Args:
        vocab_size: number of codes.
        num_classes: of the condition; class `num_classes` stands for "no class".
        code_dim: width of the tokenizer's code vectors.
        scales: sides of the square token maps, coarsest first.
        transformer: keyword arguments of `ARTransformer`. `learned_positions` (one for every token of all scales), `modulation`
            ("block", or "shared") and `final_norm` (False, the head has it) are filled in.
        head_norm_eps: of the head's norm.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        num_classes: int = 1000,
        code_dim: int = 32,
        scales: Sequence[int] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        transformer: dict | None = None,
        head_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        for name, value in (("vocab_size", vocab_size), ("num_classes", num_classes), ("code_dim", code_dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.set_scales(scales)
        self.vocab_size, self.code_dim = vocab_size, code_dim
        options = {"learned_positions": self.num_tokens, "modulation": "block", "final_norm": False}
        self.trunk = ARTransformer.from_dict({**options, **(transformer or {})})
        config = self.trunk.config
        if config.learned_positions != self.num_tokens:
            raise ValueError(
                f"learned_positions={config.learned_positions}, but scales {list(self.scales)} have {self.num_tokens} tokens"
            )
        if config.modulation is None or config.final_norm or config.modulation_dim not in (None, self.trunk.dim):
            raise ValueError(
                "the transformer must have modulation 'block' or 'shared' of its own width and final_norm=False, got "
                f"modulation={config.modulation!r}, modulation_dim={config.modulation_dim}, final_norm={config.final_norm}"
            )
        dim = self.trunk.dim
        self.class_embedding = LabelEmbedding(num_classes, dim)
        self.start_position = nn.Parameter(torch.empty(self.sizes[0], dim))
        self.level_embedding = nn.Embedding(len(self.scales), dim)
        self.code_projection = nn.Linear(code_dim, dim)
        self.head = AdaptiveHead(dim, vocab_size, bias=True, norm_eps=head_norm_eps)
        self.gradient_checkpointing = False
        weights = (self.start_position, self.code_projection.weight, self.head.projection.weight)
        for weight in (*weights, self.class_embedding.embedding.weight, self.level_embedding.weight):
            nn.init.normal_(weight, std=0.02)
        for bias in (self.code_projection.bias, self.head.projection.bias):
            nn.init.zeros_(bias)

    def start_tokens(self, condition: Tensor) -> Tensor:
        """The tokens fed for the first scale, [B, n_1, D]."""
        return condition[:, None] + self.start_position

    def embed_codes(self, vectors: Tensor) -> Tensor:
        """Accumulated code vectors pooled to the size of a scale, [B, n, C] -> [B, n, D]."""
        return self.code_projection(vectors.to(self.code_projection.weight.dtype))

    def positions(self) -> PositionTable:
        """The table for all tokens of all scales: their own learned row plus their scale's."""
        device = self.level_embedding.weight.device
        levels = torch.arange(len(self.scales), device=device).repeat_interleave(
            torch.tensor(self.sizes, device=device), output_size=self.num_tokens
        )
        index = torch.arange(self.num_tokens, device=device)
        table = self.trunk.position_table(None, index=index)
        return PositionTable(None, self.level_embedding(levels) + table.learned)

    # Outputs.

    def logits(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Hidden [B, N, D] and condition [B, D] -> float32 logits [B, N, V]."""
        return self.head(hidden, condition)

    def forward(self, inputs: Tensor, condition: Tensor) -> Tensor:
        """Logits [B, n_1 + M, V] of `hidden(...)`: those at a token are for the code at its own place."""
        return self.logits(self.hidden(inputs, condition), condition)
