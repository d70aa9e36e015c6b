"""Pruning of image tokens: what stays, what it costs, and that a pruned run is the model with those tokens taken out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_janus import janus_pipeline, language_model
from tiny_unified import unified_pipeline

import armm
from armm.decoding import decode_text
from armm.pruning import TokenPruning, VisualTokenExit, VisualTokenGates, text_cost
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline

IMAGE = (3, 11)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def reader():
    parts = unified_pipeline()
    pipe = UnifiedImageToTextPipeline(parts.tokenizer, parts.transformer, parts.decoding, parts.words.vocabulary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def picture():
    return np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def prompt(model, seed=0):
    ids = torch.randint(30, (1, 16), generator=torch.Generator().manual_seed(seed))
    return model.prompt_condition(ids)


def gates_that(layers, dim, leave_at):
    """Gates that let the image tokens leave behind layer `leave_at`, for any text."""
    gates = VisualTokenGates(dim, layers, 4)
    for layer in range(layers):
        # enter gives w and -w, so one of the two GELUs is positive whatever the feature is
        weight = torch.randn(1, 2 * dim)
        gates.enter[layer].weight.data.copy_(torch.cat([weight, -weight, weight, -weight]))
        sign = 1.0 if layer == leave_at else -1.0
        gates.decide[layer].weight.data.copy_(torch.tensor([[0.0] * 4, [sign] * 4]))
    return gates


def test_keeping_everything_changes_nothing():
    model = language_model(codes=False)
    plain = decode_text(model, prompt(model), stop_id=0, max_tokens=6).ids
    for pruning in (TokenPruning((1, 2), (1.0, 1.0)), VisualTokenExit(gates_that(3, 24, 9))):
        output = decode_text(model, prompt(model), stop_id=0, max_tokens=6, pruning=pruning, images=[IMAGE])
        assert torch.equal(output.ids, plain) and output.cost.saved == 0 and output.cost.visual_saved == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), layer=st.integers(0, 1))
def test_an_exit_is_the_model_without_image_keys_from_there_on(seed, layer):
    model = language_model(codes=False)
    condition = prompt(model, seed)
    following = condition.length + torch.arange(3)[None]
    run = VisualTokenExit(gates_that(3, 24, layer)).begin(model, condition, [IMAGE], following)
    positions = model.positions_for(condition.index)
    hidden = model.trunk(condition.embeds, positions=positions, causal=True, hook=run)
    assert run.exit_layer == layer and hidden.shape[1] == condition.length - (IMAGE[1] - IMAGE[0])
    text = [place for place in range(condition.length) if not IMAGE[0] <= place < IMAGE[1]]
    x = condition.embeds
    for number, block in enumerate(model.trunk.blocks):
        rotary = positions.rotary if number <= layer else positions.rotary[:, :, text]
        x = block(x if number != layer + 1 else x[:, text], rotary, None, True)
    assert torch.allclose(hidden, model.trunk.norm(x), atol=1e-5)


def test_scores_choose_what_stays_and_layers_keep_their_own_lengths():
    model = language_model(codes=False)
    pruning = TokenPruning((1, 2), (0.5, 0.25), record=True)
    condition = prompt(model)
    run = pruning.begin(model, condition, [IMAGE], condition.length + torch.arange(4)[None])
    cache = model.trunk.allocate_cache(1, 30)
    model.trunk(condition.embeds, positions=model.positions_for(condition.index), causal=True, cache=cache, hook=run)
    assert run.tokens == cache.lengths == [16, 12, 10] and run.visual == [8, 4, 2]
    for stage in run.stages:
        assert float(stage["transition"].sum()) == pytest.approx(1, abs=1e-5)
        worst_kept = stage["score"][stage["kept"]].min()
        dropped = stage["score"][[i for i in range(len(stage["score"])) if i not in stage["kept"]]]
        assert worst_kept >= dropped.max()
    assert set(run.kept[1].tolist()) <= set(run.kept[0].tolist())


def test_costs_are_those_of_counting_every_product():
    model = language_model(codes=False)
    linear = 2 * sum(p.numel() for p in model.trunk.blocks[0].parameters() if p.dim() == 2)
    wide = 4 * 4 * 6  # heads of 6, scores and values
    cost = text_cost(model, [5, 3], [2, 0], 1)
    first = linear * 5 + wide * 15 + linear + wide * 6
    second = linear * 3 + wide * 6 + linear + wide * 4
    assert cost.flops == first + second and cost.full_flops == 2 * first
    assert cost.visual_flops == linear * 2 + wide * (15 - 6) + wide * 2
    assert cost.visual_saved == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["janus", "unified"])
def test_pipelines_prune_and_report(kind, reader, picture):
    pipe = janus_pipeline() if kind == "janus" else reader
    questions = ["a b", "what is this?"] if kind == "janus" else ["what color is the cube?", "is it day?"]
    layers = len(pipe.transformer.trunk.blocks)
    try:
        pipe.enable_acceleration(armm.TokenPruning((layers - 1,), (0.25,)))
        output = pipe.ask([picture] * 2, questions, max_new_tokens=4)
        assert 0 < output.cost.saved < 1 and output.cost.visual_saved > output.cost.saved
        assert output.texts == [pipe.ask(picture, q, max_new_tokens=4).texts[0] for q in questions]
        with pytest.raises(ValueError, match="does not go with the pruning"):
            pipe.ask(picture, questions[0], search=armm.BeamSearch(2))
        pipe.enable_acceleration(VisualTokenExit(gates_that(layers, pipe.transformer.trunk.dim, 0)))
        assert pipe.ask(picture, questions[0]).cost.visual_saved > 0.2
    finally:
        pipe.disable_acceleration()
    assert pipe.ask(picture, questions[0]).cost is None


def test_gates_are_read_strictly(tmp_path):
    gates = gates_that(2, 6, 0)
    state = {
        f"model.visual_gates_router.{i}.w{part}.weight": layers[i].weight
        for part, layers in ((1, gates.enter), (2, gates.decide))
        for i in range(2)
    }
    torch.save(state, tmp_path / "gates.bin")
    read = VisualTokenExit.from_single_file(tmp_path / "gates.bin").gates
    feature = torch.randn(12)
    assert torch.equal(read(feature, 1), gates(feature, 1))
    del state["model.visual_gates_router.1.w2.weight"]
    with pytest.raises(ValueError, match=r"visual_gates_router\.1\.w2"):
        VisualTokenGates.from_tensors(state)
    with pytest.raises(ValueError, match="lacks gates"):
        VisualTokenGates.from_tensors({})


def test_settings_that_make_no_sense_are_refused(reader):
    for after, keep in (
        ((2, 1), (0.5, 0.25)),
        ((1,), (0.5, 0.25)),
        ((0,), (0.5,)),
        ((1,), (1.5,)),
        ((1, 2), (0.2, 0.5)),
    ):
        with pytest.raises(ValueError, match="`after`|`keep`"):
            TokenPruning(after, keep)
    with pytest.raises(ValueError, match="this trunk has 2"):
        reader.enable_acceleration(TokenPruning((2,), (0.5,)))
    with pytest.raises(ValueError, match="gates are for"):
        reader.enable_acceleration(VisualTokenExit(VisualTokenGates(8, 2, 4)))
    with pytest.raises(ValueError, match="it supports VisualPruning"):
        reader.enable_acceleration(armm.StepAnnealing())
    model = language_model(codes=False)
    with pytest.raises(ValueError, match="one prompt at a time"):
        decode_text(
            model, prompt(model).repeat(2), stop_id=0, max_tokens=2, pruning=TokenPruning((1,), (0.5,)), images=[IMAGE]
        )
