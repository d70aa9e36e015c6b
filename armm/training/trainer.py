"""The training loop: accelerate underneath, checkpoints that resume bit for bit, a loss log, sample grids."""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from .recipe import Recipe, load_recipe
from .task import Batch, TrainingTask, build_task

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"


def run(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Path:
    """Trains what a recipe says and exports the weights.

    Args:
        recipe: path of a YAML file, or a `Recipe`.
        overrides: dotted keys that replace the file's (only with a path).
        output: replaces the recipe's output directory.
        resume: continue from the checkpoint in the output directory, if there is one.
        progress: show a progress bar.

    Returns:
        The directory of the exported weights, `<output>/export`.

    Raises:
        FileExistsError: the output directory holds a run and `resume` is False.
        ValueError: the recipe, or the checkpoint of another recipe.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides, output)
    directory = Path(recipe.output)
    if (directory / CHECKPOINT).exists() and not resume:
        raise FileExistsError(f"{directory} already holds a training run: resume it, or choose another output directory.")
    accelerator = Accelerator(mixed_precision=recipe.precision)
    torch.manual_seed(recipe.seed)
    random.seed(recipe.seed)
    np.random.seed(recipe.seed)
    task = build_task(recipe)
    task.module.to(accelerator.device)
    if task.adversary is not None:
        task.adversary.to(accelerator.device)
    if accelerator.is_main_process:
        directory.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        task.prepare(accelerator.device)
    loop = _Loop(recipe, task, accelerator, directory)
    if resume and (directory / CHECKPOINT).exists():
        loop.restore()
    loop.train(progress)
    export = directory / "export"
    if accelerator.is_main_process:
        task.export(export)
        record = loop.record()
        _write_atomically(directory / "record.json", json.dumps(record, indent=1).encode())
    accelerator.wait_for_everyone()
    return export


class _Step(nn.Module):
    """Gives the task's loss a `forward`, which is what accelerate (and its processes) can wrap."""

    def __init__(self, task: TrainingTask) -> None:
        super().__init__()
        self.module = task.module
        self._loss = task.loss

    def forward(self, batch: Batch, step: int, progress: float) -> tuple[torch.Tensor, Batch]:
        return self._loss(batch, step, progress)


class _Loop:
    def __init__(self, recipe: Recipe, task: TrainingTask, accelerator: Accelerator, directory: Path) -> None:
        self.recipe = recipe
        self.task = task
        self.accelerator = accelerator
        self.directory = directory
        self.step = 0
        self.seconds = 0.0
        self.samples = 0
        self.last_logs: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.model = _Step(task)
        matrices = task.hidden_matrices() if recipe.optimizer.matrix_learning_rate else []
        self.optimizers = [_adamw(task.parameter_groups(without=matrices), recipe)]
        if matrices:
            self.optimizers.append(_muon(matrices, recipe))
        self.model, *self.optimizers = accelerator.prepare(self.model, *self.optimizers)
        self.adversary_optimizers: list[Any] = []
        if task.adversary is not None:
            optimizer = _adamw(task.adversary.parameters(), recipe)
            task.adversary, optimizer = accelerator.prepare(task.adversary, optimizer)
            self.adversary_optimizers = [optimizer]

    def train(self, progress: bool) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        main = accelerator.is_main_process
        bar = tqdm(total=recipe.steps, initial=self.step, disable=not (progress and main), desc=recipe.task, unit="step")
        saved = started = time.monotonic()
        before = self.seconds
        log = open(self.directory / "log.jsonl", "a") if main else None
        self.task.module.train()
        while self.step < recipe.steps:
            logs = self._one_step()
            self.step += 1
            self.seconds = before + time.monotonic() - started
            step, last = self.step, self.step == recipe.steps
            bar.update()
            if main and log is not None and (last or (recipe.log_every and step % recipe.log_every == 0)):
                self.last_logs = {name: round(value.item(), 6) for name, value in logs.items()}
                bar.set_postfix(self.last_logs)
                entry = {"step": step, "seconds": round(self.seconds, 1), "samples": self.samples, **self.last_logs}
                log.write(json.dumps(entry) + "\n")
                log.flush()
            if main and log is not None and (last or (recipe.validate_every and step % recipe.validate_every == 0)):
                self.last_validation = self._evaluated(self.task.validate)
                log.write(json.dumps({"step": step, "validation": self.last_validation}) + "\n")
                log.flush()
            if main and (last or (recipe.sample_every and step % recipe.sample_every == 0)):
                path = self.directory / "samples" / f"{step:07d}.png"
                path.parent.mkdir(exist_ok=True)
                self._evaluated(lambda path=path: self.task.sample(path))
            if last or time.monotonic() - saved > 60 * recipe.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
        bar.close()
        if log is not None:
            log.close()

    def _one_step(self) -> dict[str, torch.Tensor]:
        recipe, accelerator, task = self.recipe, self.accelerator, self.task
        share = self.step / recipe.steps
        size = recipe.batch_size_at(self.step)
        batch = task.batch(self.step, size, accelerator.process_index)
        self.samples += size * accelerator.num_processes
        rate = recipe.optimizer.rate(self.step, recipe.steps)
        loss, logs = self.model(batch, self.step, share)
        logs = {"loss": loss.detach(), **logs}
        self._descend(loss, self.optimizers, self.model.parameters(), rate)
        if self.adversary_optimizers:
            with accelerator.autocast():
                adversary_loss = task.adversary_loss(batch, self.step)
            if adversary_loss is not None:
                logs["adversary"] = adversary_loss.detach()
                self._descend(adversary_loss, self.adversary_optimizers, task.adversary.parameters(), rate)
        task.after_step(self.step, share)
        return logs

    def _descend(self, loss: torch.Tensor, optimizers: list[Any], parameters: Any, rate: float) -> None:
        """One step at the fraction `rate` of each group's peak learning rate."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        if self.recipe.optimizer.clip:
            self.accelerator.clip_grad_norm_(parameters, self.recipe.optimizer.clip)
        for optimizer in optimizers:
            optimizer.step()

    def _evaluated(self, function: Any) -> Any:
        """Calls `function` in eval mode without touching the run's random state."""
        state = _random_state()
        self.task.module.eval()
        with torch.no_grad():
            result = function()
        self.task.module.train()
        _set_random_state(state)
        return result

    def save(self) -> None:
        """Writes the checkpoint: everything that the next step depends on."""
        if not self.accelerator.is_main_process:
            return
        adversary = self.task.adversary
        state = {
            "recipe": json.dumps(asdict(self.recipe), sort_keys=True),
            "step": self.step,
            "seconds": self.seconds,
            "samples": self.samples,
            "module": self.task.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "adversary": None if adversary is None else self.accelerator.unwrap_model(adversary).state_dict(),
            "adversary_optimizers": [optimizer.state_dict() for optimizer in self.adversary_optimizers],
            "random": _random_state(),
        }
        temporary = self.directory / f".{CHECKPOINT}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.directory / CHECKPOINT)

    def restore(self) -> None:
        """Continues from the checkpoint; the log's later entries are dropped."""
        path = self.directory / CHECKPOINT
        state = torch.load(path, map_location="cpu", weights_only=True)
        ours, theirs = json.loads(json.dumps(asdict(self.recipe))), json.loads(state["recipe"])
        free = ("output", "log_every", "sample_every", "validate_every", "checkpoint_minutes", "export_dtype")
        changed = [key for key in ours if key not in free and ours[key] != theirs.get(key)]
        if changed:
            raise ValueError(
                f"{path} was written by another recipe: {', '.join(changed)} differ. Use another output directory or the old values."
            )
        self.step, self.seconds, self.samples = state["step"], state["seconds"], state["samples"]
        self.task.module.load_state_dict(state["module"])
        if self.task.adversary is not None:
            self.accelerator.unwrap_model(self.task.adversary).load_state_dict(state["adversary"])
        for name in ("optimizers", "adversary_optimizers"):
            for optimizer, saved in zip(getattr(self, name), state[name], strict=True):
                optimizer.load_state_dict(saved)
        _set_random_state(state["random"])
        log = self.directory / "log.jsonl"
        if self.accelerator.is_main_process and log.exists():
            kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            _write_atomically(log, ("\n".join(kept) + "\n" if kept else "").encode())
        logger.info("Resumed %s at step %d.", path, self.step)

    def record(self) -> dict[str, Any]:
        """Facts about the run, for the model card."""
        return {
            "recipe": asdict(self.recipe),
            "steps": self.step,
            "samples": self.samples,
            "minutes": round(self.seconds / 60, 1),
            "parameters": sum(p.numel() for p in self.task.module.parameters()),
            "hardware": _hardware(self.accelerator),
            "torch": torch.__version__,
            "last": self.last_logs,
            "validation": self.last_validation,
        }


def _adamw(parameters: Any, recipe: Recipe) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    return _with_peak(optimizer, settings.learning_rate)


def _muon(matrices: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    settings = recipe.optimizer
    optimizer = torch.optim.Muon(
        matrices,
        lr=settings.matrix_learning_rate,
        weight_decay=settings.weight_decay,
        momentum=0.95,
        adjust_lr_fn="match_rms_adamw",
    )
    return _with_peak(optimizer, settings.matrix_learning_rate)


def _with_peak(optimizer: torch.optim.Optimizer, rate: float) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["peak"] = rate
    return optimizer


def _hardware(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
