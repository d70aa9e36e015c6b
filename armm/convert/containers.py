"""Reading checkpoint files of any container without running code from them.

Published files are torch pickles or safetensors, flat or wrapped in one or two dictionaries, with or without the prefixes that
DistributedDataParallel and `torch.compile` add. `load_state_dict` returns the plain name -> tensor mapping of any of them, or
raises a `CheckpointError` that says what is wrong with the file.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Keys under which trainers put the weights, in the order in which they are tried; a flat file has none of them.
WEIGHT_KEYS = ("model", "module", "state_dict", "model_state_dict", "sd")
EMA_KEYS = ("ema", "model_ema", "ema_state_dict", "ema_sd")
# Wrappers add these in front of every name.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


class StoredOptions:
    """Stands for a class of options of somebody's training code, which is a dictionary in disguise: `_data`."""

    _data: Mapping[str, Any]


# Harmless classes found in published files, some of them read as a class of ours. Everything else that is not a tensor or plain
# data is refused.
ALLOWED_CLASSES: tuple[Any, ...] = (argparse.Namespace, (StoredOptions, "config_util.Config"))
# What torch's restricted unpickler says of objects that it would have to call or build.
_RUNS_CODE = re.compile(
    r"(?:unsupported global:? (?:global )?(?P<name>[\w.]+))|unrecognized function|can only create new object|can only build tensor"
    r"|corrupt or malicious",
    re.IGNORECASE,
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used."""


class UnreadableCheckpointError(CheckpointError):
    """Not a checkpoint, or one that is cut off or damaged."""


class UnsafeCheckpointError(CheckpointError):
    """A pickle that would run code when it is loaded."""


class CheckpointKeysError(CheckpointError):
    """Tensors that are missing or that nobody knows.

    Attributes:
        missing: names the checkpoint should hold but does not.
        unknown: names the checkpoint holds but should not.
    """

    def __init__(self, message: str, *, missing: list[str] | None = None, unknown: list[str] | None = None) -> None:
        super().__init__(message)
        self.missing = missing or []
        self.unknown = unknown or []


class CheckpointShapeError(CheckpointError):
    """Tensors whose shapes do not fit together."""


def load_state_dict(path: Any, *, use_ema: bool = False, keys: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """The weights in the checkpoint file `path`, by the names their authors gave them.

    Args:
        path: a `.pt`, `.pth`, `.bin`, `.ckpt` or `.safetensors` file.
        use_ema: take the moving average that some trainers store beside the weights.
        keys: further keys under which this family's trainer puts the weights, tried before the usual ones.

    Tensors may be backed by the file itself (memory mapping): copy what outlives it.
    """
    return strip_prefixes(unwrap(_read(Path(path)), path, use_ema=use_ema, keys=keys))


def load_arguments(path: Any) -> dict[str, Any]:
    """The constructor arguments that a trainer stored beside the weights in `path` (under "args"); empty where there are none."""
    return load_options(path, "args")


def load_options(path: Any, name: str) -> dict[str, Any]:
    """The options that a trainer stored beside the weights in `path` under `name`; empty where there are none."""
    content = _read(Path(path))
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        arguments = content.get(name)
        if isinstance(arguments, argparse.Namespace):
            return vars(arguments)
        if isinstance(arguments, StoredOptions):
            arguments = vars(arguments).get("_data")
        if isinstance(arguments, Mapping):
            return dict(arguments)
        key = _weights_key(content, False, ())
        if key is None:
            break
        content = content[key]
    return {}


def _read(path: Path) -> Any:
    if path.is_dir():
        raise UnreadableCheckpointError(f"{path} is a directory, not a checkpoint file.")
    if not path.is_file():
        raise UnreadableCheckpointError(f"there is no checkpoint file {path}.")
    return _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UnreadableCheckpointError(f"{path} is not a whole safetensors file ({error}).") from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        raise UnreadableCheckpointError(f"{path} is empty.")
    is_zip = zipfile.is_zipfile(path)
    if head.startswith(b"PK") and not is_zip:
        raise UnreadableCheckpointError(f"{path} is truncated: its archive has no end. Fetch it again.")
    try:
        with torch.serialization.safe_globals(list(ALLOWED_CLASSES)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # whatever damaged bytes lead to
        found = _RUNS_CODE.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            what = f" ({found['name']})" if found["name"] else ""
            raise UnsafeCheckpointError(
                f"{path} is refused: besides tensors it holds an object that would run code when loaded{what}. "
                "Convert it to safetensors with the software that wrote it, on a machine where that code may run."
            ) from error
        raise UnreadableCheckpointError(
            f"{path} is not a torch checkpoint, or a truncated one ({type(error).__name__})."
        ) from error


def unwrap(
    content: Any, path: Any = "the checkpoint", *, use_ema: bool = False, keys: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """The innermost name -> tensor mapping of what a checkpoint file held; training state beside it is left out."""
    for _ in range(3):
        if not isinstance(content, Mapping):
            raise UnreadableCheckpointError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.")
        key = _weights_key(content, use_ema, keys)
        if key is None:
            break
        logger.debug("%s: weights under %r", path, key)
        content, use_ema = content[key], False
    if not content:
        raise UnreadableCheckpointError(f"{path} holds no tensors.")
    if use_ema:
        raise CheckpointKeysError(
            f"{path} holds no moving average: none of the keys {', '.join(EMA_KEYS)}.", missing=list(EMA_KEYS)
        )
    wrong = sorted(str(name) for name, value in content.items() if not isinstance(value, torch.Tensor))
    if wrong:
        raise CheckpointKeysError(
            f"{path} is not a dictionary of tensors: {', '.join(map(repr, wrong[:8]))} are none. Looked for weights under "
            f"{', '.join(WEIGHT_KEYS)}.",
            unknown=wrong,
        )
    return dict(content)


def _weights_key(content: Mapping[str, Any], use_ema: bool, keys: tuple[str, ...] = ()) -> str | None:
    nested = [key for key, value in content.items() if isinstance(value, Mapping)]
    order = EMA_KEYS if use_ema else (*keys, *WEIGHT_KEYS, *EMA_KEYS)
    for key in order:
        if key in nested:
            return key
    return None


def strip_prefixes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` without the prefixes that wrappers put in front of every name."""
    state = dict(state)
    changed = True
    while changed:
        changed = False
        for prefix in WRAPPER_PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name[len(prefix) :]: value for name, value in state.items()}
                changed = True
    # torch.compile and FSDP of inner modules leave theirs in the middle of names
    inner = ("._orig_mod.", "._fsdp_wrapped_module.")
    renamed = {}
    for name, value in state.items():
        for part in inner:
            name = name.replace(part, ".")
        renamed[name] = value
    return renamed
