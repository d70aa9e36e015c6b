"""Do explanations point at the thing that was asked about? The truth about every pixel is known."""

from __future__ import annotations

import math
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from armm.data.scenes import Scenes
from armm.data.scenes.language import QA
from armm.data.scenes.render import object_map

COVERED = 0.25  # share of a cell that the thing must cover for the cell to count as a hit


def explained_words(
    pipe: Any,
    scenes: Scenes,
    asked: list[QA],
    pictures: list[PIL.Image.Image],
    method: str = "tam",
    progress: bool = True,
) -> dict[str, Any]:
    """Explains the first word of each answer to a question about one thing.

    Returns:
        `explanation_mass`: mean share of the map inside the thing's true mask; `explanation_mass_by_chance`: the share of the picture
        that the mask covers; `explanation_hits`: share of maps whose largest value is on the thing; `explanation_hits_by_chance`;
        `explained`: how many.
    """
    chosen = [number for number, item in enumerate(asked) if item.object is not None]
    if not chosen:
        return {"explained": 0}
    masses, areas, hits, lucky = [], [], [], []
    for number in tqdm(chosen, desc="explaining", unit="question", disable=not progress):
        picture, item = pictures[number], asked[number]
        slots = scenes.present[number].nonzero()[:, 0]
        mask = object_map(scenes[[number]], picture.width)[0] == slots[item.object]
        if not bool(mask.any()):
            continue  # wholly hidden
        explanation = pipe.explain(picture, item.question, method=method)
        values = explanation.maps[0]
        mass = explanation.mass_inside(mask)[0]
        masses.append(0.0 if math.isnan(mass) else mass)
        areas.append(float(mask.float().mean()))
        covered = F.adaptive_avg_pool2d(mask[None, None].double(), tuple(values.shape))[0, 0] > COVERED
        hits.append(float(covered.flatten()[values.argmax()]))
        lucky.append(float(covered.double().mean()))
    columns = torch.tensor([masses, areas, hits, lucky], dtype=torch.float64).mean(1).tolist()
    names = ("explanation_mass", "explanation_mass_by_chance", "explanation_hits", "explanation_hits_by_chance")
    return {**dict(zip(names, columns, strict=True)), "explained": len(masses)}
