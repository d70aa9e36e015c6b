"""Between two stacks of blocks of one trunk."""

from __future__ import annotations

from torch import Tensor, nn

from armm.nn.norms import build_norm


class Bridge(nn.Module):
    """norm, projection, and the learned positions of the stack that follows: what joins an "encoder" and a "decoder" that are
    run one after the other."""

    def __init__(self, norm: str, dim: int, norm_eps: float, learned_positions: int = 0) -> None:
        super().__init__()
        self.norm = build_norm(norm, dim, norm_eps)
        self.projection = nn.Linear(dim, dim)
        self.position_embedding = nn.Embedding(learned_positions, dim) if learned_positions else None

    def forward(self, x: Tensor, learned: Tensor | None = None) -> Tensor:
        """`x` [B, N, D] -> [B, N, D]; `learned` [N, D] or [B, N, D] are rows of `position_embedding`."""
        x = self.projection(self.norm(x))
        return x if learned is None else x + learned
