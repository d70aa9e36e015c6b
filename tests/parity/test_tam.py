"""Parity with TAM (xmed-lab/TAM, commit 7c7df1d): every sub-call of every recorded conversation, at its README's tolerance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import Case, Check, all_problems, parity_root
from safetensors.torch import load_file

from armm.explain.activation import ActivationMaps, least_squares, rank_gaussian, same_piece_context

CASES = [
    pytest.param(Case(path.parent), id=path.parent.name)
    for path in sorted((parity_root() / "tam").glob("*/config.json"))
]
# No array of the case is an output of the authors' text tokenizer or sampler: these are given.
GIVEN = {
    "tokens", "logits_all_positions", "text_piece_id_of_vocab", "prefill_length", "raw_image_scores", "filter/in", "lsq/a", "lsq/b",
}  # fmt: skip


def last_match(tokens: list[int], marker: list[int]) -> int:
    """Where the last occurrence of `marker` begins."""
    return max(i for i in range(len(tokens)) if tokens[i : i + len(marker)] == marker)


def spans(case: Case) -> tuple[range, range, range]:
    """Positions of the image, the prompt and the answer."""
    tokens, special = case.io["tokens"].tolist(), case.config["special_ids"]
    first, end = (tokens.index(marker) for marker in special["img_id"])
    header = special["answer_id"][0]
    answer = last_match(tokens, header)
    return range(first + 1, end), range(end + 1, answer), range(answer + len(header), len(tokens))


def checks(case: Case, io: dict[str, torch.Tensor]) -> Iterator[Check]:
    logits, tokens = io["logits_all_positions"], io["tokens"].tolist()
    image, prompt, answer = spans(case)
    pieces = [int(io["text_piece_id_of_vocab"][tokens[place]]) for place in (*prompt, *answer)]
    maps, raw, shown = ActivationMaps(tuple(case.config["grid"])), [], []
    for number in range(len(prompt) + len(answer)):
        said = max(number - len(prompt), 0)  # words of the answer so far
        is_prompt = number < len(prompt)
        name = f"prompt{number}/" if is_prompt else f"answer{said}/"
        places = [*prompt, *(answer[0] - 1 + k for k in range(said + 1))]
        word = tokens[(*prompt, *answer)[number]]
        if number == 0:
            word = int(logits[prompt[0]].argmax())
        elif number == len(prompt):
            word = tokens[
                answer[0] - 1
            ]  # the authors explain the last token of the form in place of the first answer's
        column = logits[:, word]
        found = maps.explain(column[list(image)], column[places], same_piece_context(pieces, number))
        raw.append(found.raw)
        yield Check(name + "text_scores", found.text, io[name + "text_scores"], atol=1e-5)
        if found.interference is not None:
            yield Check(name + "eci_interference", found.interference, io[name + "eci_interference"], atol=1e-5)
            yield Check(name + "eci_scale", torch.tensor([found.scale]), io[name + "eci_scale"])
        yield Check(name + "image_scores_after_eci", found.image, io[name + "image_scores_after_eci"], atol=1e-5)
        yield Check(name + "filter_input", found.relative[0], io[name + "filter_input"], atol=1e-5)
        yield Check(name + "filter_output", found.map, io[name + "filter_output"], atol=1e-5)
        if number == 0 or not is_prompt and said > 0:  # the first round returns the map of the prompt's first word
            shown.append((found.map * 255).to(torch.uint8))
    yield Check("raw_image_scores", torch.stack(raw), io["raw_image_scores"], atol=1e-5)
    yield Check("maps_uint8", torch.stack(shown), io["maps_uint8"], atol=1)
    for size in (3, 5):
        yield Check(f"filter/out_k{size}", rank_gaussian(io["filter/in"], size), io[f"filter/out_k{size}"], atol=1e-5)
    scale = least_squares(io["lsq/a"].double(), io["lsq/b"].double())
    yield Check("lsq/scale", torch.tensor([scale]), io["lsq/scale"])


def test_there_are_cases():
    assert CASES


@pytest.mark.parametrize("case", CASES)
def test_every_recorded_array_is_reproduced(case):
    found = list(checks(case, case.io))
    assert not all_problems(iter(found))
    assert {check.name for check in found} | GIVEN == set(case.io) | {"raw_image_scores"}


@pytest.mark.parametrize("case", CASES)
def test_scaling_any_input_by_a_twentieth_is_noticed(case):
    # There are no weights: the activations are what can be wrong.
    io = load_file(case.path / "io.safetensors")
    for name in ("logits_all_positions", "filter/in", "lsq/a", "lsq/b"):
        assert all_problems(checks(case, {**io, name: io[name] * 1.05})), name
