"""Vectors of codes, for verifiers that ask which codes are alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from armm.decoding.speculative.stream import Target
    from armm.model import AutoregressiveModel

TABLES = ("embedding", "codebook")


def check_table(table: str, model: AutoregressiveModel, codebook: Tensor | None) -> None:
    """A ValueError unless codes of `model` have vectors in `table`."""
    if table == "codebook" and codebook is None:
        raise ValueError(
            "table='codebook' needs a tokenizer with code vectors, this one has none; use table='embedding'"
        )
    if model.sub_codes > 1:
        raise ValueError("codes with sub-codes have no vectors of their own to compare; use exact verification")


def code_vectors(table: str, target: Target, codebook: Tensor | None) -> Tensor:
    """float32 [V, C]: the vectors of a target's codes, from its input embedding or the tokenizer's codebook."""
    check_table(table, target.model, codebook)
    vectors = codebook if table == "codebook" else target.model.token_embedding.weight[target.low : target.high]
    vectors = vectors.detach().to(device=target.device, dtype=torch.float32)  # type: ignore[union-attr]
    if len(vectors) < target.vocabulary:
        raise ValueError(
            f"the table '{table}' has {len(vectors)} vectors for {target.vocabulary} codes; use table='embedding'"
        )
    return vectors
