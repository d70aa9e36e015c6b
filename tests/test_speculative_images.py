"""Speculative decoding of the images of the Chameleon family: the results of plain decoding in fewer calls."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_chameleon as tiny
import torch

import armm
from armm.decoding.speculative import DraftModel, MatchVerifier, TokenRecycling
from armm.decoding.speculative.images import FAR, vectors_by_id
from pipelines.chameleon import ChameleonPipeline
from pipelines.lumina_mgpt import LuminaMGPTPipeline

PROMPTS = ["a red fox", "a green fox in the image"]


def lumina() -> Any:
    return tiny.pipeline(LuminaMGPTPipeline, tiny.sized_block(), image_size=16)


def chameleon() -> Any:
    return tiny.pipeline(ChameleonPipeline, tiny.fixed_block())


def draw(pipe: Any, prompts: Any = PROMPTS, **options: Any) -> torch.Tensor:
    count = 1 if isinstance(prompts, str) else len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    size = {"height": 16, "width": 8} if isinstance(pipe, LuminaMGPTPipeline) else {}
    return pipe(prompts, generator=generators, output_type="latent", **size, **options).images


@pytest.mark.parametrize("make", [lumina, chameleon])
@pytest.mark.parametrize("guided", [False, True])
def test_match_is_the_result_of_plain_decoding(make, guided):
    pipe = make()
    options = {} if guided else {"guidance_scale": 1.0}
    if not guided and make is chameleon:
        options["image_guidance_scale"] = 1.0
    plain = draw(pipe, **options)
    pipe.enable_acceleration(armm.JacobiSpeculative(window=5, rule="match"))
    assert torch.equal(draw(pipe, **options), plain)
    pipe.enable_acceleration(armm.Speculative(TokenRecycling(4), MatchVerifier()))
    assert torch.equal(draw(pipe, **options), plain)
    pipe.disable_acceleration()
    assert torch.equal(draw(pipe, **options), plain)


@pytest.mark.parametrize("make", [lumina, chameleon])
def test_greedy_is_identical_and_takes_fewer_calls(make):
    pipe = make()
    greedy = {"temperature": 0.0} if make is lumina else {"image_temperature": 0.0}
    plain = draw(pipe, **greedy)
    acceleration = armm.JacobiSpeculative(window=6)
    pipe.enable_acceleration(acceleration)
    assert torch.equal(draw(pipe, **greedy), plain)
    statistics = acceleration.statistics
    units = 8 * 5 - 1 if make is lumina else 9  # with the ends of lines, without the last
    assert statistics.units == units and statistics.calls < units
    assert statistics.acceptance_map().shape == ((8, 5) if make is lumina else (3, 3))


def test_a_row_does_not_depend_on_its_batch():
    pipe = lumina()
    pipe.enable_acceleration(armm.JacobiSpeculative(window=4))
    both = draw(pipe)
    second = pipe(
        PROMPTS[1], generator=[torch.Generator().manual_seed(1)], output_type="latent", height=16, width=8
    ).images
    assert torch.equal(both[1:], second) and not torch.equal(both[:1], second)


@pytest.mark.parametrize(
    "acceleration",
    [
        armm.GroupedSpeculative(window=4, group_size=4),
        armm.GroupedSpeculative(window=4, group_size=4, table="codebook"),
        armm.RelaxedSpeculative(window=4, delta=0.2, neighbours=3),
    ],
    ids=["grouped", "grouped codebook", "relaxed"],
)
@pytest.mark.parametrize("make", [lumina, chameleon])
def test_lossy_verifiers_draw_codes(make, acceleration):
    pipe = make()
    pipe.enable_acceleration(acceleration)
    codes = draw(pipe)
    assert codes.shape == (2, 32 if make is lumina else 9) and 0 <= int(codes.min()) and int(codes.max()) < tiny.NUM_CODES
    assert acceleration.statistics.calls > 0


def test_callbacks_see_certain_ids_and_may_stop():
    pipe = lumina()
    pipe.enable_acceleration(armm.JacobiSpeculative(window=4))
    seen = []

    def watch(pipe, step, time, tensors):
        seen.append(tensors["latents"].clone())
        if step == 2:
            pipe._interrupt = True
        return {}

    codes = draw(pipe, callback_on_step_end=watch)
    assert len(seen) == 3 and codes.shape == (2, 32)
    certain = [int((ids >= 0).sum()) for ids in seen]
    assert certain == sorted(certain) and certain[-1] < 2 * 39


def test_what_cannot_be_accelerated_says_so():
    pipe = lumina()
    with pytest.raises(ValueError, match="draft model cannot draft"):
        pipe.enable_acceleration(armm.Speculative(DraftModel(tiny.model())))
    with pytest.raises(ValueError, match="StepAnnealing"):
        pipe.enable_acceleration(armm.StepAnnealing())
    pipe.enable_acceleration(armm.JacobiSpeculative(window=4))
    pipe.transformer.max_positions = 40
    with pytest.raises(ValueError, match="does not fit behind a prompt"):
        draw(pipe)


def test_vectors_stand_at_the_ids_of_their_codes():
    block = tiny.sized_block()
    table = vectors_by_id(block, torch.arange(2.0 * tiny.NUM_CODES).view(-1, 2), 30)
    assert table.shape == (30, 2) and torch.equal(table[block.code_ids[3]], torch.tensor([6.0, 7.0]))
    assert (table[0] == FAR).all()
