"""Are questions about fresh pictures answered rightly? By type of question."""

from __future__ import annotations

import random
import time
from typing import Any

import PIL.Image
import torch
from tqdm.auto import tqdm

from armm.data.scenes import Scenes, render
from armm.data.scenes.language import QA, QUESTION_TYPES
from armm.data.scenes.language import questions as scene_questions
from armm.decoding.beam import BeamSearch
from armm.pruning import Cost, VisualPruning

from .common import check_count, figures, fresh_scenes, load_pipeline, picture_size, sample_generator
from .explanations import explained_words
from .metrics import share_with_error

_BLOCK = 256


def image_to_text(
    model: Any = None,
    questions: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    pruning: VisualPruning | None = None,
    search: BeamSearch | None = None,
    explain: str | None = None,
) -> dict[str, Any]:
    """Asks a model about real renders of held-out scenes, one question a picture, as many of each type.

    Args:
        model: a folder, a pipeline, or None for the shipped weights.
        questions: how many.
        seed: of the scenes and the questions.
        batch_size: questions at once.
        progress: show a progress bar.
        pruning: of image tokens (`TokenPruning`, `VisualTokenExit`). The same questions are then also answered without it, in the same
            way: one at a time.
        search: a `BeamSearch` or `OPERA` instead of greedy answers.
        explain: also explain the answers to questions about one thing, by this method of `pipe.explain`.

    Returns:
        `answer_accuracy` (share of answers equal to the truth, word for word) with its standard error and
        `answer_accuracy_by_type`. With `pruning` a `without_pruning` of the same keys and `flops_saved`, `visual_flops_saved` (shares),
        `seconds_saved`. With `explain` what `explained_words` returns.
    """
    check_count("questions", questions)
    check_count("batch_size", batch_size)
    pipe = load_pipeline("image-to-text", model)
    scenes, asked = fresh_questions(questions, seed)

    pictures = [PIL.Image.fromarray(image.permute(1, 2, 0).numpy()) for image in render(scenes, picture_size(pipe))]
    shared = (pipe, pictures, asked, seed, batch_size if pruning is None else 1, progress)
    if pruning is None:
        result = _answered(*shared, search)
    else:
        before = pipe.acceleration
        try:
            pipe.disable_acceleration()
            plain = _answered(*shared, search)
            pipe.enable_acceleration(pruning)
            result = _answered(*shared, search)
        finally:
            pipe.acceleration = before
        result |= {"without_pruning": plain, "seconds_saved": round(plain["seconds"] - result["seconds"], 1)}
    if explain is not None:
        result |= explained_words(pipe, scenes, asked, pictures, explain, progress)
    return figures(result | {"questions": questions, "seed": seed})


def _answered(
    pipe: Any,
    pictures: list[PIL.Image.Image],
    asked: list[QA],
    seed: int,
    batch_size: int,
    progress: bool,
    search: BeamSearch | None,
) -> dict[str, Any]:
    started, cost = time.perf_counter(), Cost()
    answers: list[str] = []
    options = {} if search is None else {"search": search}
    with tqdm(total=len(asked), desc="answering", unit="question", disable=not progress) as bar:
        for first in range(0, len(asked), batch_size):
            part = pictures[first : first + batch_size]
            generators = [sample_generator(seed, first + k) for k in range(len(part))]
            texts = [item.question for item in asked[first : first + batch_size]]
            output = pipe.ask(part, texts, generator=generators, **options)
            answers += output.texts
            cost += output.cost or Cost()
            bar.update(len(part))
    result = score_answers(asked, answers) | {"seconds": round(time.perf_counter() - started, 1)}
    if cost.flops:
        result |= {"flops_saved": cost.saved, "visual_flops_saved": cost.visual_saved}
    return result


def fresh_questions(n: int, seed: int) -> tuple[Scenes, list[QA]]:
    """`n` scenes of the held-out split and one question about each; the types take turns."""
    asked: list[QA] = []
    parts: list[Scenes] = []
    start = 0
    while len(asked) < n:
        block = fresh_scenes(min(_BLOCK, 2 * n), seed + 1, "heldout", start=start)
        start += len(block)
        rows = []
        for index in range(len(block)):
            if len(asked) == n:
                break
            rng = random.Random(int(block.seed[index]))
            wanted = QUESTION_TYPES[len(asked) % len(QUESTION_TYPES)]
            options = [item for item in scene_questions(block, index, rng) if item.type == wanted]
            if options:
                asked.append(rng.choice(options))
                rows.append(index)
        parts.append(block[rows])
    fields = parts[0].tensors()
    return Scenes(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in fields}), asked


def score_answers(asked: list[QA], answers: list[str]) -> dict[str, Any]:
    """Shares of right answers, in all and by type; case, full stops and outer spaces do not count."""
    right: dict[str, list[bool]] = {}
    for item, answer in zip(asked, answers, strict=True):
        right.setdefault(item.type, []).append(_plain(answer) == _plain(item.answer))
    share, error = share_with_error(sum(map(sum, right.values())), len(asked))
    return {
        "answer_accuracy": share,
        "answer_accuracy_standard_error": error,
        "answer_accuracy_by_type": {
            kind: sum(right[kind]) / len(right[kind]) for kind in QUESTION_TYPES if kind in right
        },
    }


def _plain(text: str) -> str:
    return " ".join(text.lower().strip(" .!").split())
