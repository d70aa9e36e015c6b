"""The decodings that a checkpoint offers beside its own: `decodings/<name>/` in its directory.

Such a folder has what changes with the decoding: a transformer trained for it, the strategy, and a `model_index.json` that names
both with their generation config and the pipeline's class, which may be another one. All other components are the directory's own.
"""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from armm.decoding import DECODING_STRATEGIES

from . import loading

FOLDER = "decodings"
PARTS = ("transformer", "decoding")


def decoding_name(index: dict[str, Any]) -> str | None:
    """The name of the decoding whose strategy an index holds; None where it holds none."""
    _, class_name = loading.components(index).get("decoding", ("", ""))
    return next((name for name, strategy in DECODING_STRATEGIES.items() if strategy.__name__ == class_name), None)


def offered(folder: Path, index: dict[str, Any]) -> list[str]:
    """Names of all decodings of a pipeline directory, its own first."""
    others = sorted(path.parent.name for path in (folder / FOLDER).glob(f"*/{loading.INDEX_NAME}"))
    return [name for name in (decoding_name(index), *others) if name]


def load(
    folder: Path, index: dict[str, Any], name: str, dtype: Any = None, variant: str | None = None
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The components of the decoding `name` of the directory `folder`.

    Args:
        name: `-` and `_` mean the same.
        dtype: as `ARPipeline.from_pretrained` takes it.
        variant: of the weights, where they have it.

    Returns:
        The folder they lie in, its index, and the components by name; no components where `name` is the directory's own decoding.

    Raises:
        ValueError: a decoding that the directory does not offer, or files that are missing.
    """
    key = name.replace("-", "_")
    loading.check_choice(key, offered(folder, index), f"`decoding` of {folder.name}")
    if key == decoding_name(index):
        return folder, index, {}
    folder = folder / FOLDER / key
    index = loading.read_index(folder)
    loading.import_component_modules(index)
    loading.check_component_files(folder, index, skip=set(), variant=variant)
    parts = {}
    for part, (module, class_name) in loading.components(index).items():
        component_class = getattr(importlib.import_module(module), class_name)
        options = {}
        if issubclass(component_class, ModelMixin):
            options["torch_dtype"] = dtype.get(part, dtype.get("default")) if isinstance(dtype, dict) else dtype
            options["variant"] = variant if variant in loading.variants(folder / part) else None
        parts[part] = component_class.from_pretrained(str(folder / part), **options)
    return folder, index, parts


def add(directory: str | Path, source: str | Path) -> Path:
    """Offers the decoding of one pipeline directory in another one of the same tokenizer and vocabulary.

    Args:
        directory: the pipeline directory that will offer one decoding more.
        source: a pipeline directory (the `export/` of a training run) with the transformer and the strategy.

    Returns:
        The new folder in `directory`.
    """
    directory, source = Path(directory), Path(source)
    index, other = loading.read_index(directory), loading.read_index(source)
    name = decoding_name(other)
    if name is None or name == decoding_name(index):
        raise ValueError(f"{source} has the decoding {name!r}, which {directory} has no use for.")
    if index.get("vocabulary") != other.get("vocabulary"):
        raise ValueError(f"the vocabularies of {source} and {directory} differ: they are not models of the same words.")
    kept = ("_class_name", "_diffusers_version", *PARTS, "generation_config")
    with loading.atomic_directory(directory / FOLDER / name) as temporary:
        for part in PARTS:
            shutil.copytree(source / part, temporary / part)
        text = json.dumps({key: other[key] for key in kept if key in other}, indent=2) + "\n"
        (temporary / loading.INDEX_NAME).write_text(text, encoding="utf-8")
    return directory / FOLDER / name
