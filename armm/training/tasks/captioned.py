"""What the tasks share that train a transformer to draw captions with a tokenizer that was trained before."""

from __future__ import annotations

import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from armm.decoding.base import Trunk
from armm.model_base import TrunkModel
from armm.nn.int8_weights import pack_file
from armm.training.recipe import Recipe
from armm.training.task import TrainingTask, cast_weights, fresh_copy

from .unified_rows import save_captioned_grid


class CaptionedImagesTask(TrainingTask):
    """Base of these tasks; subclasses set the attributes.

    Attributes:
        model: what is trained.
        settings: of the recipe's `model`; `compile` is read here.
        data: of the recipe; `tokenizer`, a directory, is read here.
        unseen_prompts: of the samples.
    """

    export_dtypes = (*TrainingTask.export_dtypes, "int8")

    model: TrunkModel
    settings: dict[str, Any]
    data: dict[str, Any]
    unseen_prompts: list[str]

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._compiled: dict[nn.Module, Trunk] = {}

    @abstractmethod
    def pipeline(self) -> Any:
        """The model as it stands, as a pipeline."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [p for p in self.model.trunk.blocks.parameters() if p.ndim == 2]

    def in_training(self, module: nn.Module) -> Trunk:
        """A part of the model as the loss calls it: compiled in training, if the recipe wants it."""
        if not (self.settings["compile"] and self.module.training):
            return module
        if module not in self._compiled:
            self._compiled[module] = torch.compile(module.forward, dynamic=False)
        return self._compiled[module]

    def sample(self, path: Path) -> None:
        generators = [torch.Generator().manual_seed(index) for index in range(len(self.unseen_prompts))]
        images = self.pipeline()(self.unseen_prompts, generator=generators).images
        save_captioned_grid(images, self.unseen_prompts, path)

    def export(self, directory: Path) -> None:
        pipe = self.pipeline()
        pipe.register_modules(transformer=cast_weights(fresh_copy(self.model), self.export_dtype))
        pipe.save_pretrained(directory)
        if self.recipe.export_dtype == "int8":
            pack_file(directory / "transformer" / SAFETENSORS_WEIGHTS_NAME)
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):  # as the tokenizer's own recipe exported it
            shutil.copyfile(Path(self.data["tokenizer"]) / name, directory / "tokenizer" / name)
