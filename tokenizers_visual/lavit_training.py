"""The objective that LaVIT's tokenizer and decoder are trained with (Jin et al., arXiv 2309.04669, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .lavit import LaVITTokenizer, SelectedCodes
from .lavit_decoder import LaVITDecoder
from .quantizers import Generators

__all__ = ["LaVITLosses", "lavit_losses"]


class LaVITLosses(NamedTuple):
    """Four scalars, whose weighted sum (`total`) training minimises, and `selected`, what they were computed from.

    `reconstruction`: one less the cosine of restored and original features. `rate`: squared distance of the share of kept patches to the
    wanted one. `codebook`: of the codes to the vectors; `commitment`: of the vectors to the codes.
    """

    reconstruction: torch.Tensor
    rate: torch.Tensor
    codebook: torch.Tensor
    commitment: torch.Tensor
    selected: SelectedCodes

    def total(self, rate: float = 2.0, codebook: float = 1.0, commitment: float = 0.25) -> torch.Tensor:
        """The weighted sum. With `codebook=0` the codes are to be moved by a `MovingAverageCodebook`, from `selected.vectors` and
        `selected.quantized.ids[selected.mask]`."""
        return self.reconstruction + rate * self.rate + codebook * self.codebook + commitment * self.commitment


def lavit_losses(
    tokenizer: LaVITTokenizer,
    decoder: LaVITDecoder,
    pixels: torch.Tensor,
    *,
    keep_rate: float = 1 / 3,
    generator: Generators = None,
    noise: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> LaVITLosses:
    """How well `decoder` restores the features of images from their codes, and what that takes.

    The features of the vision transformer are the teacher: no gradient passes through them as a target. The transformer itself is meant to
    be frozen (`tokenizer.vision.requires_grad_(False)`); unfrozen, it learns features that codes can restore, which may be none. The
    authors have published no training code: the rate, the weights in `LaVITLosses.total` and the mean of the rate over the batch,
    not each image, so that images may differ in length, are choices of ours.

    Args:
        tokenizer: what is trained; its reading side is not, a language model trains that.
        decoder: with one query for each patch and features as wide as the tokenizer's.
        pixels: `[B, 3, S, S]` in [-1, 1].
        keep_rate: share of the patches that is to be kept, in (0, 1].
        generator, noise, temperature: as of `LaVITTokenizer.forward`.
    """
    wanted = (tokenizer.latent_channels, tokenizer.max_tokens, tokenizer.config.dim)
    given = (decoder.config.code_dim, decoder.config.num_queries, decoder.config.feature_dim)
    if given != wanted:
        raise ValueError(
            f"`decoder` restores the features of this tokenizer with code_dim, num_queries and feature_dim {wanted}, got {given}."
        )
    if not 0 < keep_rate <= 1:
        raise ValueError(f"`keep_rate` must lie in (0, 1], got {keep_rate!r}.")
    selected = tokenizer(pixels, generator=generator, noise=noise, temperature=temperature)
    quantized = selected.quantized
    restored = decoder.features(quantized.vectors, selected.mask)
    cosine = F.cosine_similarity(restored.float(), selected.features.detach().float(), dim=-1)
    rate = (selected.keep.mean() - keep_rate).square()
    return LaVITLosses(1 - cosine.mean(), rate, quantized.codebook_loss, quantized.commitment_loss, selected)
