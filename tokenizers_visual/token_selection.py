"""Keeping some tokens of an image and moving what the others knew into them (LaVIT, Jin et al., arXiv 2309.04669, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from armm.nn.masks import causal_key_mask, key_mask
from armm.nn.norms import LayerNorm

from .query_transformer import QueryTransformer


class TokenSelector(nn.Module):
    """Log-probabilities of keeping and of dropping each token, from its own features and the mean over all tokens.

    Args:
        dim: width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps=1e-5)
        self.proj_in = nn.Linear(dim, dim)
        widths = (dim, dim // 2, dim // 4, 2)
        self.layers = nn.ModuleList(nn.Linear(wide, narrow) for wide, narrow in zip(widths, widths[1:], strict=False))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """float32 `[B, N, 2]` (0 = keep, 1 = drop) of `features` `[B, N, dim]`, computed in the dtype of the weights."""
        with torch.autocast(features.device.type, enabled=False):
            x = F.gelu(self.proj_in(self.norm(features.to(self.proj_in.weight.dtype))))
            own, shared = x.tensor_split([x.shape[-1] // 2], dim=-1)
            x = torch.cat([own, shared.mean(1, keepdim=True).expand_as(shared)], dim=-1)
            for layer in self.layers[:-1]:
                x = F.gelu(layer(x))
            return self.layers[-1](x).float().log_softmax(-1)

    @staticmethod
    def decide(log_probs: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Which tokens are kept: bool `[B, N]`, at least one for each image.

        Args:
            log_probs: `[B, N, 2]` from `forward`.
            noise: standard Gumbel noise of the same shape, which draws the decisions; None takes the likelier ones.
        """
        scores = log_probs if noise is None else log_probs + noise
        margin = scores[..., 0] - scores[..., 1]
        keep = margin >= 0
        # an image of which nothing would be kept keeps the token that came closest
        best = F.one_hot(margin.argmax(1), margin.shape[1]).bool()
        return keep | (best & ~keep.any(1, keepdim=True))

    @staticmethod
    def relax(log_probs: torch.Tensor, noise: torch.Tensor | None = None, temperature: float = 1.0) -> torch.Tensor:
        """The decisions as float32 `[B, N]`, exactly 0 or 1, whose gradients are those of the softmax they were taken from: the
        straight-through Gumbel-softmax estimate (Jang et al., arXiv 1611.01144, section 2.2).

        Args:
            log_probs, noise: as of `decide`.
            temperature: of that softmax.
        """
        if not temperature > 0:
            raise ValueError(f"`temperature` must be a positive number, got {temperature!r}.")
        scores = log_probs if noise is None else log_probs + noise
        soft = (scores / temperature).softmax(-1)[..., 0]
        return TokenSelector.decide(log_probs, noise).to(soft.dtype) + (soft - soft.detach())


class TokenMerger(nn.Module):
    """Kept tokens see the kept ones before them, and in every block all dropped ones.

    Args:
        dim, num_layers, num_heads, mlp_hidden: of the transformer.
        norm_eps: of all norms.
        mask_smoothing: weight of what the decisions hide, see `armm.nn.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_hidden: int | None = None,
        norm_eps: float = 1e-5,
        mask_smoothing: float = 1e-6,
    ) -> None:
        super().__init__()
        self.context_norm = LayerNorm(dim, eps=norm_eps)
        self.transformer = QueryTransformer(
            dim,
            num_layers,
            num_heads,
            mlp_hidden=mlp_hidden,
            norm_eps=norm_eps,
            norm_out=True,
            mask_smoothing=mask_smoothing,
        )

    def forward(self, features: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """`[B, N, dim]` at all positions, of which those of kept tokens matter.

        Args:
            features: `[B, N, dim]`.
            keep: bool `[B, N]`, or the 0 and 1 of `TokenSelector.relax`, to which gradients then pass.
        """
        if not (keep.requires_grad and torch.is_grad_enabled()):
            keep = keep.bool()
        dropped = 1 - keep if keep.is_floating_point() else ~keep
        return self.transformer(
            self.context_norm(features), features, mask=causal_key_mask(keep), context_mask=key_mask(dropped)
        )


def gather_kept(tokens: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept tokens of each image in their order, padded with zeros behind: `[B, M, C]`, and their mask `[B, M]`.

    Args:
        tokens: `[B, N, C]`.
        keep: bool `[B, N]`.
    """
    lengths = keep.sum(1)
    longest = int(lengths.max())
    order = (~keep).long().argsort(dim=1, stable=True)[:, :longest]
    mask = torch.arange(longest, device=keep.device) < lengths[:, None]
    kept = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return kept.masked_fill(~mask.unsqueeze(-1), 0), mask
