"""Pictures, prompts and questions to begin with; the pictures are rendered by `armm.data.scenes`."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from armm.data.scenes import render, sample_scenes

__all__ = ["PROMPTS", "QUESTIONS", "REPAINTINGS", "example_pictures", "write_pictures"]

PROMPTS = (
    "a small red sphere to the left of a large blue cube",
    "at night, a large shiny green cone",
    "a shiny purple cylinder behind a small white cube",
    "a large cyan sphere to the right of a small yellow cone",
    "a large orange cube in front of a small green cylinder at dusk",
)
QUESTIONS = ("", "how many objects are there?", "what color is the cube?", "is there a sphere?", "is it day or night?")
REPAINTINGS = (
    "a large green cone",
    "a small red sphere to the left of a large blue cube",
    "a small yellow cylinder to the right of a large purple sphere",
)
# (seed, number) of scenes of the held-out split, which no shipped model saw in training.
SCENES = ((0, 2), (0, 4), (1, 2), (2, 5), (3, 6), (0, 7))


def example_pictures(size: int = 256) -> list[PIL.Image.Image]:
    """The scenes, rendered."""
    images = []
    for seed, number in SCENES:
        [image] = render(sample_scenes(1, seed=seed, split="heldout", start=number), size=size)
        images.append(PIL.Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    return images


def write_pictures(folder: Path, size: int = 256) -> list[str]:
    """Writes the example pictures into `folder` and returns their paths."""
    paths = []
    for number, image in enumerate(example_pictures(size)):
        paths.append(str(folder / f"scene-{number}.png"))
        image.save(paths[-1])
    return paths
