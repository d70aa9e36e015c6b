"""Does a picture show what its prompt says? Held-out prompts, generated pictures, the recogniser as judge."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from armm.data.scenes import Scenes
from armm.data.scenes.language import Caption, check_facts, describe_prompt

from .common import (
    check_count,
    figures,
    fresh_scenes,
    load_pipeline,
    load_recogniser,
    picture_size,
    rendered,
    sample_generator,
)
from .metrics import frechet_distance, share_with_error
from .reading import ATTRIBUTES, tally
from .recogniser import SceneReading, SceneRecogniser

REAL_RENDERS = 2000


@dataclass
class PromptScore:
    """Verdicts on generated pictures: per picture whether all facts hold, and (right, all) facts by kind."""

    whole: list[bool]
    facts: dict[str, tuple[int, int]]

    def attribute_accuracy(self) -> dict[str, float]:
        """Share of facts that hold, by kind."""
        ordered = sorted(self.facts, key=lambda kind: ATTRIBUTES.index(kind))
        return {kind: self.facts[kind][0] / self.facts[kind][1] for kind in ordered}


def text_to_image(
    model: Any = None,
    prompts: int = 500,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    recogniser: SceneRecogniser | str | Path | None = None,
    decoding: str | None = None,
    num_candidates: int | None = None,
) -> dict[str, Any]:
    """Generates from held-out prompts with the checkpoint's own settings and has the recogniser check every claim.

    Args:
        model: a folder, a pipeline, or None for the shipped weights.
        prompts: how many. Each describes a scene of the held-out split: its combination of objects (and, of a single
            object, its material and the light) was never shown in training.
        seed: of the scenes and of the draws; picture i has its own generator, so `batch_size` changes nothing.
        batch_size: pictures generated at once.
        progress: show a progress bar.
        recogniser: the judge; a folder, a `SceneRecogniser`, or None for the shipped one.
        decoding: one of the decodings that the folder offers, or None for its own.
        num_candidates: pictures that the model draws and reads for each one that counts; None for the checkpoint's setting.

    Returns:
        `prompt_accuracy` (share of prompts with every claim fulfilled) with its standard error, the same by number of
        objects, `attribute_accuracy` by kind of claim, `recogniser_accuracy` by attribute on 2,000 fresh real renders,
        `frechet_distance` between generated pictures and renders of the prompts' own scenes (on the recogniser's features)
        and, as its floor, between two sets of renders.
    """
    check_count("prompts", prompts)
    check_count("batch_size", batch_size)
    judge = load_recogniser(recogniser)
    pipe = load_pipeline("text-to-image", model, decoding)
    options = {} if num_candidates is None else {"num_candidates": num_candidates}
    scenes = fresh_scenes(prompts, seed, "heldout")
    captions = heldout_prompts(scenes)
    size = picture_size(pipe)

    started = time.perf_counter()
    readings: list[SceneReading] = []
    features: list[Tensor] = []
    with tqdm(total=prompts, desc="generating", unit="image", disable=not progress) as bar:
        for first in range(0, prompts, batch_size):
            texts = [caption.text for caption in captions[first : first + batch_size]]
            generators = [sample_generator(seed, first + k) for k in range(len(texts))]
            images = pipe(texts, generator=generators, output_type="pt", **options).images
            pixels = images.float() * 2 - 1
            readings += judge.recognise(pixels)
            features.append(judge.features(pixels).cpu())
            bar.update(len(texts))
    seconds = time.perf_counter() - started

    score = judge_prompts(captions, readings)
    accuracy, error = share_with_error(sum(score.whole), prompts)
    by_count = {
        str(count): share_with_error(sum(marks), len(marks))[0]
        for count in (1, 2, 3)
        if (marks := [good for good, n in zip(score.whole, scenes.count.tolist(), strict=True) if n == count])
    }
    real = tally(judge, rendered(fresh_scenes(REAL_RENDERS, seed, "all"), size)).accuracy()
    result: dict[str, Any] = {
        "prompt_accuracy": accuracy,
        "prompt_accuracy_standard_error": error,
        "prompt_accuracy_by_objects": by_count,
        "attribute_accuracy": score.attribute_accuracy(),
        "recogniser_accuracy": {name: real[name] for name in ATTRIBUTES},
        "recogniser_scene_accuracy": real["whole"],
    }
    if prompts > 1:
        own = torch.cat([judge.features(pixels).cpu() for pixels, _ in rendered(scenes, size)])
        others = fresh_scenes(prompts, seed, "heldout", start=prompts)
        other = torch.cat([judge.features(pixels).cpu() for pixels, _ in rendered(others, size)])
        result["frechet_distance"] = frechet_distance(torch.cat(features), own)
        result["frechet_distance_of_renders"] = frechet_distance(other, own)
    result |= {
        "prompts": prompts,
        "distinct_prompts": len({caption.text for caption in captions}),
        "seed": seed,
        "seconds": round(seconds, 1),
    }
    return figures(result)


def heldout_prompts(scenes: Scenes) -> list[Caption]:
    """One prompt for each scene. That of a single object always names material and light: without them its words could
    describe a scene of the training split."""
    captions = []
    for index in range(len(scenes)):
        rng = random.Random(int(scenes.seed[index]))
        caption = describe_prompt(scenes, index, rng)
        while int(scenes.count[index]) == 1 and not {"material", "light"} <= {fact.kind for fact in caption.facts}:
            caption = describe_prompt(scenes, index, rng)
        captions.append(caption)
    return captions


def judge_prompts(captions: list[Caption], readings: list[SceneReading]) -> PromptScore:
    """Check every claim of every caption against the reading of its picture."""
    whole: list[bool] = []
    facts: dict[str, tuple[int, int]] = {}
    for caption, reading in zip(captions, readings, strict=True):
        verdicts = check_facts(caption.facts, reading.objects, reading.light)
        whole.append(all(all(marks) for marks in verdicts.values()))
        for kind, marks in verdicts.items():
            right, total = facts.get(kind, (0, 0))
            facts[kind] = (right + sum(marks), total + len(marks))
    return PromptScore(whole, facts)
