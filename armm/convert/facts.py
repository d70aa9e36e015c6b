"""What a converter knows about a checkpoint: sizes read off the tensors, and options given beside the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .containers import CheckpointKeysError, CheckpointShapeError


def read_mapping(config: Any) -> dict[str, Any]:
    """`config`: None, a dict, or the path of a JSON file with one."""
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
    return dict(config)


def read_options(config: Any, names: Mapping[str, str], known: set[str]) -> dict[str, Any]:
    """The options in `config` (see `read_mapping`) that are not None, under our names.

    Args:
        names: the authors' names of options -> ours.
        known: our names; an option that is none of them is a ValueError.
    """
    config = read_mapping(config)
    options = {str(names.get(key, key)): value for key, value in config.items() if value is not None}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(f"unknown `config` options {', '.join(unknown)}: choose from {', '.join(sorted(known))}.")
    return options


def compare(options: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises unless `options` agree with what was `found` in the tensors."""
    for name, value in found.items():
        given = options.get(name, value)
        given = list(given) if isinstance(given, (list, tuple)) else given
        if given != value:
            raise CheckpointShapeError(f"`config` says {name} = {given}, but the tensors of the file say {value}.")


def shape(state: Mapping[str, torch.Tensor], name: str, ndim: int) -> tuple[int, ...]:
    """Shape of the tensor `name`, which must be there and have `ndim` dimensions."""
    if name not in state:
        raise CheckpointKeysError(f"the checkpoint lacks {name}.", missing=[name])
    found = tuple(state[name].shape)
    if len(found) != ndim:
        raise CheckpointShapeError(f"{name} must have {ndim} dimensions, got shape {found}.")
    return found


def count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many numbers 0, 1, ... the group of `pattern` takes in the names; a gap is an error."""
    numbers = {int(match[1]) for name in state if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))) or not numbers:
        expected = pattern.replace("\\", "").replace("(d+)", "N")
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        raise CheckpointKeysError(f"the checkpoint lacks tensors {expected}* for N = {missing}.", missing=[expected])
    return len(numbers)


def dtype_of(dtype: torch.dtype | dict[str, torch.dtype] | None, name: str) -> torch.dtype | None:
    """The dtype of the component `name`, where a dict names components and "default"."""
    return dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype


def split_prefix(
    state: Mapping[str, torch.Tensor], prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors under `prefix`, named without it, and all others; a CheckpointKeysError where there are none under it."""
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not inside:
        raise CheckpointKeysError(f"the checkpoint lacks {prefix}*.", missing=[f"{prefix}*"])
    return inside, {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
