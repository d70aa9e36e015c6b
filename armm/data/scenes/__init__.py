"""Scenes: captioned pictures of solids on a plane, drawn on the fly; the data set that needs no download."""

from .dataset import SceneDataset
from .geometry import centre_heights, unproject
from .graph import (
    COLORS,
    LIGHTS,
    MATERIALS,
    MAX_OBJECTS,
    RELATIONS,
    RGB,
    SHAPES,
    SIZES,
    Scenes,
    is_heldout,
    relation,
    sample_scenes,
)
from .render import object_map, project, render

__all__ = [
    "COLORS",
    "LIGHTS",
    "MATERIALS",
    "MAX_OBJECTS",
    "RELATIONS",
    "RGB",
    "SHAPES",
    "SIZES",
    "SceneDataset",
    "Scenes",
    "centre_heights",
    "is_heldout",
    "object_map",
    "project",
    "relation",
    "render",
    "sample_scenes",
    "unproject",
]
