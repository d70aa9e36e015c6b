"""MaskedLatentModel: a masked autoencoder over continuous tokens with a head that denoises them (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from armm.condition import Condition
from armm.heads.diffusion import build_diffusion_head
from armm.model_base import TrunkModel
from armm.nn.embedders import LabelEmbedding
from armm.nn.positions import PositionTable, captioned_coordinates
from armm.transformer import ARTransformer

__all__ = ["MaskedLatentModel", "ModelMixin"]


class MaskedLatentModel(TrunkModel):
    """The encoder sees the tokens that are there, the decoder all positions, the head denoises those that are asked for.

    In front of the tokens stand those of the condition. A picture's latents [B, H * W, C] become tokens [B, N, C * p * p], p x p
    latents in each, N = (H / p) * (W / p); both are in raster order.

    Args:
        latent_channels: width of a latent.
        grid: (height, width) of a picture in latents.
        patch_size: p.
        num_classes: of the condition; class `num_classes` stands for "no class".
        condition_tokens: how many times the class embedding is fed, told apart by positions only; or the words of a caption.
        encoder, decoder: keyword arguments of `ARTransformer`, of one width; `learned_positions` and the encoder's `input_norm` are
            filled in. Three `rotary_axes` are (order of the word, row, column).
        head: `{"type": "mlp", **arguments}`, see `build_diffusion_head`.
        vocab_size: words, for models of captions, which have no classes (num_classes 0).
    """

    head: nn.Module
    text_embedding: nn.Embedding | None

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        grid: Sequence[int] = (16, 16),
        patch_size: int = 1,
        num_classes: int = 1000,
        condition_tokens: int = 64,
        encoder: dict | None = None,
        decoder: dict | None = None,
        head: dict | None = None,
        vocab_size: int = 0,
    ) -> None:
        super().__init__()
        if (vocab_size > 0) == (num_classes > 0):
            raise ValueError(
                f"vocab_size={vocab_size} and num_classes={num_classes}: one of them must be 0, the other not"
            )
        self._build(latent_channels, grid, patch_size, num_classes, condition_tokens, encoder, decoder, head)
        if vocab_size:
            self.text_embedding = nn.Embedding(vocab_size, self.encoder.dim)
        self._initialize()

    def _build(
        self,
        latent_channels: int,
        grid: Sequence[int],
        patch_size: int,
        num_classes: int,
        condition_tokens: int,
        encoder: Mapping[str, Any] | None,
        decoder: Mapping[str, Any] | None,
        head: Mapping[str, Any] | None,
        extra_tokens: int = 0,
        phases: int = 1,
    ) -> None:
        """The modules. extra_tokens: in front of the picture's. phases: sets of positions; more than one have a mask token for each
        position."""
        named = {"latent_channels": latent_channels, "patch_size": patch_size}
        named |= {"condition_tokens": condition_tokens, "grid height": grid[0], "grid width": grid[1]}
        for name, value in {**named, "num_classes": num_classes}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < (0 if name == "num_classes" else 1):
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if len(grid) != 2 or grid[0] % patch_size or grid[1] % patch_size:
            raise ValueError(
                f"grid must be (height, width), both multiples of patch_size={patch_size}, got {list(grid)}"
            )
        self.grid, self.patch_size = (grid[0], grid[1]), patch_size
        self.latent_channels, self.token_channels = latent_channels, latent_channels * patch_size**2
        self.condition_tokens, self.extra_tokens = condition_tokens, extra_tokens
        self.num_tokens = (grid[0] // patch_size) * (grid[1] // patch_size)
        self.sequence_length = extra_tokens + self.num_tokens
        rows = phases * (condition_tokens + self.sequence_length)
        self.encoder = _stack(encoder, "encoder", learned_positions=rows, input_norm=True)
        self.decoder = _stack(decoder, "decoder", learned_positions=rows)
        if any(len(stack.rotary_axes) not in ((0,) if extra_tokens else (0, 3)) for stack in self.stacks):
            raise ValueError(
                "encoder and decoder must have no rotary_axes"
                + ("" if extra_tokens else ", or three (order, row, column)")
                + f", got {self.encoder.rotary_axes} and {self.decoder.rotary_axes}"
            )
        dim = self.encoder.dim
        if self.decoder.dim != dim:
            raise ValueError(f"encoder and decoder must have one width, got {dim} and {self.decoder.dim}")
        self.class_embedding = LabelEmbedding(num_classes, dim)
        self.text_embedding = None
        self.token_projection = nn.Linear(self.token_channels, dim)
        self.decoder_projection = nn.Linear(dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1 if phases == 1 else phases * self.sequence_length, dim))
        self.output_position = nn.Parameter(torch.zeros(self.sequence_length, dim))
        self.head = build_diffusion_head(head, dim, self.token_channels)
        self.gradient_checkpointing = False

    def _initialize(self) -> None:
        for layer in (self.token_projection, self.decoder_projection):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for weight in (self.mask_token, self.output_position, self.class_embedding.embedding.weight):
            nn.init.normal_(weight, std=0.02)
        if self.text_embedding is not None:
            nn.init.normal_(self.text_embedding.weight, std=0.02)

    @property
    def stacks(self) -> tuple[ARTransformer, ...]:
        return (self.encoder, self.decoder)

    @property
    def num_classes(self) -> int:
        return self.class_embedding.num_classes

    @property
    def vocab_size(self) -> int:
        return 0 if self.text_embedding is None else self.text_embedding.num_embeddings

    @property
    def text_length(self) -> int:
        """The largest number of words of a caption."""
        return self.condition_tokens if self.vocab_size else 0

    # Latents and tokens.

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents [B, H * W, C] -> tokens [B, N, C * p * p], channels outermost inside a token."""
        if self.patch_size == 1:
            return latents
        maps = latents.transpose(1, 2).unflatten(2, self.grid)
        return F.pixel_unshuffle(maps, self.patch_size).flatten(2).transpose(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C * p * p] -> latents [B, H * W, C]."""
        if self.patch_size == 1:
            return tokens
        height, width = (side // self.patch_size for side in self.grid)
        maps = tokens.transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(maps, self.patch_size).flatten(2).transpose(1, 2)

    # Conditions.

    @apply_forward_hook
    def condition(self, labels: Tensor) -> Condition:
        """Class `labels` [B] -> what the model is conditioned on; label `num_classes` is no class."""
        return self._condition(self.class_embedding(self.class_embedding.checked(labels))[:, 0])

    @apply_forward_hook
    def caption_condition(self, ids: Tensor) -> Condition:
        """Words `ids` [B, condition_tokens], padded -> the condition."""
        if self.text_embedding is None:
            raise ValueError("this model has no words (vocab_size=0): it is conditioned on classes")
        if ids.dim() != 2 or ids.shape[1] != self.condition_tokens:
            raise ValueError(f"ids must be [batch, {self.condition_tokens} words], got {tuple(ids.shape)}")
        return Condition(self.text_embedding(ids), bidirectional=self.condition_tokens)

    @apply_forward_hook
    def mixed_condition(self, weights: Tensor) -> Condition:
        """Weights of classes [B, num_classes or num_classes + 1] -> the condition on the mean of their embeddings."""
        table = self.class_embedding.embedding.weight
        if weights.dim() != 2 or weights.shape[1] not in (self.num_classes, self.num_classes + 1):
            raise ValueError(
                f"weights must be [batch, {self.num_classes}] (or one more, no class), got {tuple(weights.shape)}"
            )
        return self._condition(weights.to(table) @ table[: weights.shape[1]])

    @apply_forward_hook
    def null_condition(self, batch: int) -> Condition:
        """What stands for "no class" in `batch` rows."""
        return self._condition(self.class_embedding.null(batch)[:, 0])

    def _condition(self, vector: Tensor) -> Condition:
        return Condition(vector[:, None].expand(-1, self.condition_tokens, -1), bidirectional=self.condition_tokens)

    # The pass.

    def encode(self, tokens: Tensor, kept: Tensor, condition: Condition) -> Tensor:
        """Tokens [B, N, C'] of which those at the positions `kept` (int64 [B, K], ascending) are there -> [B, T + K, D]."""
        chosen = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        return self._encode(self.token_projection(chosen.to(self.token_projection.weight.dtype)), kept, condition)

    def decode(self, encoded: Tensor, kept: Tensor, decoder: Callable[..., Tensor] | None = None) -> Tensor:
        """What `encode` gave -> hidden states [B, N, D] of all positions, which the head takes.

        decoder: a compiled form of the model's.
        """
        return self._decode(encoded, kept, decoder=decoder)

    def forward(self, tokens: Tensor, kept: Tensor, condition: Condition) -> Tensor:
        """Hidden states [B, N, D] of all positions, seeing only the tokens at `kept` [B, K]; see `encode`."""
        return self.decode(self.encode(tokens, kept, condition), kept)

    def _encode(self, embeds: Tensor, kept: Tensor, condition: Condition, phase: int = 0, **options: Any) -> Tensor:
        """embeds: [B, K, D], of the positions `kept` [B, K] of the whole sequence."""
        embeds = torch.cat([condition.embeds.to(embeds.dtype), embeds], dim=1)
        return self.encoder(embeds, positions=self._positions(self.encoder, kept, phase), **options)

    def _decode(
        self, encoded: Tensor, kept: Tensor, phase: int = 0, decoder: Callable[..., Tensor] | None = None, **options: Any
    ) -> Tensor:
        slots, length = self.condition_tokens, self.sequence_length
        x = self.decoder_projection(encoded)
        first = phase * length if len(self.mask_token) > 1 else 0
        blank = self.mask_token[first : first + (length if len(self.mask_token) > 1 else 1)].to(x.dtype)
        sequence = blank.expand(len(x), length, -1).scatter(1, kept[..., None].expand(-1, -1, x.shape[2]), x[:, slots:])
        positions = self._positions(self.decoder, torch.arange(length, device=kept.device), phase)
        run = decoder or self.decoder
        hidden = run(torch.cat([x[:, :slots], sequence], dim=1), positions=positions, **options)
        return hidden[:, slots:] + self.output_position.to(hidden.dtype)

    def _positions(self, stack: ARTransformer, places: Tensor, phase: int) -> PositionTable:
        """The table of the condition and of `places` [K] or [B, K] in the sequence behind it."""
        slots = self.condition_tokens
        front = torch.arange(slots, device=places.device).expand(*places.shape[:-1], -1)
        index = torch.cat([front, places + slots], dim=-1) + phase * (slots + self.sequence_length)
        coordinates = None
        if stack.rotary_axes:
            height, width = (side // self.patch_size for side in self.grid)
            cells = torch.stack([places // width, places % width], dim=-1).float()
            coordinates = captioned_coordinates(slots, cells, (height, width))
        return stack.position_table(coordinates, index=index)


def _stack(config: Mapping[str, Any] | None, name: str, **filled: Any) -> ARTransformer:
    """A stack; a ValueError where its config contradicts what is filled in."""
    options = {**filled, **(config or {})}
    wrong = {key: options[key] for key, value in filled.items() if options[key] != value}
    if wrong:
        raise ValueError(f"{name} must have {filled}, got {wrong}")
    return ARTransformer.from_dict(options)
