"""Fewer image tokens on the way through the trunk: training-free pruning, and learned exits."""

from __future__ import annotations

from armm.pruning.base import PruningRun, VisualPruning
from armm.pruning.cost import Cost, text_cost
from armm.pruning.exits import VisualTokenExit, VisualTokenGates
from armm.pruning.transition import TokenPruning

__all__ = [
    "Cost",
    "PruningRun",
    "TokenPruning",
    "VisualPruning",
    "VisualTokenExit",
    "VisualTokenGates",
    "text_cost",
]
