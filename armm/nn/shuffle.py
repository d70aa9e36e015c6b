"""Token-shuffle: square windows of visual tokens as one token of the trunk, and back (arXiv 2504.17789, section 3)."""

from __future__ import annotations

from torch import Tensor, nn

from armm.nn.mlp import build_mlp
from armm.nn.norms import build_norm

__all__ = ["TokenShuffle"]


class _ResidualMLPs(nn.Module):
    """x + MLP(norm(x)), n times."""

    def __init__(self, dim: int, depth: int, kind: str, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(build_norm("rms", dim, 1e-5) for _ in range(depth))
        self.mlps = nn.ModuleList(build_mlp(kind, dim, hidden, False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            x = x + mlp(norm(x))
        return x


class TokenShuffle(nn.Module):
    """The two operations around the trunk.

    `fuse`: the embeddings of a window's `window`^2 tokens, each compressed to D / window^2 channels, are concatenated and
    mixed by residual MLPs: one token of width D. `unfuse`: the mirror image, from a hidden state to one state per slot. The
    slots of a window are in raster order.

    Args:
        dim: D, a multiple of `window`^2.
        window: side of the window in tokens.
        num_mlps: residual MLPs of each operation.
        mlp, mlp_hidden: their kind and width (default 2 * D).
    """

    def __init__(
        self, dim: int, window: int = 2, num_mlps: int = 2, mlp: str = "swiglu", mlp_hidden: int | None = None
    ) -> None:
        super().__init__()
        slots = window * window
        if window < 2:
            raise ValueError(f"window must be at least 2 (leave the shuffle out for 1), got {window}")
        if dim % slots:
            raise ValueError(f"dim={dim} must be a multiple of window * window = {slots}")
        self.window, self.slots = window, slots
        self.compress = nn.Linear(dim, dim // slots)
        self.fusing = _ResidualMLPs(dim, num_mlps, mlp, mlp_hidden or 2 * dim)
        self.unfusing = _ResidualMLPs(dim, num_mlps, mlp, mlp_hidden or 2 * dim)
        self.expand = nn.Linear(dim // slots, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def fuse(self, embeds: Tensor) -> Tensor:
        """Embeddings [..., slots, D] of the tokens of windows -> fused tokens [..., D]."""
        return self.fusing(self.compress(embeds).flatten(-2))

    def unfuse(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> one state for every slot [..., slots, D]."""
        return self.expand(self.unfusing(hidden).unflatten(-1, (self.slots, -1)))
