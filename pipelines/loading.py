"""Directories and hub repositories of pipelines: reading them strictly, writing them whole."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import logging
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin

from armm.nn.int8_weights import parameter_names

logger = logging.getLogger(__name__)

OUR_PACKAGES = ("armm", "tokenizers_visual", "pipelines")
INDEX_NAME = "model_index.json"
_WEIGHTS = re.compile(
    r"diffusion_pytorch_model(?P<variant>\.[^.]+?)??(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(?P<of_index>\.[^.]+)?\.json)?"
)


def check_choice(value: str, choices: list[str], what: str) -> None:
    """Raises a ValueError with near matches unless `value` is one of `choices`."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    raise ValueError(f"unknown {what} {value!r}: {hint}choose from {', '.join(choices) or 'none'}.")


def check_dtype(dtype: Any) -> None:
    """Raises TypeError unless `dtype` is None, a torch.dtype or a dict of them."""
    values = dtype.values() if isinstance(dtype, dict) else [dtype]
    for value in values:
        if value is not None and not isinstance(value, torch.dtype):
            raise TypeError(f"`dtype` must be a torch.dtype such as torch.bfloat16 (or a dict of them), got {value!r}.")


def rename_dtype(kwargs: dict[str, Any]) -> None:
    """Takes `torch_dtype`, the old name, out of `kwargs`, and checks `dtype`; two that differ are a ValueError."""
    old = kwargs.pop("torch_dtype", None)
    if old is not None and kwargs.get("dtype") not in (None, old):
        raise ValueError(f"`dtype` ({kwargs['dtype']}) and its old name `torch_dtype` ({old}) disagree: give one.")
    if old is not None:
        kwargs["dtype"] = old
    check_dtype(kwargs.get("dtype"))


# ---------------------------------------------------------------------- reading


def read_index(folder: Path) -> dict[str, Any]:
    """The parsed `model_index.json` of a pipeline directory."""
    path = folder / INDEX_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} is not a pipeline directory: it has no {INDEX_NAME}. Files of other formats: `armm convert`."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ValueError(f"{path} does not name its pipeline: `_class_name` must be a string.")
    return index


def components(index: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Component name -> (module, class) of an index."""
    return {
        name: (value[0], value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], str)
    }


def pipeline_class(index: dict[str, Any], folder: Any) -> type[DiffusionPipeline]:
    """The pipeline class that an index names, found among the public names of `pipelines`."""
    package = importlib.import_module("pipelines")
    name = index["_class_name"]
    if name not in package.__all__ or not name.endswith("Pipeline"):
        choices = [known for known in package.__all__ if known.endswith("Pipeline") and known != "ARPipeline"]
        check_choice(name, choices, f"pipeline class in {Path(folder) / INDEX_NAME}")
    return getattr(package, name)


def import_component_modules(index: dict[str, Any]) -> None:
    """Imports the modules of our own components: diffusers only looks into modules that are loaded already."""
    for name, (module, class_name) in components(index).items():
        if module.split(".")[0] not in OUR_PACKAGES:
            continue
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"component {name!r} of {INDEX_NAME} names the unknown module {module!r}; was it written by a newer armm?"
            ) from error
        if not hasattr(loaded, class_name):
            raise ValueError(f"component {name!r} of {INDEX_NAME}: module {module!r} has no class {class_name!r}.")


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The weight files of a component folder: one file, or the shards of its index; empty where there are none."""
    suffix = f".{variant}" if variant else ""
    for stem in (f"diffusion_pytorch_model{suffix}", "diffusion_pytorch_model"):
        for kind in ("safetensors", "bin"):
            single = folder / f"{stem}.{kind}"
            if single.is_file():
                return [single]
            tail = stem.removeprefix("diffusion_pytorch_model")
            index = folder / f"diffusion_pytorch_model.{kind}.index{tail}.json"
            if index.is_file():
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                return [folder / shard for shard in shards]
    return []


def variants(folder: Path) -> set[str]:
    """The variants of the weights in a component folder, `""` for those without one."""
    return {name for path in folder.iterdir() if (name := _variant(path)) is not None} if folder.is_dir() else set()


def safetensors_keys(path: Path) -> set[str]:
    """The tensor names in a safetensors file; a truncated or damaged file is a ValueError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError("the header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing.") from error
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}).") from error
    if size != 8 + length + end:
        raise ValueError(f"{path} is truncated: its header promises {8 + length + end} bytes, the file has {size}.")
    return set(header)


def _stored_keys(files: list[Path]) -> set[str]:
    keys: set[str] = set()
    for path in files:
        if path.suffix == ".safetensors":
            keys |= safetensors_keys(path)
        else:
            keys |= set(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    return keys


def _our_models(index: dict[str, Any], skip: set[str]) -> Iterator[str]:
    for name, (module, class_name) in components(index).items():
        if name in skip or module.split(".")[0] not in OUR_PACKAGES:
            continue
        if issubclass(getattr(importlib.import_module(module), class_name), ModelMixin):
            yield name


def check_component_files(folder: Path, index: dict[str, Any], *, skip: set[str], variant: str | None) -> None:
    """Raises ValueError where a component's folder, weights or config are missing or cut off, before anything is built."""
    for name in components(index):
        if name not in skip and not (folder / name).is_dir():
            raise ValueError(f"{folder} lacks the folder {name!r} that its {INDEX_NAME} names.")
    for name in _our_models(index, skip):
        files = weight_files(folder / name, variant)
        if not files:
            others = sorted(variants(folder / name))
            raise ValueError(
                f"{folder / name} holds no weights"
                + (f" but those of a variant: pass variant={others[0]!r}" if others else "")
                + ": expected diffusion_pytorch_model.safetensors."
            )
        _stored_keys([path for path in files if path.suffix == ".safetensors"])


def check_variant(folder: Path, variant: str | None) -> None:
    """Raises ValueError unless `variant` is None or some file of a pipeline directory is of it; other components have no variants."""
    if variant is not None and not any(f".{variant}." in path.name for path in folder.rglob("*")):
        found = sorted({name for path in folder.rglob("*") if (name := _variant(path))})
        raise ValueError(f"{folder} has no variant {variant!r}; it has {', '.join(map(repr, found)) or 'none'}.")


def check_loaded_weights(
    pipe: DiffusionPipeline, folder: Path, index: dict[str, Any], *, skip: set[str], variant: str | None
) -> None:
    """Raises ValueError unless each component took every tensor of its files and found every tensor it needs."""
    for name in _our_models(index, skip):
        stored = parameter_names(_stored_keys(weight_files(folder / name, variant)))
        needed = set(getattr(pipe, name).state_dict())
        if stored == needed:
            continue
        parts = []
        if needed - stored:
            parts.append(f"missing {shorten(needed - stored)}")
        if stored - needed:
            parts.append(f"unknown {shorten(stored - needed)}")
        raise ValueError(f"the weights in {folder / name} do not fit its config.json: {'; '.join(parts)}.")


def shorten(names: Any, limit: int = 8) -> str:
    """A sorted, quoted list of names that stays readable when there are hundreds."""
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more


# ---------------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_directory(destination: Any) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends well and vanishes when it does not.

    Into a folder that exists the files are moved one by one, `model_index.json` last; weight files of the same variant that the
    new ones replace (other shard counts) are removed.
    """
    destination = Path(destination)
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"cannot save to {destination}: it is a file, not a directory.")
    created = [folder for folder in destination.parents if not folder.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if destination.exists():
            _merge(temporary, destination)
        else:
            os.rename(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in created:
            folder.rmdir()
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _variant(path: Path) -> str | None:
    """The variant (`""` for none) of a weight file or a shard index, None for other files."""
    match = _WEIGHTS.fullmatch(path.name)
    return None if match is None else (match["variant"] or match["of_index"] or "").removeprefix(".")


def _merge(source: Path, destination: Path) -> None:
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == INDEX_NAME)
    written = {destination / path.relative_to(source) for path in files}
    for path in files:
        target = destination / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    for folder in {path.parent for path in written}:
        variants = {_variant(path) for path in written if path.parent == folder} - {None}
        for path in folder.iterdir():
            if path not in written and _variant(path) in variants:
                path.unlink()
