"""The trainer: recipes, schedules, exact resume, logs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from armm.training import load_recipe, run
from armm.training.recipe import OptimizerRecipe, Recipe, take
from armm.training.task import TASKS, TrainingTask


class LineTask(TrainingTask):
    """Fits a line, with dropout so that the random state matters, and an adversary so that it is checkpointed."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.module = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, 1))
        self.adversary = nn.Linear(4, 1)

    def prepare(self, device):
        self.device = device

    def batch(self, step, size, rank):
        x = torch.randn(size, 4, generator=self.generator(step, rank))
        return {"x": x, "y": x.sum(1, keepdim=True)}

    def loss(self, batch, step, progress):
        loss = (self.module(batch["x"]) - batch["y"]).square().mean()
        return loss, {"error": loss.detach().sqrt()}

    def adversary_loss(self, batch, step):
        return (self.adversary(batch["x"]) - 1.0).square().mean()

    def validate(self):
        torch.rand(7)  # validation may draw random numbers without changing the run
        return {"weight": float(self.module[0].weight.sum())}

    def sample(self, path):
        path.write_bytes(b"")

    def export(self, directory):
        directory.mkdir(exist_ok=True)
        torch.save(self.module.state_dict(), directory / "weights.pt")


@pytest.fixture(autouse=True)
def line_task(monkeypatch):
    monkeypatch.setitem(TASKS, "line", f"{__name__}:LineTask")


def recipe(path, **changes):
    values = {"task": "line", "output": str(path), "steps": 20, "precision": "no", "batch_size": [[0, 4], [0.5, 8]]}
    values |= {"validate_every": 5, "sample_every": 10, "log_every": 1, "checkpoint_minutes": 1e9}
    return Recipe(**(values | changes))


def weights(directory):
    return torch.load(directory / "weights.pt", weights_only=True)


def test_resume_is_bit_exact(tmp_path, monkeypatch):
    whole = weights(run(recipe(tmp_path / "whole"), progress=False))

    class Interrupted(Exception):
        pass

    original = LineTask.batch

    def interrupted(self, step, size, rank):
        if step == 13:
            raise Interrupted
        return original(self, step, size, rank)

    monkeypatch.setattr(LineTask, "batch", interrupted)
    with pytest.raises(Interrupted):
        run(recipe(tmp_path / "parts", checkpoint_minutes=0), progress=False)
    monkeypatch.setattr(LineTask, "batch", original)
    parts = weights(run(recipe(tmp_path / "parts", checkpoint_minutes=0), resume=True, progress=False))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)

    def log(name):
        entries = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]

    assert log("whole") == log("parts")
    assert (tmp_path / "whole" / "samples" / "0000020.png").exists()
    record = json.loads((tmp_path / "whole" / "record.json").read_text())
    assert record["samples"] == 10 * 4 + 10 * 8 and record["steps"] == 20


def test_a_run_is_not_overwritten(tmp_path):
    run(recipe(tmp_path / "run", steps=2), progress=False)
    with pytest.raises(FileExistsError, match="resume"):
        run(recipe(tmp_path / "run", steps=2), progress=False)
    with pytest.raises(ValueError, match="seed"):
        run(recipe(tmp_path / "run", steps=2, seed=1), resume=True, progress=False)


def test_schedules():
    cosine = OptimizerRecipe(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    assert cosine.rate(0, 110) == pytest.approx(0.1) and cosine.rate(9, 110) == pytest.approx(1.0)
    assert cosine.rate(60, 110) == pytest.approx(0.55) and cosine.rate(110, 110) == pytest.approx(0.1)
    flat = OptimizerRecipe(learning_rate=1.0, warmup_steps=0, schedule="flat_linear", final_fraction=0.0)
    assert flat.rate(49, 100) == 1.0 and flat.rate(75, 100) == pytest.approx(0.5)


def test_recipe_errors(tmp_path):
    path = tmp_path / "recipe.yaml"
    good = "task: line\noutput: run\nsteps: 5\noptimizer:\n  learning_rate: 0.1\n"
    path.write_text(good)
    assert load_recipe(path, {"optimizer.learning_rate": 0.5, "model.width": 3}).optimizer.learning_rate == 0.5
    for number in ("4e-4", "4E-4", "4.e-4", "+4e-04", ".4e-3", "0.0004"):
        path.write_text(good.replace("0.1", number) + f"data: {{sizes: [{number}, 3, 1_000]}}\n")
        assert load_recipe(path).optimizer.learning_rate == 4e-4
        assert load_recipe(path).data["sizes"] == [4e-4, 3, 1000]
    path.write_text(good + "precision: no\n")
    assert load_recipe(path).precision == "no"
    for content, message in [
        (good + "stepz: 3\n", "did you mean steps"),
        (good + "  learning_rat: 1\n", "learning_rate"),
        ("task: line\nsteps: 5\n", "lacks the keys output"),
        ("- a\n", "mapping"),
        ("a: [", "not valid YAML"),
        (good + "precision: fp8\n", "precision"),
        (good.replace("steps: 5", "steps: many"), "whole number"),
        (good.replace("steps: 5", "steps: 0"), "at least 1"),
        (good + "batch_size: 0\n", "batch_size"),
        (good.replace("0.1", "fast"), "learning_rate` must be a number, got 'fast'"),
        (good.replace("0.1", "4e-4e"), "learning_rate` must be a number"),
        (good + "  betas: 0.9\n", "betas` must be two numbers"),
        (good + "  betas: [a, b]\n", "betas` must be a number"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_recipe(path)
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="Unknown task"):
        run(recipe(tmp_path / "x", task="lien", steps=1), progress=False)
    with pytest.raises(ValueError, match=r"data\.sizes.*size"):
        take({"sizes": 1}, "data", size=64)
