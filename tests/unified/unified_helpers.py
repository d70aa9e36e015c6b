"""What the tests of the unified model share."""

from __future__ import annotations

import torch

SIZE, CODES = 32, 32


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def load(cls, directory):
    pipe = cls.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe
