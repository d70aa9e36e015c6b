"""A training task: what is trained, on which batches, against which loss. The trainer knows no more than this."""

from __future__ import annotations

import difflib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from .recipe import Recipe

TASKS = {
    "vq_tokenizer": "armm.training.tasks.vq_tokenizer:VQTokenizerTask",
    "kl_tokenizer": "armm.training.tasks.kl_tokenizer:KLTokenizerTask",
    "masked_latent": "armm.training.tasks.masked_latent:MaskedLatentTask",
    "next_x": "armm.training.tasks.next_x:NextXTask",
    "unified": "armm.training.tasks.unified:UnifiedTask",
    "recogniser": "armm.training.tasks.recogniser:RecogniserTask",
}

Batch = dict[str, torch.Tensor]


class TrainingTask(ABC):
    """Base of all tasks.

    A batch is a pure function of (seed, step, rank): that is why a resumed run continues bit for bit.
    Attributes:
        module: everything trained and checkpointed, in one module.
        adversary: a second network with its own optimizer that is trained against `module`, or None.
    """

    module: nn.Module
    adversary: nn.Module | None = None
    export_dtypes: ClassVar[tuple[str, ...]] = ("fp32", "bf16", "fp16")

    def __init__(self, recipe: Recipe) -> None:
        if recipe.export_dtype not in self.export_dtypes:
            allowed = ", ".join(self.export_dtypes)
            raise ValueError(f"`export_dtype` of the task {recipe.task!r} must be one of {allowed}, got {recipe.export_dtype!r}.")
        self.recipe = recipe

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Makes or loads the data once, before the first step."""

    @abstractmethod
    def batch(self, step: int, size: int, rank: int) -> Batch:
        """The batch of `step`, on the training device."""

    @abstractmethod
    def loss(self, batch: Batch, step: int, progress: float) -> tuple[torch.Tensor, Batch]:
        """Scalar loss and detached scalars for the log; called under autocast. `progress` runs from 0 to 1."""

    def adversary_loss(self, batch: Batch, step: int) -> torch.Tensor | None:
        """Loss of `adversary` after the step of `module`, or None while it rests."""
        return None

    def after_step(self, step: int, progress: float) -> None:  # noqa: B027
        """Runs after each optimizer step (moving averages and the like)."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices that Muon may update: between hidden states, so neither embeddings nor heads. None by default."""
        return []

    def parameter_groups(self, without: Collection[nn.Parameter] = ()) -> list[dict]:
        """All parameters but those in `without`; weight decay on matrices only."""
        taken = {id(p) for p in without}
        parameters = [p for p in self.module.parameters() if p.requires_grad and id(p) not in taken]
        return [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Figures on unseen data."""

    @abstractmethod
    def sample(self, path: Path) -> None:
        """Writes a PNG that shows what the model does now."""

    @abstractmethod
    def export(self, directory: Path) -> None:
        """Writes the trained weights in their shipped form."""

    def generator(self, step: int, rank: int, stream: int = 0) -> torch.Generator:
        """A generator that depends on nothing but the recipe's seed and the arguments."""
        seed = ((self.recipe.seed * 1_000_003 + step) * 64 + rank) * 8 + stream
        return torch.Generator().manual_seed(seed)

    @property
    def export_dtype(self) -> torch.dtype:
        """dtype of the exported parameters (before they are packed, if they are)."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.recipe.export_dtype, torch.float32)


def fresh_copy(model: nn.Module) -> nn.Module:
    """A copy of a diffusers model without what its config says of where it was loaded from."""
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    copy = type(model)(**config)
    copy.load_state_dict(model.state_dict())
    return copy


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts floating-point weights in place, except in submodules that the module's class keeps in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and not kept & set(name.split(".")):
            tensor.data = tensor.data.to(dtype)
    return module


def build_task(recipe: Recipe) -> TrainingTask:
    """The task that a recipe names."""
    if recipe.task not in TASKS:
        near = difflib.get_close_matches(recipe.task, TASKS, 2)
        hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}."
        raise ValueError(f"Unknown task {recipe.task!r}; {hint}")
    module, _, name = TASKS[recipe.task].partition(":")
    return getattr(importlib.import_module(module), name)(recipe)
