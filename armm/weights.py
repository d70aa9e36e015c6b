"""Where the shipped weights and recipes lie: inside the package in a wheel, beside it in a checkout."""

from __future__ import annotations

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent


def _folder(kind: str) -> Path | None:
    for candidate in (_PACKAGE / kind, _CHECKOUT / kind):
        if candidate.is_dir():
            return candidate
    return None


def _unknown(kind: str, name: str, known: list[str]) -> FileNotFoundError:
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.4)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return FileNotFoundError(f"no shipped {kind} named {name!r}; there are: {', '.join(known) or 'none'}.{hint}")


def names() -> list[str]:
    """Names of the shipped weights, sorted."""
    folder = _folder("weights")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder else []


def path(name: str) -> Path:
    """The folder of the shipped weights `name`; an unknown name is a FileNotFoundError that lists what there is."""
    known = names()
    folder = _folder("weights")
    if folder is None or name not in known:
        raise _unknown("weights", name, known)
    return folder / name


def recipe_names() -> list[str]:
    """Names of the shipped training recipes (without `.yaml`), sorted."""
    folder = _folder("recipes")
    return sorted(entry.stem for entry in folder.glob("*.yaml")) if folder else []


def recipe(name: str) -> Path:
    """The file of the shipped recipe `name`, with or without `.yaml`."""
    known = recipe_names()
    folder = _folder("recipes")
    stem = name.removesuffix(".yaml")
    if folder is None or stem not in known:
        raise _unknown("recipe", name, known)
    return folder / f"{stem}.yaml"
