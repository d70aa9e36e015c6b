"""ImageNet class names -> class indices, from the tables that timm ships."""

from __future__ import annotations

import difflib
from functools import lru_cache


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
