"""One row of the table of published checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ZooEntry:
    """One published checkpoint.

    Args:
        name: how `armm.pipeline` and `armm zoo` call it.
        family: the converter that reads its files.
        task: "class-to-image", "text-to-image", "text-and-image" (draws, reads and converses), "restoration" or "tokenizer".
        repo: hub repository of `file`, or the address of the folder where its authors keep it.
        file: the authors' own file; empty where the whole repository is the checkpoint.
        parameters: of the model in `file`, in millions.
        licence: as the authors state it.
        image_size: side of the images in pixels; 0 for tokenizers, which take any size.
        tokenizer: zoo name of the tokenizer whose codes the model speaks.
        text_encoder: hub id of the text encoder, stored apart by the authors.
        generation_config: the preset its authors used.
        figures: published quality figures, by name.
        config: what the file does not say about its model.
        paper: arXiv number.
    """

    name: str
    family: str
    task: str
    repo: str
    file: str
    parameters: float
    licence: str
    image_size: int = 0
    tokenizer: str | None = None
    text_encoder: str | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    paper: str = ""

    @property
    def is_restricted(self) -> bool:
        """Whether the licence limits what the weights may be used for."""
        licence = self.licence.lower()
        return any(word in licence for word in ("non-commercial", "community", "research", "use policy"))
