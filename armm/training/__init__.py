"""Training: recipes (YAML), tasks (what is trained) and one trainer (how), on accelerate."""

from __future__ import annotations

from .recipe import Recipe, load_recipe
from .task import TASKS, TrainingTask, build_task
from .trainer import run

__all__ = ["TASKS", "Recipe", "TrainingTask", "build_task", "load_recipe", "run"]
