"""Folders in the layout of transformers: one weight file, or shards with an index, beside a `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from armm.hub import fetch_snapshot, resolve_file

from .containers import UnreadableCheckpointError, load_state_dict

_STEMS = ("model.safetensors", "pytorch_model.bin")


def resolve_folder_or_file(source: Any, **options: Any) -> Path:
    """A local folder or file for `source`: itself, the snapshot of the hub repository "organisation/repository", or a file on the
    hub.

    Args:
        options: of the hub.
    """
    text = str(source)
    if not Path(text).exists() and text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return fetch_snapshot(text, **options)
    return resolve_file(source, **options)


def weight_files(folder: Path) -> list[Path]:
    """The weight files in `folder`: safetensors before pickles, one file or all shards that the index names."""
    for stem in _STEMS:
        if (folder / stem).is_file():
            return [folder / stem]
        index = folder / f"{stem}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                raise UnreadableCheckpointError(f"{folder} lacks the shards {missing} that its {index.name} names.")
            return [folder / shard for shard in shards]
    raise UnreadableCheckpointError(f"{folder} holds no weights: none of {', '.join(_STEMS)} and their indices.")


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the weight files in `folder`, by the names their authors gave them."""
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        state |= load_state_dict(file)
    return state


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else is an error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableCheckpointError(f"{path} is not a readable JSON file ({error}).") from error
    if not isinstance(value, dict):
        raise UnreadableCheckpointError(f"{path} holds a {type(value).__name__}, not an object.")
    return value
