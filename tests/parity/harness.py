"""Finding and reading golden cases: what the authors' own code gave for tiny random checkpoints in their own file format.

The cases lie in `<root>/<family>/<case>/`, where the root is the environment variable ARMM_PARITY_DIR, or else `../shared/parity`
beside the checkout, or else the small committed subset in `tests/parity/cases`. Every case found is run; nothing here knows the
given ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]


def parity_root() -> Path:
    """The folder of the golden cases."""
    named = os.environ.get("ARMM_PARITY_DIR")
    if named:
        if not Path(named).is_dir():
            raise pytest.UsageError(f"ARMM_PARITY_DIR={named} is no directory")
        return Path(named)
    shared = CHECKOUT.parent / "shared" / "parity"
    return shared if shared.is_dir() else HERE / "cases"


@dataclass(frozen=True)
class Case:
    """One golden case: a checkpoint, its facts, and recorded inputs and outputs."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text(encoding="utf-8"))

    @cached_property
    def io(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "io.safetensors")

    @property
    def checkpoint(self) -> Path:
        """The checkpoint, in whichever kind of file the authors published."""
        (found,) = self.path.glob("checkpoint.*")
        return found


def cases(family: str, kind: str) -> list[Any]:
    """The cases of `family` whose config says `kind`, as pytest parameters."""
    folder = parity_root() / family
    found = [Case(path.parent) for path in sorted(folder.rglob("config.json"))]
    return [
        pytest.param(case, id=str(case.path.relative_to(folder))) for case in found if case.config.get("kind") == kind
    ]


@dataclass(frozen=True)
class Check:
    """One comparison of ours with the recorded: exact for integers, within `atol + rtol * |expected|` for floats."""

    name: str
    actual: torch.Tensor
    expected: torch.Tensor
    atol: float = 1e-4
    rtol: float = 0.0

    @property
    def problem(self) -> str | None:
        """What differs, or None."""
        actual, expected = self.actual, self.expected
        if actual.shape != expected.shape:
            return f"{self.name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
        if not expected.is_floating_point():
            wrong = int((actual.long() - expected.long()).abs().gt(self.atol if self.atol >= 1 else 0).sum())
            return f"{self.name}: {wrong} of {expected.numel()} values differ" if wrong else None
        infinite = torch.isinf(expected)
        if not torch.equal(torch.isinf(actual), infinite):
            return f"{self.name}: infinities differ"
        error = (actual.double() - expected.double()).abs().masked_fill(infinite, 0)
        excess = error - self.rtol * expected.double().abs().masked_fill(infinite, 0)
        if not float(excess.max()) <= self.atol:  # also catches NaN
            return f"{self.name}: largest error {float(error.max()):.2e}"
        return None


def first_problem(checks: Iterator[Check]) -> str | None:
    """The first thing that differs; later checks are not computed."""
    return next((check.problem for check in checks if check.problem), None)


def all_problems(checks: Iterator[Check]) -> list[str]:
    """Everything that differs."""
    return [check.problem for check in checks if check.problem]
