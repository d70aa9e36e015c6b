"""Why a model says what it says: maps of the image for each word, and the balance of its attention between text and image."""

from __future__ import annotations

from armm.explain.activation import (
    Activation,
    ActivationMaps,
    coherence_context,
    rank_biased_overlap,
    rank_gaussian,
    same_piece_context,
)
from armm.explain.balance import Balance, attention_balance
from armm.explain.explanation import Explanation
from armm.explain.scales import View, combine_views, views

__all__ = [
    "Activation",
    "ActivationMaps",
    "Balance",
    "Explanation",
    "View",
    "attention_balance",
    "coherence_context",
    "combine_views",
    "rank_biased_overlap",
    "rank_gaussian",
    "same_piece_context",
    "views",
]
