"""Converters: the files that authors published -> our modules. One module per family.

`convert(family, path)` returns a component; `load_single_file` of a family's module returns the components of its pipeline.
"""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType
from typing import Any

from .containers import (
    CheckpointError,
    CheckpointKeysError,
    CheckpointShapeError,
    UnreadableCheckpointError,
    UnsafeCheckpointError,
)

# Family -> the module with its `convert` and `load_single_file`.
FAMILIES: dict[str, str] = {
    "atoken": "armm.convert.atoken",
    "aurora": "armm.convert.aurora",
    "chameleon": "armm.convert.chameleon",
    "dar": "armm.convert.dar",
    "dualtoken": "armm.convert.dualtoken",
    "elm": "armm.convert.elm",
    "janus": "armm.convert.janus",
    "flowar": "armm.convert.flowar",
    "himar": "armm.convert.himar",
    "kl": "armm.convert.kl",
    "larp": "armm.convert.larp",
    "lavit": "armm.convert.lavit",
    "llamagen": "armm.convert.llamagen",
    "lumina_mgpt": "armm.convert.lumina_mgpt",
    "mar": "armm.convert.mar",
    "ming_univision": "armm.convert.ming_univision",
    "mingtok": "armm.convert.mingtok",
    "nar": "armm.convert.nar",
    "par": "armm.convert.par",
    "pure": "armm.convert.pure",
    "seed": "armm.convert.seed",
    "var": "armm.convert.var",
    "xar": "armm.convert.xar",
}

__all__ = [
    "FAMILIES",
    "CheckpointError",
    "CheckpointKeysError",
    "CheckpointShapeError",
    "UnreadableCheckpointError",
    "UnsafeCheckpointError",
    "convert",
    "family_module",
]


def family_module(family: str) -> ModuleType:
    """The converter of `family`; an unknown family is a ValueError with near matches."""
    if family not in FAMILIES:
        near = difflib.get_close_matches(str(family).lower(), FAMILIES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"unknown family {family!r}: {hint}there are converters for {', '.join(sorted(FAMILIES))}.")
    return importlib.import_module(FAMILIES[family])


def convert(family: str, path: Any, *, config: Any = None, **options: Any) -> Any:
    """The component in the checkpoint file `path`, published by the authors of `family`.

    Args:
        config: what the file does not say; see the family's module.
        options: further options of the family's `convert`, in every family `dtype` and `use_ema`.
    """
    return family_module(family).convert(path, config=config, **options)
