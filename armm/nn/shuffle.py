"""Token-shuffle: square windows of visual tokens as one token of the trunk, and back (arXiv 2504.17789, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

    In the paper the tokens of a window are independent of each other, given those before the window. With `causal_mlps` the state
    of a slot also depends on the tokens of the slots before it (`refine`): a small autoregressive head inside the window, which costs no
    call of the trunk. It begins as the identity.

    Args:
        dim: D, a multiple of `window`^2.
        window: side of the window in tokens.
        num_mlps: residual MLPs of each operation.
        mlp, mlp_hidden: their kind and width (default 2 * D).
        causal_mlps: residual MLPs of `refine`; 0 leaves it out.
    """

    def __init__(
        self,
        dim: int,
        window: int = 2,
        num_mlps: int = 2,
        mlp: str = "swiglu",
        mlp_hidden: int | None = None,
        causal_mlps: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("num_mlps", num_mlps), ("causal_mlps", causal_mlps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
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
        self.causal = causal_mlps > 0
        if self.causal:
            self.slot_compress = nn.Linear(dim, dim // slots)
            self.slot_context = nn.Linear(dim, dim)
            self.refining = _ResidualMLPs(dim, causal_mlps, mlp, mlp_hidden or 2 * dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.causal:
            ends = [getattr(network, "down", None) or network.fc2 for network in self.refining.mlps]
            for layer in (self.slot_context, *ends):
                nn.init.zeros_(layer.weight)

    def fuse(self, embeds: Tensor) -> Tensor:
        """Embeddings [..., slots, D] of the tokens of windows -> fused tokens [..., D]."""
        return self.fusing(self.compress(embeds).flatten(-2))

    def unfuse(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> one state for every slot [..., slots, D]."""
        return self.expand(self.unfusing(hidden).unflatten(-1, (self.slots, -1)))

    def refine(self, states: Tensor, embeds: Tensor) -> Tensor:
        """States of the first n slots [..., n, D], from `unfuse`, and embeddings of the first tokens of the window [..., k, D], where
        k is at least n - 1 -> states that know the tokens of the slots before theirs."""
        count, known = states.shape[-2], min(embeds.shape[-2], states.shape[-2] - 1)
        parts = self.slot_compress(embeds[..., :known, :]).flatten(-2)
        parts = F.pad(parts, (0, states.shape[-1] - parts.shape[-1])).unsqueeze(-2)
        earlier = torch.ones(count, self.slots, dtype=torch.bool, device=parts.device).tril(-1)
        context = parts * earlier.repeat_interleave(parts.shape[-1] // self.slots, dim=1)
        return self.refining(states + self.slot_context(context))
