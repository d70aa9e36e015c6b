"""Folders in the layout of transformers: one weight file, or shards with an index, beside a `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from armm.hub import fetch_snapshot, resolve_file

from .containers import CheckpointKeysError, UnreadableCheckpointError, load_state_dict, strip_prefixes

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


def load_folder(source: Path, *, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """All tensors of `source`, by the names their authors gave them.

    Args:
        source: a folder, of which safetensors are read before pickles; the index (JSON) of shards; or one weight file.
        use_ema: take the moving average stored beside the weights.
    """
    if source.is_file():
        return _load_shards(source, use_ema) if source.suffix == ".json" else load_state_dict(source, use_ema=use_ema)
    for stem in _STEMS:
        if (source / stem).is_file():
            return load_state_dict(source / stem, use_ema=use_ema)
        if (source / f"{stem}.index.json").is_file():
            return _load_shards(source / f"{stem}.index.json", use_ema)
    raise UnreadableCheckpointError(f"{source} holds no weights: none of {', '.join(_STEMS)} and their indices.")


def _load_shards(index: Path, use_ema: bool) -> dict[str, torch.Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UnreadableCheckpointError(f"{index} has no `weight_map`: it does not say where the tensors are.")
    shards = sorted(set(map(str, places.values())))
    strange = [shard for shard in shards if Path(shard).name != shard]
    if strange:
        raise UnreadableCheckpointError(f"{index} names {strange}: shards must lie beside it.")
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise UnreadableCheckpointError(f"{index.parent} lacks the shards {absent} that its {index.name} names.")
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        state |= load_state_dict(index.parent / shard, use_ema=use_ema)
    missing = sorted(set(strip_prefixes(places)) - set(state))
    if missing:
        raise CheckpointKeysError(f"the shards of {index} lack {', '.join(missing[:8])}.", missing=missing)
    return state


def read_beside(source: Path, name: str = "config.json") -> dict[str, Any]:
    """The JSON file `name` in the folder `source`, or beside the file `source`; empty where there is none."""
    path = (source if source.is_dir() else source.parent) / name
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; anything else is an error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableCheckpointError(f"{path} is not a readable JSON file ({error}).") from error
    if not isinstance(value, dict):
        raise UnreadableCheckpointError(f"{path} holds a {type(value).__name__}, not an object.")
    return value
