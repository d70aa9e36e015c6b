"""Feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


GATED: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "geglu_tanh": gelu_tanh}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "gelu_tanh": gelu_tanh, "silu": F.silu}


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)): "swiglu" (SiLU), "geglu" (exact GELU) or "geglu_tanh"."""

    def __init__(self, dim: int, hidden: int, kind: str = "swiglu", bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(dim, hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)
        self.activation = GATED[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class MLP(nn.Module):
    """fc2(activation(fc1(x))): "gelu" (exact), "gelu_tanh" or "silu"."""

    def __init__(self, dim: int, hidden: int, kind: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, dim, bias=bias)
        self.activation = PLAIN[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def build_mlp(kind: str, dim: int, hidden: int, bias: bool) -> GatedMLP | MLP:
    """A feed-forward network by name: "swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh" or "silu"."""
    if kind in GATED:
        return GatedMLP(dim, hidden, kind, bias)
    if kind in PLAIN:
        return MLP(dim, hidden, kind, bias)
    raise ValueError(f"mlp must be one of {sorted([*GATED, *PLAIN])}, got {kind!r}")


def gated_hidden(dim: int, multiple_of: int = 256) -> int:
    """The usual hidden width of a gated network: two thirds of 4 * dim, rounded up to a multiple."""
    hidden = int(2 * 4 * dim / 3)
    return -(-hidden // multiple_of) * multiple_of
