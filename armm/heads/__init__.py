"""Heads: from a hidden state to a distribution or a value."""

from __future__ import annotations

from armm.heads.adaptive import AdaptiveHead
from armm.heads.categorical import CategoricalHead

__all__ = ["AdaptiveHead", "CategoricalHead"]
