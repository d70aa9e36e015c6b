"""MultimodalModel: one stream of words, image codes or latents and image features through the shared trunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from armm.condition import Condition
from armm.heads import CategoricalHead, build_head
from armm.heads.diffusion import build_diffusion_head
from armm.model import AutoregressiveModel
from armm.model_base import TrunkModel
from armm.nn.embedders import Projector
from armm.nn.masks import prefix_mask
from armm.nn.norms import LayerNorm
from armm.nn.positions import PositionLayout, PositionTable
from armm.nn.rotary import rotary_table
from armm.transformer import ARTransformer

__all__ = ["ModelMixin", "MultimodalModel"]


class MultimodalModel(TrunkModel):
    """A language model that also reads features of images, and may draw codes or latents of images.

    Words have the ids 0 .. text_vocab_size-1, codes the ids after them; each kind has an embedding and a head of its own. All
    tokens are numbered along the stream, whatever they are, so text and images may follow each other in any order. This is
    Janus (arXiv 2410.13848) and, without codes, LLaVA (arXiv 2310.03744). A model that draws latents predicts each with a head of
    `armm.heads.diffusion`, and is then fed what its tokenizer makes readable of it, as features: Ming-UniVision (arXiv 2510.06590).

    Args:
        text_vocab_size: rows of the word embedding and of the text head.
        transformer: keyword arguments of `ARTransformer`, with one rotary axis.
        codes: None for a model that does not draw, or {"size": codes, "dim": width of their embedding, "depth": layers of the
            projector behind it, "head": arguments of a head, see `armm.heads.HEADS`}.
        features: None, or {"dim": width of the features, "depth": layers of their projector}; 0 layers for features that were made for
            this model, as wide as its tokens (LaVIT, arXiv 2309.04669).
        latents: None, or {"channels": width of a latent, "dim": width of what the head sees of a hidden state (a linear layer and a layer
            norm), "head": arguments of a head, see `build_diffusion_head`}.
        image_route: in a trunk of experts, the router of features in a prompt; words and tokens that are drawn have router 0.
        grid: (height, width) in codes of the images that it draws.
        max_positions: length of the longest stream.
    """

    # What decoding strategies ask of a model; see `AutoregressiveModel`.
    causal = True
    window = 1
    sub_codes = 1
    tokens_per_position = 1
    code_shape: tuple[int, ...] = ()
    prefix_slots = 1
    is_unified = False

    @register_to_config
    def __init__(
        self,
        text_vocab_size: int = 102400,
        transformer: dict | None = None,
        codes: dict | None = None,
        features: dict | None = None,
        latents: dict | None = None,
        image_route: int = 0,
        grid: Sequence[int] = (24, 24),
        max_positions: int = 4096,
    ) -> None:
        super().__init__()
        for name, value in (("text_vocab_size", text_vocab_size), ("max_positions", max_positions)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.trunk = ARTransformer.from_dict(dict(transformer or {}))
        if len(self.trunk.rotary_axes) != 1 or self.trunk.taps or self.trunk.position_embedding is not None:
            raise ValueError(
                "the transformer of this model needs one rotary axis, no learned positions and no taps, got rotary_axes="
                f"{list(self.trunk.rotary_axes)}"
            )
        dim = self.trunk.dim
        self.text_vocab_size, self.max_positions = text_vocab_size, max_positions
        self.grid = AutoregressiveModel.check_grid(grid)
        self.token_embedding = nn.Embedding(text_vocab_size, dim)
        self.head = CategoricalHead(dim, text_vocab_size)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.code_embedding = self.code_projection = self.code_head = self.feature_projection = None
        self.num_codes = 0
        if codes is not None:
            options: dict[str, Any] = {"depth": 2, "head": {"type": "mlp"}, **codes}
            if set(options) != {"size", "dim", "depth", "head"}:
                raise ValueError(f"codes takes size, dim, depth and head, got {sorted(codes)}")
            self.num_codes = options["size"]
            self.code_embedding = nn.Embedding(self.num_codes, options["dim"])
            self.code_projection = Projector(options["dim"], dim, options["depth"])
            self.code_head = build_head(options["head"], dim, self.num_codes, bias=True)
        if features is not None:
            options = {"depth": 2, **features}
            if set(options) != {"dim", "depth"}:
                raise ValueError(f"features takes dim and depth, got {sorted(features)}")
            if not options["depth"] and options["dim"] != dim:
                raise ValueError(f"features without projector must be {dim} wide, as tokens are, got dim={options['dim']}")
            self.feature_projection = (
                Projector(options["dim"], dim, options["depth"]) if options["depth"] else nn.Identity()
            )
        self.latent_channels = 0
        self.latent_projection = self.latent_norm = self.latent_head = None
        if latents is not None:
            options = {"dim": dim, "head": {}, **latents}
            if set(options) != {"channels", "dim", "head"}:
                raise ValueError(f"latents takes channels, dim and head, got {sorted(latents)}")
            self.latent_channels = options["channels"]
            self.latent_projection = nn.Linear(dim, options["dim"])
            self.latent_norm = LayerNorm(options["dim"])
            head = {"learned_variance": False, **options["head"]}
            self.latent_head = build_diffusion_head(head, options["dim"], self.latent_channels)
        routers = (self.trunk.config.experts or {}).get("routers", 1)
        if not 0 <= image_route < routers:
            raise ValueError(
                f"image_route must be the number of one of the trunk's {routers} routers, got {image_route}"
            )
        self.image_route = image_route

    @property
    def vocab_size(self) -> int:
        """Words and codes."""
        return self.text_vocab_size + self.num_codes

    @property
    def text_range(self) -> tuple[int, int]:
        """(low, high) of the ids of words."""
        return 0, self.text_vocab_size

    @property
    def code_range(self) -> tuple[int, int]:
        """(low, high) of the ids of codes."""
        return self.text_vocab_size, self.vocab_size

    # Positions: the number of a token in the stream.

    def check_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return AutoregressiveModel.check_grid(grid)

    def layout(self, grid: Sequence[int] | None = None) -> PositionLayout:
        return PositionLayout(torch.arange(self.max_positions, dtype=torch.float32, device="cpu")[:, None])

    def positions_for(self, index: Tensor, grid: Sequence[int] | None = None) -> PositionTable:
        """The table for positions `index` [N] or [B, N]."""
        trunk = self.trunk
        coordinates = index.unsqueeze(-1)
        return PositionTable(
            rotary_table(coordinates, trunk.rotary_axes, trunk.rotary_theta, layout=trunk.rotary_layout)
        )

    def image_index(
        self,
        grid: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        *,
        behind: Tensor | None = None,
    ) -> Tensor:
        """Positions [N] or [B, N] of an image's codes that follow tokens at the positions `behind` [T] or [B, T]."""
        height, width = self.grid if grid is None else self.check_grid(grid)
        steps = torch.arange(height * width, device=device or self.device)
        return steps if behind is None else behind[..., -1:] + 1 + steps

    def bidirectional_tokens(self, index: Tensor, grid: Sequence[int] | None = None, *, reading: bool = False) -> int:
        return 0

    # Inputs and outputs.

    def embed(self, ids: Tensor) -> Tensor:
        """Ids [B, N] of words and codes -> [B, N, D]."""
        if not self.num_codes:
            return self.token_embedding(ids)
        is_code = ids >= self.text_vocab_size
        words = self.token_embedding(ids.masked_fill(is_code, 0))
        codes = self.embed_codes((ids - self.text_vocab_size).clamp(min=0))
        return torch.where(is_code.unsqueeze(-1), codes, words)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Codes [B, N], counted from 0 -> [B, N, D]."""
        return self.code_projection(self.code_embedding(codes))

    @apply_forward_hook
    def prompt_condition(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        features: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Condition:
        """What text or an image follows: ids [B, T], with features of images in some of the places.

        mask [B, T]: False on padding, which is on the left. features [images, L, C]: in the order in which the rows mention
        them; image_mask [B, T]: True where they go.
        """
        if ids.dim() != 2 or not ids.shape[1]:
            raise ValueError(f"ids must be [batch, tokens] with at least one token, got shape {tuple(ids.shape)}")
        if (features is None) != (image_mask is None):
            raise ValueError("features and image_mask belong together: give both or neither")
        embeds = self.embed(ids)
        if features is not None:
            if self.feature_projection is None:
                raise ValueError("this model does not read images: it has no projector of features")
            projected = isinstance(self.feature_projection, Projector)
            weight = self.feature_projection.layers[0].weight if projected else self.token_embedding.weight
            tokens = self.feature_projection(features.to(device=weight.device, dtype=weight.dtype)).flatten(0, -2)
            places = int(image_mask.sum())
            if places != len(tokens):
                raise ValueError(f"the prompts have {places} places for image tokens, the images have {len(tokens)}")
            embeds = embeds.masked_scatter(image_mask.to(embeds.device).unsqueeze(-1), tokens.to(embeds.dtype))
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(device=ids.device, dtype=torch.bool)
        index = (real.cumsum(1) - 1).clamp(min=0)
        routes = None
        if image_mask is not None and self.image_route:
            routes = image_mask.to(embeds.device).long() * self.image_route
        return Condition(embeds, None if bool(real.all()) else real, index, routes=routes)

    def embed_features(self, features: Tensor) -> Tensor:
        """Features [..., C] of an image -> [..., D]."""
        return self.feature_projection(features.to(self.feature_projection.layers[0].weight.dtype))

    def latent_condition(self, hidden: Tensor) -> Tensor:
        """What the latent head makes of hidden states [..., D], to be computed once for all its calls."""
        return self.latent_head.condition(self.latent_norm(self.latent_projection(hidden)))

    def logits(self, hidden: Tensor, *, low: int = 0, high: int | None = None) -> Tensor:
        """Hidden [..., D] -> float32 logits of the ids low .. high-1."""
        high, words = self.vocab_size if high is None else high, self.text_vocab_size
        if high <= words:
            return self.head(hidden, low, high)
        codes = self.code_head(hidden, max(low - words, 0), high - words)
        return codes if low >= words else torch.cat([self.head(hidden, low, words), codes], dim=-1)

    def hidden(self, condition: Condition) -> Tensor:
        """Final hidden states [B, T, D] of a prompt, without a cache."""
        mask = None if condition.mask is None else prefix_mask(condition.mask, condition.length)
        positions = self.positions_for(condition.index)
        options = {} if condition.routes is None else {"routes": condition.routes}
        return self.trunk(condition.embeds, positions=positions, mask=mask, causal=mask is None, **options)

    def forward(self, ids: Tensor, mask: Tensor | None = None, *, low: int = 0, high: int | None = None) -> Tensor:
        """Logits [B, T, high - low] at every token of `ids` [B, T], for the token after it."""
        return self.logits(self.hidden(self.prompt_condition(ids, mask)), low=low, high=high)

    def fuse_projections(self) -> None:
        super().fuse_projections()
        if self.code_head is not None:
            self.code_head.fuse()

    def unfuse_projections(self) -> None:
        super().unfuse_projections()
        if self.code_head is not None:
            self.code_head.unfuse()
