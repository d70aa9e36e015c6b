"""One checkpoint with several decodings: their folders, choosing one, what is refused; weights stored as int8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_unified import ANSWERS, CODES, GRID, SLOTS, unified_pipeline

import armm
from armm.decoding import NeighboringDecoding, NextTokenDecoding, TokenShuffleDecoding
from armm.model import AutoregressiveModel
from armm.nn.int8_weights import pack_file, pack_rows, unpack_rows
from armm.training.tasks.unified_start import start_from
from pipelines import ARPipeline, decodings
from pipelines.unified_text_to_image import UnifiedTextToImagePipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


def variant(pipe: UnifiedTextToImagePipeline, name: str) -> UnifiedTextToImagePipeline:
    """The same model for another decoding, started from its weights."""
    config = {key: value for key, value in dict(pipe.transformer.config).items() if not key.startswith("_")}
    if name == "neighboring":
        config["transformer"] = config["transformer"] | {"num_layers": 3, "taps": [2]}
        config["head"], strategy = {"type": "neighboring", "axes": 2}, NeighboringDecoding()
    else:
        positions = SLOTS + 1 + GRID[0] * GRID[1] // 4 + ANSWERS
        config["transformer"] = config["transformer"] | {"learned_positions": positions}
        config["shuffle"], strategy = {"window": 2}, TokenShuffleDecoding(2)
    torch.manual_seed(11)
    model = AutoregressiveModel(**config).eval()
    start_from(model, pipe.transformer)
    return UnifiedTextToImagePipeline(
        tokenizer=pipe.tokenizer,
        transformer=model,
        decoding=strategy,
        vocabulary=list(pipe.config["vocabulary"]),
        generation_config={"guidance_scale": 1.5, "temperature": 0.6},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("offer")
    pipe = unified_pipeline()
    pipe.save_pretrained(root / "base")
    for name in ("neighboring", "token_shuffle"):
        variant(pipe, name).save_pretrained(root / name)
        assert decodings.add(root / "base", root / name).name == name
    return root / "base"


def draw(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cube", generator=torch.Generator().manual_seed(3), output_type="latent").images


@pytest.mark.parametrize(
    ("name", "strategy", "calls"),
    [("neighboring", NeighboringDecoding, 7), ("token-shuffle", TokenShuffleDecoding, 4), ("next_token", NextTokenDecoding, 16)],
)
def test_a_name_chooses_strategy_weights_and_settings(folder, name, strategy, calls):
    pipe = armm.pipeline(folder, decoding=name)
    assert type(pipe) is UnifiedTextToImagePipeline and type(pipe.decoding) is strategy
    ids = draw(pipe)
    assert pipe.num_timesteps == calls and ids.shape == (1, 16)
    if strategy is not NextTokenDecoding:
        assert pipe.generation_config["temperature"] == 0.6
        alone = ARPipeline.from_pretrained(folder.parent / name.replace("-", "_"))
        assert torch.equal(ids, draw(alone))


def test_other_tasks_and_dtypes_take_the_choice_too(folder, tmp_path):
    pipe = armm.UnifiedInpaintPipeline.from_pretrained(folder, decoding="neighboring", dtype=torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16 and isinstance(pipe.decoding, NeighboringDecoding)
    pipe = armm.pipeline(folder, decoding="neighboring")
    pipe.save_pretrained(tmp_path / "chosen")
    assert torch.equal(draw(ARPipeline.from_pretrained(tmp_path / "chosen")), draw(pipe))


def test_the_shipped_pipelines_of_a_task_take_it(monkeypatch, folder):
    monkeypatch.setattr("armm.weights.path", lambda name: folder)
    assert isinstance(armm.pipeline("text-to-image", decoding="token-shuffle").decoding, TokenShuffleDecoding)


def test_a_decoding_that_is_not_offered_lists_those_that_are(folder):
    with pytest.raises(ValueError, match=r"unknown `decoding` of base 'neighbouring'.*neighboring.*next_token"):
        armm.pipeline(folder, decoding="neighbouring")


def test_missing_or_foreign_weights_of_a_decoding_are_refused(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    path = broken / "decodings" / "neighboring" / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors.pop("trunk.norm.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"missing 'trunk.norm.weight'"):
        armm.pipeline(broken, decoding="neighboring")
    path.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        armm.pipeline(broken, decoding="neighboring")
    armm.pipeline(broken)  # the other decodings do not care


def test_variants_of_weights(tmp_path):
    base, pipe = tmp_path / "base", unified_pipeline()
    other = variant(pipe, "neighboring")
    expected = draw(pipe), draw(other)
    pipe.save_pretrained(base, variant="fp16")
    other.save_pretrained(tmp_path / "neighboring", variant="fp16")
    decodings.add(base, tmp_path / "neighboring")
    assert torch.equal(draw(armm.pipeline(base, variant="fp16")), expected[0])
    assert torch.equal(draw(armm.pipeline(base, variant="fp16", decoding="neighboring")), expected[1])
    for options in ({}, {"decoding": "neighboring"}):
        with pytest.raises(ValueError, match="pass variant='fp16'"):
            armm.pipeline(base, **options)
    with pytest.raises(ValueError, match="has no variant 'fp32'; it has 'fp16'"):
        armm.pipeline(base, variant="fp32")
    # Other weights without a variant beside them; a decoding without the variant is loaded as it is.
    for parameter in (*pipe.transformer.parameters(), *other.transformer.parameters()):
        torch.nn.init.normal_(parameter)
    changed = draw(pipe), draw(other)
    pipe.save_pretrained(base)
    other.save_pretrained(base / "decodings" / "neighboring")
    found = [draw(armm.pipeline(base, decoding=name)) for name in ("next_token", "neighboring")]
    assert all(map(torch.equal, found, changed)) and not any(map(torch.equal, changed, expected))
    assert torch.equal(draw(armm.pipeline(base, decoding="neighboring", variant="fp16")), expected[1])
    (base / "decodings" / "neighboring" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert torch.equal(draw(armm.pipeline(base, decoding="neighboring", variant="fp16")), changed[1])


def test_only_decodings_of_the_same_words_can_be_added(folder, tmp_path):
    source = folder.parent / "neighboring"
    index = json.loads((source / "model_index.json").read_text())
    index["vocabulary"] = index["vocabulary"][:-1]
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="vocabularies"):
        decodings.add(folder, other)
    with pytest.raises(ValueError, match="no use"):
        decodings.add(folder, folder)


# ---------------------------------------------------------------------- starting from another decoding's weights


def test_one_more_block_and_a_head_for_each_axis_start_as_the_model_they_come_from():
    pipe = unified_pipeline()
    model, other = variant(pipe, "neighboring").transformer, pipe.transformer
    ids = torch.randint(0, CODES, (2, 6), generator=torch.Generator().manual_seed(0))
    embeds = model.embed(ids)
    positions = model.positions_for(torch.arange(6))
    last, taps = model.trunk(embeds, positions=positions)
    tap = taps[2]
    expected = other.trunk(other.embed(ids), positions=other.positions_for(torch.arange(6)))
    torch.testing.assert_close(tap, expected)
    torch.testing.assert_close(last, expected)
    for axis, state in zip(model.head.axes, (tap, last), strict=True):
        torch.testing.assert_close(axis(state), other.head(expected))


def test_learned_positions_of_windows_start_as_the_mean_of_their_tokens():
    pipe = unified_pipeline()
    model, other = variant(pipe, "token_shuffle").transformer, pipe.transformer
    table, source = (m.trunk.position_embedding.weight for m in (model, other))
    first = SLOTS + 1
    torch.testing.assert_close(table[:first], source[:first])
    torch.testing.assert_close(table[first], source[[first, first + 1, first + 4, first + 5]].mean(0))
    torch.testing.assert_close(table[first + 4 :], source[first + 16 :])


# ---------------------------------------------------------------------- int8 storage


def test_int8_rows_round_trip_within_half_a_step():
    weights = {"a.weight": torch.randn(5, 64), "zero.weight": torch.zeros(3, 32)}
    weights |= {"conv.weight": torch.randn(4, 2, 3, 3), "norm.weight": torch.randn(64)}
    packed = pack_rows(weights)
    assert packed["a.weight"].dtype == torch.int8 and packed["norm.weight"].dtype == torch.float32
    unpack_rows(packed)
    assert packed.keys() == weights.keys()
    for name in ("a.weight", "conv.weight"):
        rows, originals = packed[name].flatten(1), weights[name].flatten(1)
        assert ((rows - originals).abs() <= 0.5001 * originals.abs().amax(1, keepdim=True) / 127).all()
    assert torch.equal(packed["norm.weight"], weights["norm.weight"]) and not packed["zero.weight"].any()


def test_a_model_stored_as_int8_is_small_loads_as_floats_and_is_checked(tmp_path):
    pipe = unified_pipeline()
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / WEIGHTS
    before = path.stat().st_size
    pack_file(path)
    assert path.stat().st_size < 0.4 * before
    loaded = armm.pipeline(tmp_path)
    assert loaded.transformer.dtype == torch.float32 and draw(loaded).shape == (1, 16)
    half = armm.pipeline(tmp_path, dtype=torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    tensors = load_file(path)
    tensors.pop("head.projection.weight_scale")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="without its head.projection.weight_scale"):
        armm.pipeline(tmp_path)


@pytest.mark.parametrize("name", ["neighboring", "token_shuffle"])
def test_a_model_of_the_same_decoding_starts_with_every_weight(name):
    trained = variant(unified_pipeline(), name).transformer
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    config = {key: value for key, value in dict(trained.config).items() if not key.startswith("_")}
    model = AutoregressiveModel(**config)
    assert start_from(model, trained) == []
    for key, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key]), key
