"""AutoregressiveModel: input embedders + trunk + head. One class for every family, described by its config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from armm.condition import Condition
from armm.heads import NeighboringHead, TiedHead, build_head
from armm.model_layout import SequenceModel
from armm.nn.embedders import CaptionEmbedding, LabelEmbedding
from armm.nn.masks import prefix_mask
from armm.nn.shuffle import TokenShuffle
from armm.transformer import ARTransformer

__all__ = ["AutoregressiveModel", "Condition", "ModelMixin"]


class AutoregressiveModel(SequenceModel):
    """Tokens in, logits out.

    Three kinds of sequence:
    - with a `condition` embedder: T condition tokens, then the image in raster order. Condition positions have zero
      rotary rows. T is 1 for {"type": "class", "num_classes": n}, `num_tokens` for {"type": "caption", "in_dim",
      "num_tokens"}.
    - with `text_slots`/`answer_slots` (text and image ids in one vocabulary): see `unified_layout` for the flat position
      ids: text right-aligned in 0 .. text_slots-1, begin-of-image text_slots, the image's cells, text after the image.
    - with `max_positions`: text and image ids of one vocabulary in any order, numbered along the sequence (one rotary axis).

    Args:
        vocab_size: rows of the token embedding and of the head.
        transformer: keyword arguments of `ARTransformer`. Learned positions, if any, are one row for every flat position.
        condition: the embedder, or None.
        grid: (height, width) of the default image or (time, height, width) of the default video, in tokens.
        text_slots, answer_slots: how many text tokens fit before and after an image.
        head_bias: whether the head has a bias.
        bidirectional_prompt: in a unified model, text before the image and begin-of-image see each other whole.
        bidirectional_image: in a unified model, text after an image is written with the image and all before it seen whole
            (an image that is being drawn stays causal).
        head: None for one categorical head, or {"type": name in `armm.heads.HEADS`, ...}. A neighboring head takes one hidden
            state for every axis: the trunk has a tap for all of them but the last.
        shuffle: None, or arguments of `TokenShuffle`: the trunk sees one token for each window of the image.
        transition_tokens: learned tokens between the single and the parallel tokens of `ParallelGroupsDecoding`.
        sub_codes: ids of a position, K; each has `vocab_size` values, and ids are [B, N, K] where K > 1.
        sub_code_layout: "stacked" (one token a position: K embeddings side by side go through a projection, and K
            distributions come from one hidden state) or "sequence" (K tokens a position that share embedding, head and
            rotary row, as does a condition repeated K times).
        mask_token: the embedding has one more row, `mask_id`, for what is not known yet.
        causal: whether a token sees only what came before it; masked models see everything.
        rotary_condition: condition tokens have places in the sequence like all others, and so rotary turns; for one rotary axis.
        max_positions: length of the longest sequence of a model whose ids follow each other in any order, 0 for the others.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        transformer: dict | None = None,
        condition: dict | None = None,
        grid: Sequence[int] = (16, 16),
        text_slots: int = 0,
        answer_slots: int = 0,
        head_bias: bool = False,
        bidirectional_prompt: bool = False,
        bidirectional_image: bool = False,
        head: dict | None = None,
        shuffle: dict | None = None,
        transition_tokens: int = 0,
        sub_codes: int = 1,
        sub_code_layout: str = "stacked",
        mask_token: bool = False,
        causal: bool = True,
        max_positions: int = 0,
        rotary_condition: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size must be a positive integer, got {vocab_size!r}")
        if condition is not None and (text_slots or answer_slots):
            raise ValueError(
                "text_slots and answer_slots belong to models without a condition embedder (condition=None)"
            )
        if max_positions and (condition is not None or text_slots or answer_slots or shuffle is not None):
            raise ValueError("max_positions is for models without condition, text_slots, answer_slots and shuffle")
        self.max_positions = max_positions
        self.rotary_condition = rotary_condition
        self.sub_codes, self.sub_code_layout = sub_codes, sub_code_layout
        self._check_sub_codes(condition, mask_token)
        stacked = sub_codes if sub_code_layout == "stacked" else 1
        self.vocab_size, self.causal = vocab_size, causal
        self.mask_id = vocab_size if mask_token else None
        self.grid = self.check_grid(grid)
        self.text_slots, self.answer_slots = text_slots, answer_slots
        self.bidirectional_prompt, self.bidirectional_image = bidirectional_prompt, bidirectional_image
        self.trunk = ARTransformer.from_dict(dict(transformer or {}))
        dim = self.trunk.dim
        self.token_embedding = nn.Embedding(stacked * vocab_size + bool(mask_token), dim)
        self.sub_code_projection = nn.Linear(stacked * dim, dim, bias=False) if stacked > 1 else None
        self.condition_type = None if condition is None else condition.get("type")
        self.condition_embedding = _build_condition(condition, dim)
        self.head = build_head(head, dim, stacked * vocab_size, head_bias)
        self.shuffle = None if shuffle is None else TokenShuffle(dim, **shuffle)
        self.transition_tokens = nn.Embedding(transition_tokens, dim) if transition_tokens else None
        if rotary_condition and (len(self.trunk.rotary_axes) != 1 or condition is None or transition_tokens):
            raise ValueError(
                "rotary_condition is for models with a condition embedder, one rotary axis and no transition tokens, got rotary_axes="
                f"{list(self.trunk.rotary_axes)}"
            )
        if self.head.num_states != 1 + len(self.trunk.taps):
            raise ValueError(
                f"this head reads {self.head.num_states} hidden states, but the trunk has {len(self.trunk.taps)} taps and its "
                "output: the config's head and transformer.taps do not belong together"
            )
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if stacked > 1:
            nn.init.normal_(self.sub_code_projection.weight, std=0.02)
        self.gradient_checkpointing = False
        self._rotary_tables: dict[tuple, Tensor] = {}
        learned = self.trunk.config.learned_positions
        if learned and learned != len(self.layout()):
            raise ValueError(
                f"learned_positions={learned}, but the layout of this model has {len(self.layout())} positions "
                f"(prefix {self.prefix_slots}, grid {self.grid}, answer {answer_slots})"
            )

    def _check_sub_codes(self, condition: dict | None, mask_token: bool) -> None:
        number, layout = self.sub_codes, self.sub_code_layout
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"sub_codes must be a positive integer, got {number!r}")
        if layout not in ("stacked", "sequence"):
            raise ValueError(f"sub_code_layout must be 'stacked' or 'sequence', got {layout!r}")
        if number > 1 and condition is None:
            raise ValueError("sub_codes > 1 needs a condition embedder: unified models have one id a position")
        if number > 1 and mask_token and layout == "stacked":
            raise ValueError("mask_token with sub_codes > 1 needs sub_code_layout='sequence'")

    @property
    def tokens_per_position(self) -> int:
        """Tokens of the sequence that stand for one position."""
        return self.sub_codes if self.sub_code_layout == "sequence" else 1

    @property
    def code_shape(self) -> tuple[int, ...]:
        """What follows [B, N] in the shape of ids: () or (sub_codes,)."""
        return (self.sub_codes,) if self.sub_codes > 1 else ()

    # Positions.

    # Inputs and outputs.

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, N], or [B, N, K] with K sub-codes -> [B, N, D], or [B, N * K, D] where they make a sequence."""
        if self.sub_codes == 1:
            return self.token_embedding(ids)
        if ids.shape[-1] != self.sub_codes:
            raise ValueError(f"ids must be [batch, tokens, {self.sub_codes}], got {tuple(ids.shape)}")
        if self.sub_code_projection is None:
            return self.token_embedding(ids.flatten(-2))
        tables = torch.arange(0, self.sub_codes * self.vocab_size, self.vocab_size, device=ids.device)
        return self.sub_code_projection(self.token_embedding(ids + tables).flatten(-2))

    def embed_windows(self, ids: Tensor) -> Tensor:
        """Ids [B, M, window * window] of windows of image tokens -> tokens of the trunk [B, M, D]."""
        embeds = self.embed(ids)
        return embeds[:, :, 0] if self.shuffle is None else self.shuffle.fuse(embeds)

    def embed_image(self, ids: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Ids [B, N] of a whole image in raster order -> tokens of the trunk [B, N / window^2, D]."""
        if self.shuffle is None:
            return self.embed(ids)
        height, width = self.trunk_grid(grid)
        cells = ids.view(len(ids), height, self.window, width, self.window).transpose(2, 3)
        return self.embed_windows(cells.reshape(len(ids), height * width, -1))

    @apply_forward_hook
    def condition(
        self, labels: Tensor | None = None, features: Tensor | None = None, mask: Tensor | None = None
    ) -> Condition:
        """Class `labels` [B] or text `features` [B, T, C] with their `mask` [B, T] -> what the trunk is fed."""
        if self.condition_type == "class":
            if labels is None or features is not None or mask is not None:
                raise ValueError("this model is conditioned on classes: give labels, and neither features nor mask")
            labels = self._check_labels(labels)
            return Condition(self.condition_embedding(labels), origin={"labels": labels}).spread(self.tokens_per_position)
        if self.condition_type == "caption":
            if features is None or labels is not None:
                raise ValueError("this model is conditioned on text features: give features (and mask), not labels")
            tokens, width = self.condition_embedding.num_tokens, self.condition_embedding.in_dim
            if features.dim() != 3 or tuple(features.shape[1:]) != (tokens, width):
                raise ValueError(f"features must be [batch, {tokens}, {width}], got {tuple(features.shape)}")
            weight = self.condition_embedding.fc1.weight
            embeds = self.condition_embedding(features.to(device=weight.device, dtype=weight.dtype))
            mask = None if mask is None else mask.to(device=embeds.device, dtype=torch.bool)
            origin = {"features": features} if mask is None else {"features": features, "mask": mask}
            return Condition(embeds, mask, origin=origin).spread(self.tokens_per_position)
        raise ValueError("this model has no condition embedder; use prefix_condition with token ids")

    def _check_labels(self, labels: Tensor) -> Tensor:
        classes = self.condition_embedding.num_classes
        labels = torch.as_tensor(labels, device=self.condition_embedding.embedding.weight.device)
        if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
            raise ValueError(f"labels must be a vector of integers, got {labels.dtype} of shape {tuple(labels.shape)}")
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) > classes):
            raise ValueError(
                f"labels must lie in 0 .. {classes - 1} ({classes} is the null class), got {labels.tolist()}"
            )
        return labels.long()

    @apply_forward_hook
    def null_condition(self, batch: int, like: Condition | None = None) -> Condition:
        """What stands for "no condition" in `batch` rows; text models keep the mask of the prompt, `like`."""
        if self.condition_embedding is None:
            raise ValueError(
                "this model has no condition embedder; use prefix_condition with the ids of the null prompt"
            )
        null = Condition(self.condition_embedding.null(batch)).spread(self.tokens_per_position)
        return null if like is None else replace(null, mask=like.mask)

    @apply_forward_hook
    def prefix_condition(self, ids: Tensor, mask: Tensor | None = None, index: Tensor | None = None) -> Condition:
        """Ordinary token ids [B, T] as the prefix of an image (the last one is begin-of-image), for unified models.

        mask [B, T]: False on padding (left). index: flat position ids, default right-aligned to end on begin-of-image.
        """
        if not self.is_unified:
            raise ValueError(
                "prefix_condition is for models with text_slots; use condition(labels=... or features=...)"
            )
        if ids.dim() != 2:
            raise ValueError(f"ids must be [batch, tokens], got shape {tuple(ids.shape)}")
        length = ids.shape[1]
        if index is None:
            if length > self.prefix_slots:
                raise ValueError(
                    f"the prefix has {length} tokens; at most {self.text_slots} text tokens and begin-of-image fit"
                )
            index = torch.arange(self.prefix_slots - length, self.prefix_slots, device=ids.device)
        if index.dim() == 1:
            index = index.expand(ids.shape[0], -1)
        bidirectional = length if self.bidirectional_prompt else 0
        origin = {"ids": ids, "index": index} if mask is None else {"ids": ids, "index": index, "mask": mask}
        return Condition(self.embed(ids), None if mask is None else mask.bool(), index, bidirectional, origin=origin)

    @apply_forward_hook
    def reading_condition(self, prompt: Tensor, image: Tensor, text: Tensor) -> Condition:
        """What text is written after: ids of a prompt up to begin-of-image [B, T + 1], an image [B, N], text about it [B, L]."""
        embeds = torch.cat([self.embed(prompt), self.embed_image(image), self.embed(text)], dim=1)
        index = torch.arange(embeds.shape[1], device=embeds.device)
        whole = self.bidirectional_tokens(index, reading=True)
        return Condition(embeds, None, index.expand(embeds.shape[:2]), whole)

    def bidirectional_tokens(self, index: Tensor, grid: Sequence[int] | None = None, *, reading: bool = False) -> int:
        """How many of the first tokens see each other whole, for tokens at flat position ids `index` [N] or [B, N].

        reading: text is written about the image, rather than the image drawn.
        """
        if reading and self.bidirectional_image:
            end = self.prefix_slots + math.prod(self.trunk_grid(grid))
        elif self.bidirectional_prompt:
            end = self.prefix_slots
        else:
            return 0
        return int((index < end).sum(-1).max())

    def logits(self, hidden: Tensor, *, low: int = 0, high: int | None = None) -> Tensor:
        """Final hidden state [..., D] -> float32 logits over the vocabulary, or over its rows low .. high-1.

        With K stacked sub-codes, which have no ranges, they are [..., K, V]. With a neighboring head these are its last
        axis's, which text uses as well.
        """
        if self.sub_code_projection is not None:
            if (low, high) not in ((0, None), (0, self.vocab_size)):
                raise ValueError(f"a model with sub-codes has no vocabulary ranges, got low={low}, high={high}")
            return self.head(hidden).unflatten(-1, (self.sub_codes, self.vocab_size))
        if isinstance(self.head, TiedHead):
            return self.head(hidden, low, high, rows=self.token_embedding.weight)
        head = self.head.axes[-1] if isinstance(self.head, NeighboringHead) else self.head
        return head(hidden, low, high)

    def window_logits(
        self, hidden: Tensor, *, low: int = 0, high: int | None = None, given: Tensor | None = None
    ) -> Tensor:
        """Hidden [..., D] -> logits [..., S, V] of the S = window * window tokens of the window that follows.

        given: ids [..., k] of its first tokens, of the whole vocabulary, for a shuffle whose slots see those before theirs (others take no
        notice): then of the first min(k + 1, S) tokens.
        """
        if self.shuffle is None:
            return self.logits(hidden, low=low, high=high).unsqueeze(-2)
        states = self.shuffle.unfuse(hidden)
        if self.shuffle.causal:
            if given is None:
                raise ValueError("the tokens of a window depend on each other in this model: `given` must be given")
            states = self.shuffle.refine(states[..., : given.shape[-1] + 1, :], self.embed(given))
        return self.logits(states, low=low, high=high)

    def hidden(
        self,
        ids: Tensor,
        condition: Condition | None = None,
        *,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Teacher forcing without a cache: hidden states [B, T + N, D] of the condition followed by `ids` [B, N].

        Of a trunk with taps it is (hidden, {tap: hidden}), as from `ARTransformer`.

        index: flat position ids of all T + N tokens, [L] or [B, L]; default 0, 1, 2, ... mask: bool or additive,
        replaces causal attention entirely. key_mask: bool [B, L], False on padding, under causal attention. Sub-codes
        of layout "sequence": every position counts K tokens, in the condition too.
        """
        embeds = self.embed(ids)
        if condition is not None:
            embeds = torch.cat([condition.embeds.to(embeds.dtype), embeds], dim=1)
            if condition.index is not None and index is None:
                raise ValueError("this condition has position ids of its own: give index for all tokens")
        length = embeds.shape[1]
        if index is None:
            index = torch.arange(length, device=embeds.device) // self.tokens_per_position
        positions = self.positions_for(index, grid)
        if mask is None:
            bidirectional = self.bidirectional_tokens(index)
            real = key_mask if key_mask is not None else None if condition is None else condition.mask
            if real is None and bidirectional:
                real = embeds.new_ones(len(embeds), 0, dtype=torch.bool)
            mask = None if real is None else prefix_mask(real, length, bidirectional if self.causal else length)
        return self.trunk(embeds, positions=positions, mask=mask, causal=mask is None and self.causal)

    def forward(
        self,
        ids: Tensor,
        condition: Condition | None = None,
        *,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        grid: Sequence[int] | None = None,
        low: int = 0,
        high: int | None = None,
    ) -> Tensor:
        """Logits [B, T + N, V], or [B, T + N, K, V], of `hidden(...)`; in a causal model the logits at a position are for the
        token after it, in a masked one for itself.
        """
        hidden = self.hidden(ids, condition, index=index, mask=mask, key_mask=key_mask, grid=grid)
        logits = self.logits(hidden[0] if isinstance(hidden, tuple) else hidden, low=low, high=high)
        return logits.unflatten(1, (-1, self.sub_codes)) if self.tokens_per_position > 1 else logits


def _build_condition(config: dict | None, dim: int) -> LabelEmbedding | CaptionEmbedding | None:
    if config is None:
        return None
    options = {name: value for name, value in config.items() if name != "type"}
    wanted = {"class": {"num_classes"}, "caption": {"in_dim", "num_tokens"}}.get(str(config.get("type")))
    if wanted is None:
        raise ValueError(f"condition type must be 'class' or 'caption', got {config.get('type')!r}")
    if set(options) != wanted:
        raise ValueError(f"condition of type {config['type']!r} takes {sorted(wanted)}, got {sorted(options)}")
    if config["type"] == "class":
        return LabelEmbedding(options["num_classes"], dim)
    return CaptionEmbedding(options["in_dim"], dim, options["num_tokens"])
