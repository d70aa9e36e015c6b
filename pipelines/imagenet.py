"""ImageNet class names -> class indices, from the tables that timm ships."""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def class_names() -> dict[str, tuple[int, ...]]:
    """Lower-case name (each synonym, the full description and the WordNet id) -> indices of the classes so called."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    names: dict[str, tuple[int, ...]] = {}
    for index, (label, description) in enumerate(zip(info.label_names(), info.label_descriptions(), strict=True)):
        synonyms = [part.strip().lower() for part in description.split(",")]
        for name in dict.fromkeys([*synonyms, description.lower(), label]):
            names[name] = (*names.get(name, ()), index)
    return names


def class_index(name: str) -> int:
    """The index of the ImageNet class `name` ("golden retriever"); unknown and ambiguous names are a ValueError."""
    names = class_names()
    found = names.get(name.strip().lower(), ())
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"`class_labels`: {name!r} is the name of {len(found)} ImageNet classes; give one of the numbers {list(found)}."
        )
    near = difflib.get_close_matches(name.strip().lower(), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else " Give a class number instead."
    raise ValueError(f"`class_labels`: no ImageNet class is called {name!r}.{hint}")


def class_indices(class_labels: Any, classes: int) -> list[int]:
    """`class_labels` (numbers, ImageNet names, or a tensor) as checked indices of a model with so many `classes`."""
    import numpy as np

    if hasattr(class_labels, "tolist"):
        class_labels = class_labels.tolist()
    labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
    if not labels:
        raise ValueError("`class_labels` is empty: give at least one class.")
    indices = []
    for label in labels:
        if isinstance(label, str):
            if classes != 1000:
                raise ValueError(
                    f"class names are known for ImageNet's 1000 classes; this checkpoint has {classes}: give numbers."
                )
            label = class_index(label)
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
            raise TypeError(f"`class_labels` must be class numbers or names, got {label!r}.")
        if not 0 <= label < classes:
            raise ValueError(f"`class_labels` must lie between 0 and {classes - 1}, got {label}.")
        indices.append(int(label))
    return indices
