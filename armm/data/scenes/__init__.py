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
from .language import QA, QUESTION_TYPES, Caption, Fact, caption, check_facts, describe_prompt, questions
from .render import object_map, project, render
from .vocabulary import (
    MAX_ANSWER_TOKENS,
    MAX_CAPTION_TOKENS,
    MAX_QUESTION_TOKENS,
    SPECIAL_TOKENS,
    VOCABULARY,
    detokenize,
    tokenize,
)

__all__ = [
    "COLORS",
    "Caption",
    "Fact",
    "LIGHTS",
    "MATERIALS",
    "MAX_ANSWER_TOKENS",
    "MAX_CAPTION_TOKENS",
    "MAX_OBJECTS",
    "MAX_QUESTION_TOKENS",
    "QA",
    "QUESTION_TYPES",
    "RELATIONS",
    "RGB",
    "SHAPES",
    "SIZES",
    "SPECIAL_TOKENS",
    "SceneDataset",
    "Scenes",
    "VOCABULARY",
    "caption",
    "centre_heights",
    "check_facts",
    "describe_prompt",
    "detokenize",
    "is_heldout",
    "object_map",
    "project",
    "questions",
    "relation",
    "render",
    "sample_scenes",
    "tokenize",
    "unproject",
]
