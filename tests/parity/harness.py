"""Finding and reading golden cases: what the authors' own code gave for tiny random checkpoints in their own file format.

The cases lie in `<root>/<family>/<case>/`, where the root is the environment variable ARMM_PARITY_DIR, or else `../shared/parity`
beside the checkout, or else the small committed subset in `tests/parity/cases`. Every case found is run; nothing here knows the
given ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
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


def cases(family: str, kind: str | None = None) -> list[Any]:
    """The cases of `family` whose config says `kind` (None: says none), as pytest parameters."""
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


# ---------------------------------------------------------------------- tensors that cannot matter

GROUPS = 32  # of every group norm of a convolutional coder


def hidden_by_group_norm(name: str, state: dict[str, torch.Tensor]) -> str | None:
    """Why the tensor `name` of a convolutional coder may be scaled unnoticed, or None."""
    if ".conv1." in name and len(state[name]) == GROUPS:
        return "its output goes into a group norm with one channel a group, which drops each channel's scale and offset"
    if name.endswith(".bias") and len(state[name]) == GROUPS and adds_to_last_stage(name, state):
        return "a constant in each channel of what is only read through group norms with one channel a group"
    return None


def adds_to_last_stage(name: str, state: dict[str, torch.Tensor]) -> bool:
    """Whether `name` belongs to a layer whose output is added to the residual stream behind a coder's last change of resolution."""
    coder, _, rest = name.partition(".")
    levels = {int(key.split(".")[2]) for key in state if key.startswith("encoder.down.")}
    if coder not in ("encoder", "decoder") or (coder == "encoder" and not levels):
        return False
    if coder == "encoder":
        entry, stage = f"down.{max(levels) - 1}.downsample.", (f"down.{max(levels)}.", "mid.")
    else:
        entry, stage = "up.1.upsample.", ("up.0.",)
    return rest.startswith(entry) or (
        rest.startswith(stage) and rest.split(".")[-2] in ("conv2", "nin_shortcut", "proj_out")
    )


# ---------------------------------------------------------------------- the cases notice every tensor


def unnoticed_changes(
    model: torch.nn.Module,
    changes: Iterable[tuple[str, dict[str, torch.Tensor]]],
    checks: Callable[[str], Iterator[Check]],
) -> list[str]:
    """Names of the authors' tensors of which a change is not noticed; afterwards the model is as it was.

    Args:
        changes: (the authors' name, our tensors that it fills -> their changed values), one after the other.
        checks: the checks to run for a name; the sooner one of them fails, the cheaper.
    """
    parameters, unnoticed = model.state_dict(), []
    for name, changed in changes:
        saved = {target: parameters[target].clone() for target in changed}
        for target, value in changed.items():
            parameters[target].copy_(value)
        if first_problem(checks(name)) is None:
            unnoticed.append(name)
        for target, value in saved.items():
            parameters[target].copy_(value)
    return unnoticed


def staged(found: Iterator[tuple[str, Callable[[], Check]]], first: str | None) -> Iterator[Check]:
    """Checks by stage, computed when asked for; those of the stage `first` before the others."""
    stages = list(found)
    for wanted in (True, False):
        for stage, check in stages:
            if (stage == first) == wanted:
                yield check()
