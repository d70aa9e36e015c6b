"""LANTERN's drafter (arXiv 2410.03355, after EAGLE, 2401.15077 and 2406.16858): a layer that continues the large model's hidden states, and
the tree of drafts that it grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armm.cache import KVCache
from armm.decoding.speculative.tree import DraftTree
from armm.nn.positions import PositionTable, raster_coordinates
from armm.transformer import ARTransformer


class FeatureDrafter(nn.Module):
    """(token t + 1, hidden state t) -> a guess of hidden state t + 1, which the large model's head turns into a token.

    Args:
        vocab_size: of the model. transformer: arguments of `ARTransformer`; the norms of an EAGLE drafter are `first_norm=False`
            and `final_norm=False`.
        prefix: positions before the image, which have no rotary turns (LlamaGen's drafters count one less than the model has).
        grid: (height, width) of the image. tail: positions without turns behind it.
        bias: of the layer that joins token and state.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: dict[str, Any],
        prefix: int = 119,
        grid: tuple[int, int] = (16, 16),
        tail: int = 20,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.trunk = ARTransformer.from_dict(transformer)
        dim = self.trunk.dim
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.join = nn.Linear(2 * dim, dim, bias=bias)
        self.prefix, self.grid, self.tail = prefix, grid, tail

    def positions(self) -> PositionTable:
        cells = raster_coordinates(*self.grid)
        coordinates = torch.cat([torch.zeros(self.prefix, 2), cells, torch.zeros(self.tail, 2)])
        number = torch.arange(len(coordinates))
        zero = (number < self.prefix) | (number >= self.prefix + len(cells))
        device = self.join.weight.device
        return self.trunk.position_table(coordinates.to(device), zero=zero.to(device))

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        positions: PositionTable,
        cache: KVCache,
        mask: Tensor | None = None,
        discard: int = 0,
    ) -> Tensor:
        """tokens [R, n] and the states before them [R, n, D] -> guessed states [R, n, D]. mask: bool over the cache and these tokens,
        default causal. discard: as in `ARTransformer.forward`."""
        joined = self.join(torch.cat([self.token_embedding(tokens), hidden.to(self.join.weight.dtype)], dim=-1))
        return self.trunk(joined, positions=positions, mask=mask, causal=mask is None, cache=cache, discard=discard)


@dataclass
class GrownTree:
    """tokens int64 [n], the root's among them; tree: how they follow each other; scores [n - 1]: log-probability of every path.
    seen: bool [top_k, top_k * depth], which of the nodes fed before and with it each node of the last level looked at."""

    tokens: Tensor
    tree: DraftTree
    scores: Tensor
    seen: Tensor


@torch.no_grad()
def grow_tree(
    drafter: FeatureDrafter,
    head: Callable[[Tensor], Tensor],
    tokens: Tensor,
    hidden: Tensor,
    cache: KVCache,
    *,
    top_k: int = 10,
    depth: int = 4,
    nodes: int = 58,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> GrownTree:
    """Feed what became certain, then grow a tree level by level (EAGLE-2, section 4): every node has its `top_k` likeliest children, of
    each level the `top_k` best paths are continued, `depth` times; the `nodes` best nodes of all levels are kept.

    Args:
        head: the large model's, states [..., D] -> logits [..., V].
        tokens, hidden: [R, n] and [R, n, D], what follows the tokens in the cache (the last token is the root) and the large
            model's states before them. Rows share their tokens; `combine` makes one row of logits of theirs (guidance).
        cache: of the drafter, with room for the tree; of this call it keeps `tokens` only.
    """
    table, device = drafter.positions(), tokens.device
    rows, start = len(tokens), cache.length
    combine = combine or (lambda logits: logits[:1])
    out = drafter(tokens, hidden, table[start : start + tokens.shape[1]], cache)
    certain = cache.length

    def children(states: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens after states [R, n, D], and their log-probabilities, each [n, top_k]."""
        logits = combine(head(states))[0].log_softmax(-1)
        likeliest = logits.topk(top_k, dim=-1)
        return likeliest.indices, likeliest.values

    ids, scores = children(out[:, -1:])
    all_ids, all_scores, all_parents = [ids.flatten()], [scores.flatten()], [torch.full((top_k,), -1, device=device)]
    front, front_ids, front_scores = torch.arange(top_k, device=device), ids.flatten(), scores.flatten()
    states = out[:, -1:].expand(-1, top_k, -1)
    seen = torch.eye(top_k, dtype=torch.bool, device=device)
    count, last = top_k, seen
    for level in range(depth):
        place = certain + level
        mask = torch.cat([torch.ones(top_k, certain, dtype=torch.bool, device=device), seen], dim=1)
        positions = table.take(torch.full((rows, top_k), place, device=device))
        states = drafter(front_ids.expand(rows, -1), states, positions, cache, mask)
        ids, values = children(states)
        scores = values + front_scores[:, None]
        all_ids.append(ids.flatten())
        all_scores.append(scores.flatten())
        all_parents.append(front.repeat_interleave(top_k))
        best = scores.flatten().topk(top_k)
        source = best.indices // top_k
        front, front_ids, front_scores = count + best.indices, ids.flatten()[best.indices], best.values
        states = states[:, source]
        last, seen = seen, torch.cat([seen[source], torch.eye(top_k, dtype=torch.bool, device=device)], dim=1)
        count += top_k * top_k
    cache.crop(certain)
    scores, parents = torch.cat(all_scores), torch.cat(all_parents)
    kept = scores.topk(min(nodes, len(scores))).indices.sort().values
    number = torch.zeros(len(scores) + 1, dtype=torch.long, device=device)  # the last stands for the root, -1
    number[kept] = torch.arange(1, len(kept) + 1, device=device)
    tree = DraftTree(number[parents[kept]].tolist())
    return GrownTree(torch.cat([tokens[0, -1:], torch.cat(all_ids)[kept]]), tree, scores[kept], last)


def convert_drafter(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> FeatureDrafter:
    """The authors' `pytorch_model.bin` and `config.json` of a LlamaGen drafter.

    Raises:
        ValueError: tensors that are missing, unknown or of other sizes.
    """
    vocab_size, dim = state["embed_tokens.weight"].shape
    heads = int(config["num_attention_heads"])
    layers = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    side = (
        32 if str(config.get("input_type", "t2i")) == "t2i2" else 16 if config.get("input_type", "t2i") == "t2i" else 24
    )
    head_dim = dim // heads
    drafter = FeatureDrafter(
        vocab_size,
        {
            "dim": dim,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": state["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
            "mlp_hidden": state["layers.0.mlp.gate_proj.weight"].shape[0],
            "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
            "first_norm": False,
            "final_norm": False,
            "rotary_axes": [head_dim // 2, head_dim // 2],
        },
        prefix=119 if side != 24 else 0,
        grid=(side, side),
        bias="fc.bias" in state,
    )
    renamed = {}
    for name, tensor in state.items():
        own = (
            name.replace("layers.", "trunk.blocks.")
            .replace("embed_tokens.", "token_embedding.")
            .replace("fc.", "join.", 1)
        )
        for theirs, ours in (
            ("self_attn.q_proj", "attention.to_q"), ("self_attn.k_proj", "attention.to_k"), ("self_attn.v_proj", "attention.to_v"),
            ("self_attn.o_proj", "attention.to_out"), ("mlp.gate_proj", "mlp.gate"), ("mlp.up_proj", "mlp.up"),
            ("mlp.down_proj", "mlp.down"), ("post_attention_layernorm", "mlp_norm"), ("input_layernorm", "attention_norm"),
        ):  # fmt: skip
            own = own.replace(theirs, ours)
        renamed[own] = tensor
    missing, unknown = drafter.load_state_dict(renamed, strict=False)
    if missing or unknown:
        raise ValueError(
            f"this is no LANTERN drafter: missing tensors {list(missing)}, unknown tensors {list(unknown)}"
        )
    return drafter.eval()
