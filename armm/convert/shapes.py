"""What every converter asks of a checkpoint and of the user: shapes, counts, options."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .containers import CheckpointKeysError, CheckpointShapeError


def read_options(config: Any, known: set[str], names: Mapping[str, str]) -> dict[str, Any]:
    """The options in `config` (a dict, a JSON file or None) by our names.

    Args:
        known: the options there are; others are a ValueError.
        names: the authors' names of options -> ours.
    """
    if config is None:
        return {}
    if isinstance(config, (str, Path)):
        path = Path(config)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"`config` {path} is not a readable JSON file ({error}).") from error
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a dict or the path of a JSON file with one, got {type(config).__name__}.")
    options = {str(names.get(key, key)): value for key, value in config.items() if value is not None}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown `config` options {', '.join(unknown)}: choose from {', '.join(sorted(known))}.")
    return options


def compare(options: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises a `CheckpointShapeError` where an option contradicts what was found in the tensors."""
    for name, value in found.items():
        given = options.get(name, value)
        given = list(given) if isinstance(given, (list, tuple)) else given
        if given != value:
            raise CheckpointShapeError(f"`config` says {name} = {given}, but the tensors of the file say {value}.")


def shape(state: Mapping[str, torch.Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of tensor `name`, which must be there and have `ndim` dimensions."""
    if name not in state:
        raise CheckpointKeysError(f"the checkpoint lacks {name}.", missing=[name])
    found = tuple(state[name].shape)
    if len(found) != ndim:
        raise CheckpointShapeError(f"{name} must have {ndim} dimensions, got shape {found}.")
    return found


def count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many different numbers the group of `pattern` finds in the names; they must be 0, 1, 2, ... without a gap."""
    numbers = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        expected = pattern.replace("\\", "").replace("(d+)", "N")
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        raise CheckpointKeysError(f"the checkpoint lacks tensors {expected}* for N = {missing}.", missing=[expected])
    return len(numbers)
