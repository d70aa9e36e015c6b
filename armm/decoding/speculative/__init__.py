"""Speculative decoding: draft sources, verifiers, and the one loop that composes them."""

from __future__ import annotations

from armm.decoding.speculative.acceleration import (
    GroupedSpeculative,
    JacobiSpeculative,
    RelaxedSpeculative,
    Speculative,
)
from armm.decoding.speculative.chance import Numbers, PlaceNoise, WindowNumbers
from armm.decoding.speculative.draft import Draft, Drafting, DraftSource, Outcome, Window
from armm.decoding.speculative.draft_model import DraftModel
from armm.decoding.speculative.grouped import GroupedVerifier
from armm.decoding.speculative.jacobi import JacobiWindow
from armm.decoding.speculative.loop import speculate
from armm.decoding.speculative.medusa import MedusaDrafts, MedusaHeads, TypicalVerifier
from armm.decoding.speculative.recycling import TokenRecycling
from armm.decoding.speculative.relaxed import RelaxedVerifier
from armm.decoding.speculative.statistics import SpeculativeStatistics
from armm.decoding.speculative.strategy import SpeculativeDecoding
from armm.decoding.speculative.stream import Target
from armm.decoding.speculative.tree import DraftTree
from armm.decoding.speculative.verify import MatchVerifier, Verifier

__all__ = [
    "Draft",
    "DraftModel",
    "DraftSource",
    "DraftTree",
    "Drafting",
    "GroupedSpeculative",
    "GroupedVerifier",
    "JacobiSpeculative",
    "JacobiWindow",
    "MatchVerifier",
    "MedusaDrafts",
    "MedusaHeads",
    "Numbers",
    "Outcome",
    "PlaceNoise",
    "RelaxedSpeculative",
    "RelaxedVerifier",
    "Speculative",
    "SpeculativeDecoding",
    "SpeculativeStatistics",
    "Target",
    "TokenRecycling",
    "TypicalVerifier",
    "WindowNumbers",
    "Verifier",
    "Window",
    "speculate",
]
