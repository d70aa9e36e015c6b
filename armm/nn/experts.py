"""Feed-forward networks of which each token uses a few (sparse mixtures of experts; Shazeer et al., arXiv 1701.06538)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armm.nn.linear import FusedLinear, is_plain
from armm.nn.mlp import GatedMLP

# Up to this many pairs of token and expert the experts' weights are gathered, which needs no look at the choice from outside.
GATHERED_PAIRS = 64


class MixtureOfExperts(nn.Module):
    """Weighted sum of the networks that a router likes best for a token, plus one network that all tokens share.

    The router's softmax is over all experts and in float32; the weights of the chosen ones are scaled to add up to 1.

    Args:
        dim: width of a token.
        count: experts.
        active: how many of them a token uses.
        hidden: inner width of an expert.
        shared: inner width of the network that all tokens use, 0 = none.
        routers: how many routers there are; a token may say which of them chooses for it (one for each kind of token).
        kind, bias: of the networks, see `GatedMLP`.
    """

    def __init__(
        self,
        dim: int,
        count: int,
        active: int,
        hidden: int,
        shared: int = 0,
        routers: int = 1,
        kind: str = "swiglu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= active <= count or min(hidden, routers) < 1 or shared < 0:
            raise ValueError(
                f"experts need 1 <= active <= count, positive hidden and routers, and shared >= 0, got {count=}, {active=}, "
                f"{hidden=}, {shared=}, {routers=}"
            )
        self.active = active
        self.routers = nn.ModuleList(nn.Linear(dim, count, bias=False) for _ in range(routers))
        self.experts = nn.ModuleList(GatedMLP(dim, hidden, kind, bias) for _ in range(count))
        self.shared = GatedMLP(dim, shared, kind, bias) if shared else None
        self._stacked: tuple[FusedLinear, FusedLinear] | None = None

    def choose(self, x: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights float32 [R, active] and numbers [R, active] of the experts of tokens [R, D]; routes [R]: their routers, or the
        first for all."""
        if routes is None:
            logits = self.routers[0](x)
        else:
            every = torch.stack([router(x) for router in self.routers])
            logits = every[routes, torch.arange(len(x), device=x.device)]
        weights, index = logits.float().softmax(-1).topk(self.active, dim=-1)
        return weights / weights.sum(-1, keepdim=True), index

    def forward(self, x: Tensor, routes: Tensor | None = None) -> Tensor:
        """Tokens [..., D] -> [..., D]; routes int64 [...]: the router of each token."""
        flat = x.reshape(-1, x.shape[-1])
        weights, index = self.choose(flat, None if routes is None else routes.reshape(-1))
        stacked = self._stacked if not torch.is_grad_enabled() else None
        if stacked is not None and index.numel() <= GATHERED_PAIRS and x.device.type != "cpu":
            out = self.gathered(flat, weights, index, *stacked)
        else:
            out = self.looped(flat, weights, index)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view(x.shape)

    def looped(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """One expert after the other, on the tokens that chose it."""
        out = torch.zeros_like(x)
        for number in index.unique().tolist():
            row, slot = (index == number).nonzero(as_tuple=True)
            out = out.index_add(0, row, self.experts[number](x[row]) * weights[row, slot, None].to(x.dtype))
        return out

    def gathered(self, x: Tensor, weights: Tensor, index: Tensor, up: FusedLinear, down: FusedLinear) -> Tensor:
        """All pairs of token and expert at once, for few tokens; the host does not learn who chose whom."""
        count = len(self.experts)
        rows, width = x.shape
        gate, hidden = (up.weight.view(count, -1, width)[index] @ x[:, None, :, None]).squeeze(-1).chunk(2, dim=-1)
        if up.bias is not None:
            gate_bias, up_bias = up.bias.view(count, -1)[index].chunk(2, dim=-1)
            gate, hidden = gate + gate_bias, hidden + up_bias
        hidden = self.experts[0].activation(gate) * hidden
        out = (down.weight.view(count, width, -1)[index] @ hidden[..., None]).squeeze(-1)
        if down.bias is not None:
            out = out + down.bias.view(count, width)[index]
        return (out * weights[..., None].to(x.dtype)).sum(1)

    # Fusing: the experts' weights become views of one tensor. See `Block.fuse`.

    def merged_groups(self) -> list[list[nn.Module]]:
        """Layers that are merged with each other."""
        ups = [layer for expert in self.experts for layer in (expert.gate, expert.up)]
        return [ups, [expert.down for expert in self.experts]]

    def fuse(self) -> None:
        if all(is_plain(layer) for group in self.merged_groups() for layer in group):
            ups, downs = self.merged_groups()
            self._stacked = FusedLinear.merge(ups), FusedLinear.merge(downs)  # type: ignore[arg-type]

    def unfuse(self) -> None:
        """Forget the merged weights; the layers stay views until `armm.nn.linear.separate`."""
        self._stacked = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_stacked": None}
