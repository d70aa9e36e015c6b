"""LlamaGen transformers of sizes without a golden case, against the published equations written out plainly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from armm.convert.llamagen import convert_state_dict


def random_checkpoint(dim: int, layers: int, hidden: int, vocab: int, classes: int) -> dict[str, torch.Tensor]:
    """Random tensors under the authors' names."""
    generator = torch.Generator().manual_seed(dim)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state = {
        "cls_embedding.embedding_table.weight": tensor(classes + 1, dim),
        "tok_embeddings.weight": tensor(vocab, dim),
        "norm.weight": 1 + tensor(dim),
        "output.weight": tensor(vocab, dim),
    }
    for i in range(layers):
        state |= {
            f"layers.{i}.attention.wqkv.weight": tensor(3 * dim, dim),
            f"layers.{i}.attention.wo.weight": tensor(dim, dim),
            f"layers.{i}.feed_forward.w1.weight": tensor(hidden, dim),
            f"layers.{i}.feed_forward.w3.weight": tensor(hidden, dim),
            f"layers.{i}.feed_forward.w2.weight": tensor(dim, hidden),
            f"layers.{i}.attention_norm.weight": 1 + tensor(dim),
            f"layers.{i}.ffn_norm.weight": 1 + tensor(dim),
        }
    return state


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: torch.Tensor, side: int) -> torch.Tensor:
    """x [heads, 1 + side**2, d]: pair j turns by row * f_j, pair d/4 + j by column * f_j; the class position becomes zero."""
    quarter = x.shape[-1] // 4
    out = torch.zeros_like(x)
    for position in range(1, x.shape[1]):
        cell = divmod(position - 1, side)
        for axis in (0, 1):
            for j in range(quarter):
                angle = torch.tensor(cell[axis] * 10000.0 ** (-2 * j / (2 * quarter)))
                a = 2 * (axis * quarter + j)
                out[:, position, a] = x[:, position, a] * angle.cos() - x[:, position, a + 1] * angle.sin()
                out[:, position, a + 1] = x[:, position, a] * angle.sin() + x[:, position, a + 1] * angle.cos()
    return out


def reference_logits(
    state: dict[str, torch.Tensor], label: int, ids: torch.Tensor, heads: int, side: int
) -> torch.Tensor:
    x = torch.cat([state["cls_embedding.embedding_table.weight"][label][None], state["tok_embeddings.weight"][ids]])
    length, dim = x.shape
    mask = torch.full((length, length), float("-inf")).triu(1)
    for i in range(len({name.split(".")[1] for name in state if name.startswith("layers.")})):
        weight = {name.split(".", 2)[2]: value for name, value in state.items() if name.startswith(f"layers.{i}.")}
        fused = rms(x, weight["attention_norm.weight"]) @ weight["attention.wqkv.weight"].T
        q, k, v = (part.view(length, heads, dim // heads).transpose(0, 1) for part in fused.split(dim, dim=-1))
        scores = rotate(q, side) @ rotate(k, side).transpose(1, 2) / (dim // heads) ** 0.5 + mask
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, dim) @ weight["attention.wo.weight"].T
        n = rms(x, weight["ffn_norm.weight"])
        gated = F.silu(n @ weight["feed_forward.w1.weight"].T) * (n @ weight["feed_forward.w3.weight"].T)
        x = x + gated @ weight["feed_forward.w2.weight"].T
    return rms(x, state["norm.weight"]) @ state["output.weight"].T


@pytest.mark.parametrize(
    ("dim", "heads", "layers", "hidden", "side"),
    [(64, 1, 1, 256, 2), (96, 3, 2, 256, 3), (200, 2, 2, 768, 3), (48, 4, 3, 80, 4)],
    ids=["one head", "head width 32", "head width 100, as 3B", "head width 12"],
)
def test_any_size_follows_the_published_equations(dim, heads, layers, hidden, side):
    state = random_checkpoint(dim, layers, hidden, vocab=30, classes=5)
    model = convert_state_dict(state, config={"n_head": heads, "block_size": side * side})
    ids = torch.randint(30, (2, side * side), generator=torch.Generator().manual_seed(1))
    ours = model(ids, model.condition(labels=torch.tensor([3, 5])))  # a class and the null class
    for row, label in enumerate((3, 5)):
        expected = reference_logits(state, label, ids[row], heads, side)
        assert (ours[row] - expected).abs().max() <= 1e-4
