"""Accelerations: what a pipeline takes, and the schedules of step annealing."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import armm
from armm.decoding.acceleration import Acceleration
from armm.decoding.annealing import ANNEALING_PRESETS, ANNEALING_SCHEDULES, StepAnnealing
from pipelines.base import ARPipeline


class Annealed(ARPipeline):
    """A pipeline without components that supports step annealing."""

    generation_settings: ClassVar[dict] = {
        "guidance_scale": 2.0,
        "num_inference_steps": 8,
        "guidance_schedule": "linear",
    }
    _accelerations = (StepAnnealing,)

    def __init__(self, generation_config: dict | None = None) -> None:
        super().__init__()
        self.register_generation_config(generation_config)


class Refusing(StepAnnealing):
    def check(self, pipe) -> None:
        raise ValueError("these components cannot")


def test_a_pipeline_says_what_it_supports():
    with pytest.raises(
        ValueError, match="ARPipeline cannot be accelerated with StepAnnealing: it supports no acceleration"
    ):
        ARPipeline().enable_acceleration(StepAnnealing())
    for wrong, named in (
        (Acceleration(), "Acceleration"),
        (None, "NoneType"),
        (StepAnnealing, "the class StepAnnealing"),
    ):
        with pytest.raises(ValueError, match=f"cannot be accelerated with {named}: it supports StepAnnealing"):
            Annealed().enable_acceleration(wrong)


def test_enabling_checks_and_disabling_undoes():
    pipe = Annealed()
    assert pipe.acceleration is None
    annealing = armm.StepAnnealing(20, 4)
    pipe.enable_acceleration(annealing)
    with pytest.raises(ValueError, match="these components cannot"):
        pipe.enable_acceleration(Refusing())
    assert pipe.acceleration is annealing and Annealed().acceleration is None
    pipe.disable_acceleration()
    assert pipe.acceleration is None


def test_settings_stand_between_the_checkpoint_and_the_call():
    pipe = Annealed({"guidance_scale": 3.0})
    pipe.enable_acceleration(StepAnnealing.preset("mar-base"))
    assert pipe.setting("guidance_scale", None) == 2.9 and pipe.setting("guidance_scale", 1.5) == 1.5
    assert pipe.generation_config["num_inference_steps"] == 64
    pipe.disable_acceleration()
    assert pipe.generation_config == {"guidance_scale": 3.0, "num_inference_steps": 8, "guidance_schedule": "linear"}
    with pytest.raises(ValueError, match="setting of the step annealing"):
        pipe.enable_acceleration(StepAnnealing(settings={"guidence": 2.0}))


@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 80), st.sampled_from(sorted(ANNEALING_SCHEDULES)))
def test_schedules_fall_from_upper_to_lower(a, b, calls, schedule):
    upper, lower = max(a, b), min(a, b)
    table = StepAnnealing(upper, lower, schedule).table(calls)
    assert len(table) == calls and table == sorted(table, reverse=True)
    assert set(table) <= set(range(lower, upper + 1))
    if calls > 1:
        assert table[0] == (lower if schedule == "constant" else upper) and table[-1] == lower


def test_tables_by_hand():
    assert StepAnnealing(50, 15).table(4) == [50, 38, 26, 15]
    assert StepAnnealing(25, 15).table(5) == [25, 22, 20, 17, 15]
    assert StepAnnealing(50, 15).table(5) == [50, 41, 32, 23, 15]
    assert StepAnnealing(9, 3, "two-stage").table(5) == [9, 9, 3, 3, 3]
    assert StepAnnealing(50, 5).table(1) == [50] and StepAnnealing(50, 5, "constant").table(1) == [5]


@pytest.mark.parametrize("name", sorted(ANNEALING_PRESETS))
def test_every_preset_can_be_made(name):
    assert StepAnnealing.preset(name) == StepAnnealing.preset(name + "-256") == StepAnnealing(**ANNEALING_PRESETS[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upper": 0}, "`upper` must be a positive integer, got 0"),
        ({"lower": 2.5}, "`lower` must be a positive integer, got 2.5"),
        ({"upper": 4, "lower": 5}, r"`lower` \(5\) must not be above `upper` \(4\)"),
        ({"schedule": "quadratic"}, "`schedule` must be one of .*'two-stage'.*, got 'quadratic'"),
        ({"last_timestep": 1000}, "`last_timestep` must be None or an integer between 0 and 999, got 1000"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepAnnealing(**arguments)
    with pytest.raises(ValueError, match="no preset for 'mar-tiny': choose from .*mar-base"):
        StepAnnealing.preset("mar-tiny")
    with pytest.raises(ValueError, match="`step` must lie between 0 and 3, got 4"):
        StepAnnealing().steps(4, 4)
