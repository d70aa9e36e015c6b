"""Token tensors for the unified scenes model: captions, questions and image codes, made once and kept on disk.

S scenes, K captions and M questions of each, T words of a caption at most, Q tokens of a question segment at most.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armm.data.scenes import QA, VOCABULARY, Scenes, caption, describe_prompt, questions
from armm.training.images import to_pixels
from pipelines.text import HOLE, SPECIAL_TOKENS, WordTokenizer
from tokenizers_visual.vq_tokenizer import VQTokenizer

logger = logging.getLogger(__name__)

_PARALLEL_FROM = 4096  # scenes from which starting worker processes pays


def scene_vocabulary(holes: int = 0) -> list[str]:
    """Special tokens, then the words of the scenes language, then sentinels for so many holes."""
    words = [word for word in VOCABULARY if word not in SPECIAL_TOKENS]
    return [*SPECIAL_TOKENS, *words, *(HOLE.format(number) for number in range(holes))]


@dataclass
class UnifiedData:
    """Everything a batch is cut from.

    captions: int16 [S, K, T], padded on the right.
    questions: int16 [S, M, Q], `<question> ... <answer> ... <end>`, padded on the right.
    answer_starts: int16 [S, M], index of `<answer>` in each.
    kinds: int16 [S, M], into `kind_names`.
    codes: int16 [S, N], image codes (without the text's offset).
    """

    captions: Tensor
    questions: Tensor
    answer_starts: Tensor
    kinds: Tensor
    codes: Tensor
    kind_names: list[str]

    def __len__(self) -> int:
        return len(self.codes)


def write_texts(
    scenes: Scenes, vocabulary: list[str], text_slots: int, captions_per_scene: int, questions_per_scene: int
) -> dict[str, Any]:
    """Captions and questions of scenes as padded id tensors (see `UnifiedData`); depends on nothing but the scenes' seeds.

    Raises:
        ValueError: `text_slots` is too short for a scene's captions.
    """
    words = WordTokenizer(vocabulary)
    count = len(scenes)
    captions = torch.full((count, captions_per_scene, text_slots), words.pad, dtype=torch.int16)
    rows: list[tuple[list[int], int, str]] = []
    seeds = scenes.seed.tolist()
    for index in range(count):
        rng = random.Random(seeds[index])
        for slot, ids in enumerate(_write_captions(scenes, index, rng, words, captions_per_scene, text_slots)):
            captions[index, slot, : len(ids)] = torch.tensor(ids, dtype=torch.int16)
        asked = _pick_questions(scenes, index, rng, questions_per_scene)
        encoded = words.encode_batch([text for item in asked for text in (item.question, item.answer)])
        for number, item in enumerate(asked):
            question_ids, answer_ids = encoded[2 * number], encoded[2 * number + 1]
            tokens = [words.question, *question_ids, words.answer, *answer_ids, words.end]
            rows.append((tokens, 1 + len(question_ids), item.type))
    length = max(len(tokens) for tokens, _, _ in rows)
    questions_out = torch.full((count * questions_per_scene, length), words.pad, dtype=torch.int16)
    for number, (tokens, _, _) in enumerate(rows):
        questions_out[number, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
    kind_names = sorted({kind for _, _, kind in rows})
    shape = (count, questions_per_scene)
    return {
        "captions": captions,
        "questions": questions_out.view(*shape, length),
        "answer_starts": torch.tensor([start for _, start, _ in rows], dtype=torch.int16).view(shape),
        "kinds": torch.tensor([kind_names.index(kind) for _, _, kind in rows], dtype=torch.int16).view(shape),
        "kind_names": kind_names,
    }


def _write_captions(
    scenes: Scenes, index: int, rng: random.Random, words: WordTokenizer, number: int, limit: int
) -> list[list[int]]:
    """Two full prompts to each free caption; one longer than `limit` words is drawn anew."""
    written: list[list[int]] = []
    for _ in range(50 * number):
        write = caption if len(written) % 3 == 2 else describe_prompt
        ids = words.encode_batch([write(scenes, index, rng).text])[0]
        if len(ids) <= limit:
            written.append(ids)
        if len(written) == number:
            return written
    raise ValueError(f"`model.text_slots` {limit} is too short for the captions of these scenes: raise it.")


def _pick_questions(scenes: Scenes, index: int, rng: random.Random, number: int) -> list[QA]:
    """`number` questions about one scene, kinds taken in turn so that frequent kinds do not crowd out the others.

    Questions answered by yes or no are kinds of their own: comparing what is asked with what is seen takes longest to learn.
    """
    picked: list[QA] = []
    while len(picked) < number:
        by_kind: dict[tuple[str, bool], list[QA]] = {}
        for entry in questions(scenes, index, rng):
            by_kind.setdefault((entry.type, entry.answer in ("yes", "no")), []).append(entry)
        for entries in by_kind.values():
            rng.shuffle(entries)
        while by_kind and len(picked) < number:
            kinds = sorted(by_kind)
            rng.shuffle(kinds)
            for kind in kinds[: number - len(picked)]:
                picked.append(by_kind[kind].pop())
                if not by_kind[kind]:
                    del by_kind[kind]
    rng.shuffle(picked)
    return picked


def merge_texts(parts: list[dict[str, Any]], pad: int) -> dict[str, Any]:
    """Joins the results of several `write_texts` calls along the scenes."""
    names = sorted({name for part in parts for name in part["kind_names"]})
    length = max(part["questions"].shape[-1] for part in parts)
    for part in parts:
        lookup = torch.tensor([names.index(name) for name in part["kind_names"]], dtype=torch.int16)
        part["kinds"] = lookup[part["kinds"].long()]
        missing = length - part["questions"].shape[-1]
        part["questions"] = torch.nn.functional.pad(part["questions"], (0, missing), value=pad)
    joined = {
        name: torch.cat([part[name] for part in parts]) for name in ("captions", "questions", "answer_starts", "kinds")
    }
    return {**joined, "kind_names": names}


def prepare_texts(scenes: Scenes, settings: dict[str, Any], vocabulary: list[str], cache: Path) -> dict[str, Any]:
    """`write_texts` over all scenes, in parallel where there are many, kept in `cache`."""
    write: Callable[[Scenes], dict[str, Any]] = partial(write_texts, vocabulary=vocabulary, **settings)
    # Keyed by what is written, so that a change of the language is noticed: the first scenes stand for all.
    first = write(scenes[:16])
    probe = _digest(*(first[name] for name in ("captions", "questions")))
    key = {**settings, "vocabulary": vocabulary, "scenes": _digest(*scenes.tensors().values()), "texts": probe}
    path = cache / f"texts-{_digest(json.dumps(key, sort_keys=True))}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    pad = vocabulary.index(SPECIAL_TOKENS[0])
    if len(scenes) < _PARALLEL_FROM:
        texts = write(scenes)
    else:
        chunks = [scenes[start : start + 1024] for start in range(0, len(scenes), 1024)]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context, initializer=_one_thread) as pool:
            texts = merge_texts(list(pool.map(write, chunks)), pad)
    _save(texts, path)
    logger.info("Wrote %d captions and %d questions.", texts["captions"][..., 0].numel(), texts["kinds"].numel())
    return texts


@torch.no_grad()
def prepare_codes(images: Tensor, tokenizer: VQTokenizer, device: torch.device, cache: Path) -> Tensor:
    """Image codes int16 [S, N] of uint8 images [S, 3, H, W], kept in `cache`."""
    weights = _digest(*(value for value in tokenizer.state_dict().values()))
    path = cache / f"codes-{_digest(images[:: max(1, len(images) // 64)])}-{len(images)}-{weights}.pt"
    if path.is_file():
        return torch.load(path, weights_only=True)
    tokenizer = tokenizer.to(device).eval()
    codes = torch.cat(
        [tokenizer.encode(to_pixels(chunk.to(device))).ids.to("cpu", torch.int16) for chunk in images.split(128)]
    )
    _save(codes, path)
    return codes


def _one_thread() -> None:
    torch.set_num_threads(1)


def _digest(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            digest.update(str((value.dtype, tuple(value.shape))).encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(str(value).encode())
    return digest.hexdigest()[:16]


def _save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    torch.save(value, temporary)
    os.replace(temporary, path)
