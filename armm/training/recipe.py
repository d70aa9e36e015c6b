"""Recipes: the YAML files that say everything about a training run."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

SCHEDULES = ("cosine", "flat_linear", "constant")
PRECISIONS = ("no", "bf16", "fp16")


class _Loader(yaml.SafeLoader):
    """Reads floats as YAML 1.2 does: with an exponent they need no point and no sign (`4e-4`, `1E3`, `1.e5`)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def read_yaml(text: str) -> Any:
    """The content of a YAML text; one that is not valid is a `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


@dataclass(frozen=True)
class OptimizerRecipe:
    """AdamW and its learning rate; Muon for the hidden matrices if `matrix_learning_rate` is given.

    Args:
        learning_rate: peak.
        matrix_learning_rate: peak for the weight matrices of a transformer's blocks, which `torch.optim.Muon` then updates
            (orthogonalised momentum, Jordan et al. 2024; scaled to the size of AdamW's updates, Liu et al. 2025, section
            2.2). 0: AdamW updates everything.
        warmup_steps: linear ramp from 0.
        schedule: "cosine"; "flat_linear" (flat for the first half, then a straight line down); or "constant".
        final_fraction: of the peak that is left at the end.
        clip: largest gradient norm; 0 turns clipping off.
    """

    learning_rate: float = 1e-3
    matrix_learning_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 50
    schedule: str = "cosine"
    final_fraction: float = 0.02
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (list, tuple)):
            raise ValueError(f"`optimizer.betas` must be two numbers in [0, 1), got {self.betas!r}.")
        object.__setattr__(self, "betas", tuple(self.betas))
        _choice("optimizer.schedule", self.schedule, SCHEDULES)
        for name in ("learning_rate", "matrix_learning_rate", "weight_decay", "warmup_steps", "final_fraction", "clip"):
            _number(f"optimizer.{name}", getattr(self, name))
        for beta in self.betas:
            _number("optimizer.betas", beta)
        if self.learning_rate <= 0:
            raise ValueError(f"`optimizer.learning_rate` must be positive, got {self.learning_rate}.")
        if self.matrix_learning_rate < 0:
            raise ValueError(f"`optimizer.matrix_learning_rate` must not be negative, got {self.matrix_learning_rate}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"`optimizer.betas` must be two numbers in [0, 1), got {list(self.betas)}.")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of `step` (0-based) of a run of `steps`, as a fraction of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        if self.schedule == "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        elif self.schedule == "flat_linear":
            share = min(1.0, 2.0 * (1.0 - progress))
        else:
            return 1.0
        return self.final_fraction + (1.0 - self.final_fraction) * share


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Args:
        task: a name of `armm.training.TASKS`.
        output: directory of checkpoints, logs, sample grids and, at the end, the exported weights.
        steps: optimizer steps in all.
        batch_size: rows of a step of one process: a number, or `[[from_fraction, size], ...]` to change it on the way.
        precision: autocast dtype; "bf16" is several times faster than "no" where the processor has it.
        export_dtype: dtype of the exported weights; "int8" stores matrices as integers with a scale per row.
        checkpoint_minutes: minutes between checkpoints.
        log_every, validate_every, sample_every: steps; 0 turns it off.
        model, data, loss: mappings that the task reads; unknown keys are errors.
    """

    task: str
    output: str
    steps: int
    seed: int = 0
    batch_size: int | Sequence[Sequence[float]] = 32
    precision: str = "bf16"
    export_dtype: str = "bf16"
    checkpoint_minutes: float = 3.0
    log_every: int = 20
    validate_every: int = 1000
    sample_every: int = 1000
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _choice("precision", self.precision, PRECISIONS)
        _choice("export_dtype", self.export_dtype, ("fp32", "bf16", "fp16", "int8"))
        for name, value in (("steps", self.steps), ("seed", self.seed)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        sizes = [self.batch_size] if isinstance(self.batch_size, int) else [pair[1] for pair in self.batch_size]
        if not sizes or any(int(size) != size or size < 1 for size in sizes):
            raise ValueError(f"`batch_size` must be a positive number or [[from_fraction, size], ...], got {self.batch_size}.")
        if not isinstance(self.batch_size, int) and self.batch_size[0][0] != 0:
            raise ValueError(f"`batch_size` must start with fraction 0, got {self.batch_size}.")

    def batch_size_at(self, step: int) -> int:
        """Rows of the batch of `step`."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        return int([size for start, size in self.batch_size if step >= start * self.steps][-1])


def take(mapping: Mapping[str, Any], name: str, **defaults: Any) -> dict[str, Any]:
    """`defaults` overridden by `mapping`; a key that is not among the defaults is a ValueError with near matches."""
    for key in mapping:
        if key not in defaults:
            near = difflib.get_close_matches(str(key), defaults, 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(defaults))}."
            raise ValueError(f"Unknown key `{name}.{key}` in the recipe; {hint}")
    return {**defaults, **mapping}


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None, output: str | Path | None = None) -> Recipe:
    """Reads a YAML recipe.

    Args:
        path: of the file.
        overrides: dotted keys and values that replace the file's, such as `{"optimizer.learning_rate": 1e-3}`.
        output: replaces the recipe's output directory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mapping, unknown or missing keys, values out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No recipe at {path}.")
    try:
        content = read_yaml(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of recipe keys, got {type(content).__name__}.")
    for dotted, value in (overrides or {}).items():
        *parents, last = dotted.split(".")
        target = content
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"Override `{dotted}`: `{parent}` is not a mapping in {path.name}.")
        target[last] = value
    if output is not None:
        content["output"] = str(output)
    missing = [key for key in ("task", "output", "steps") if key not in content]
    if missing:
        raise ValueError(f"{path.name} lacks the keys {', '.join(missing)}.")
    values = take(content, "recipe", **{f.name: content.get(f.name) for f in fields(Recipe)})
    values = {key: value for key, value in values.items() if key in content}
    if values.get("precision") is False:  # what YAML makes of an unquoted `no`
        values["precision"] = "no"
    optimizer = take(values.get("optimizer", {}), "optimizer", **{f.name: f.default for f in fields(OptimizerRecipe)})
    try:
        return Recipe(**{**values, "optimizer": OptimizerRecipe(**optimizer)})
    except TypeError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"`{name}` must be a number, got {value!r}.")


def _choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
