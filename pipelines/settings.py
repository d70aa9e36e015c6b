"""What the settings of pipelines must be, by their names."""

from __future__ import annotations

from typing import Any

import numpy as np

from armm.decoding.sampling import Sampler

# Bounds of settings that are numbers, see `check_number`.
NUMBERS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("guidance_scale", "image_guidance_scale", "pivot_guidance_scale", "guidance_start"), {"low": 0.0}),
    **dict.fromkeys(("temperature", "image_temperature", "repetition_penalty"), {"low": 0.0}),
    **dict.fromkeys(("top_k", "text_top_k", "image_top_k"), {"low": 0, "integer": True}),
    **dict.fromkeys(("top_p", "text_top_p", "image_top_p", "guidance_high"), {"low": 0.0, "high": 1.0}),
    **dict.fromkeys(("num_inference_steps", "num_pivot_steps", "num_flow_steps"), {"low": 1, "integer": True}),
    **dict.fromkeys(("num_candidates", "max_new_tokens", "image_size"), {"low": 1, "integer": True}),
    **dict.fromkeys(("fewest_candidates", "most_candidates"), {"low": 1, "integer": True}),
    "guidance_interval": {"low": -1, "integer": True},
    "guidance_power": {"low": 1e-6},
}
FLAGS = ("do_sample", "more_smooth", "clean_prompt", "sample_tokens")


def check_number(name: str, value: Any, *, low: float, high: float = float("inf"), integer: bool = False) -> None:
    """Raises unless `value` is a finite number in [low, high] (an int if `integer`)."""
    kinds = (int, np.integer) if integer else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"`{name}` must be {'an integer' if integer else 'a number'}, got {value!r}.")
    if not low <= value <= high or value == float("inf"):
        bounds = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
        raise ValueError(f"`{name}` must be {bounds}, got {value}.")


def check_setting(name: str, value: Any) -> Any:
    """`value`, numpy's integers as Python's; a ValueError or TypeError where the setting `name` cannot be that. Names that are not
    listed here may be anything."""
    if name in FLAGS and not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    if name not in NUMBERS:
        return value
    check_number(name, value, **NUMBERS[name])
    if name.endswith("top_p") and value == 0:
        raise ValueError(f"`{name}` must be above 0 (1 turns the filter off), got 0.")
    return int(value) if NUMBERS[name].get("integer") else value


def sampler_of(temperature: Any, top_k: Any, top_p: Any, do_sample: Any = True) -> Sampler:
    """The sampler of these settings, which are checked; temperature 0 takes the likeliest id, as `do_sample=False` does."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "do_sample": do_sample}
    checked = {name: check_setting(name, value) for name, value in given.items()}
    return Sampler(**{**checked, "temperature": temperature or 1.0, "do_sample": bool(do_sample and temperature > 0)})
