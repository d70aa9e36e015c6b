"""Reading published checkpoints: every container, no code, and errors that name what is wrong."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from armm.convert import (
    CheckpointError,
    CheckpointKeysError,
    CheckpointShapeError,
    UnreadableCheckpointError,
    UnsafeCheckpointError,
    containers,
    convert,
    family_module,
    keymap,
)
from armm.convert import llamagen as llamagen_files
from armm.convert.folders import load_folder, read_beside
from armm.model import AutoregressiveModel
from tokenizers_visual import VQTokenizer

CASES = Path(__file__).parent / "parity" / "cases" / "llamagen"
HEADS = {"n_head": 4}


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, torch.Tensor]]:
    """The golden checkpoints' tensors under the authors' names, by kind."""
    return {kind: containers.load_state_dict(CASES / kind / "checkpoint.pt") for kind in ("tokenizer", "c2i", "t2i")}


@pytest.fixture(scope="module")
def state(states):
    return states["c2i"]


def same(module: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = module.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------- containers

WRAPPERS = {
    "model": lambda state: {"model": state},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state},
    "flat": lambda state: dict(state),
    "nested": lambda state: {"module": {"model": state}},
    "ema only": lambda state: {"ema": state},
    "DistributedDataParallel": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
    "compiled": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "compiled in DDP": lambda state: {f"module._orig_mod.{name}": value for name, value in state.items()},
    "rotary table": lambda state: {"model": {**state, "freqs_cis": torch.zeros(26, 8, 2)}},
    "cache buffers": lambda state: {
        "model": {**state, "layers.0.attention.kv_cache.k_cache": torch.zeros(1, 4, 8, 16)}
    },
    "trainer": lambda state: {
        "model": state,
        "ema": {name: value + 1 for name, value in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "discriminator": {"main.0.weight": torch.zeros(2)},
        "optimizer_disc": {},
        "steps": 300000,
        "args": argparse.Namespace(
            gpt_model="GPT-B", lr=1e-4, results_dir="results", no_local_save=False, betas=[0.9, 0.95]
        ),
    },
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "old pickle"])
def test_every_container_gives_the_same_tensors(name, old_format, state, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(WRAPPERS[name](state), path, _use_new_zipfile_serialization=not old_format)
    loaded = containers.load_state_dict(path)
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_safetensors_are_read_whatever_the_file_is_called(state, tmp_path):
    for name in ("c2i.safetensors", "c2i.bin"):
        save_file(state, tmp_path / name)
        assert same(
            convert("llamagen", tmp_path / name, config=HEADS), llamagen_files.convert_state_dict(state, config=HEADS)
        )


def test_the_moving_average_is_taken_on_request(state, tmp_path):
    torch.save(WRAPPERS["trainer"](state), tmp_path / "c2i.pt")
    loaded = containers.load_state_dict(tmp_path / "c2i.pt", use_ema=True)
    assert torch.equal(loaded["norm.weight"], state["norm.weight"] + 1)
    torch.save({"model": state}, tmp_path / "c2i.pt")
    with pytest.raises(CheckpointKeysError, match="holds no moving average"):
        containers.load_state_dict(tmp_path / "c2i.pt", use_ema=True)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


class Popen:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w')",)


@pytest.mark.parametrize("attack", [Malicious, Popen])
@pytest.mark.parametrize("writer", ["torch", "torch old", "pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(attack, writer, state, tmp_path):
    path, target = tmp_path / "checkpoint.pt", tmp_path / "executed"
    content = {"model": state, "args": attack(target)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"args": attack(target)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises((UnsafeCheckpointError, UnreadableCheckpointError)) as caught:
        convert("llamagen", path, config=HEADS)
    if writer != "pickle":
        assert caught.type is UnsafeCheckpointError and "would run code" in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("kind", ["zip", "old pickle", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.98])
def test_truncated_files_are_refused(kind, share, state, tmp_path):
    path = tmp_path / ("c2i.safetensors" if kind == "safetensors" else "c2i.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UnreadableCheckpointError, match="c2i"):
        convert("llamagen", path, config=HEADS)


@pytest.mark.parametrize(
    ("content", "error", "match"),
    [
        (b"hello, this is text", UnreadableCheckpointError, "not a torch checkpoint"),
        (b"<html>404</html>" * 50, UnreadableCheckpointError, "not a torch checkpoint"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), UnreadableCheckpointError, "not a torch checkpoint"),
        ([1, 2, 3], UnreadableCheckpointError, "holds a list"),
        (torch.zeros(3), UnreadableCheckpointError, "holds a Tensor"),
        ({}, UnreadableCheckpointError, "holds no tensors"),
        ({"model": {}}, UnreadableCheckpointError, "holds no tensors"),
        ({"weights": {"a": torch.zeros(1)}}, CheckpointKeysError, "'weights' are none"),
        ({"model": {"a": torch.zeros(1), "b": "text"}}, CheckpointKeysError, "'b' are none"),
        ({"model": {"conv.weight": torch.zeros(1)}}, CheckpointKeysError, "no LlamaGen checkpoint.*conv.weight"),
    ],
)
def test_files_that_are_no_checkpoint(content, error, match, tmp_path):
    path = tmp_path / "some.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(error, match=match):
        convert("llamagen", path)


def test_missing_files_and_directories_are_refused(tmp_path):
    with pytest.raises(UnreadableCheckpointError, match="there is no checkpoint file"):
        convert("llamagen", tmp_path / "none.pt")
    with pytest.raises(UnreadableCheckpointError, match="is a directory"):
        convert("llamagen", tmp_path)


# ---------------------------------------------------------------------- rules


def test_rules_are_read_in_both_directions():
    rule = keymap.Rule("layers.{i}.wqkv.{leaf}", ("blocks.{i}.q.{leaf}", "blocks.{i}.k.{leaf}"), keymap.split_qkv)
    state = {"layers.12.wqkv.weight": torch.arange(6.0).view(3, 2)}
    converted = keymap.apply_rules(state, (rule,), {"qkv_rows": (2, 1)})
    assert converted["blocks.12.q.weight"].shape == (2, 2)
    assert torch.equal(converted["blocks.12.k.weight"], torch.tensor([[4.0, 5.0]]))
    assert rule.source_of("blocks.3.k.bias") == "layers.3.wqkv.bias"
    assert rule.source_of("other.3.k.bias") is None
    with pytest.raises(CheckpointKeysError, match="layers.x.wqkv.weight") as caught:
        keymap.apply_rules({"layers.x.wqkv.weight": torch.zeros(3, 2)}, (rule,), {"qkv_rows": (2, 1)})
    assert caught.value.unknown == ["layers.x.wqkv.weight"]


def test_only_1x1_convolutions_are_squeezed():
    assert keymap.squeeze_convolution(torch.zeros(4, 3, 1, 1), {}).shape == (4, 3)
    assert keymap.squeeze_convolution(torch.zeros(4), {}).shape == (4,)
    with pytest.raises(CheckpointShapeError, match="1x1"):
        keymap.squeeze_convolution(torch.zeros(4, 3, 3, 3), {})


# ---------------------------------------------------------------------- LlamaGen


def test_the_family_registry_answers_near_misses():
    assert family_module("llamagen") is llamagen_files
    with pytest.raises(ValueError, match="did you mean 'llamagen'"):
        convert("lamagen", "x.pt")


@pytest.mark.parametrize("kind", ["tokenizer", "c2i", "t2i"])
def test_each_tensor_is_needed_and_no_other_is_accepted(kind, states):
    state, config = states[kind], None if kind == "tokenizer" else HEADS
    dropped = {"quantize.codebook_used"}
    for name in list(state)[:: 1 if len(state) < 40 else 7]:  # every seventh of the tokenizer's
        if name in dropped:
            continue
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(CheckpointError, match=r"lacks|missing|no LlamaGen"):
            llamagen_files.convert_state_dict(rest, config=config)
    with pytest.raises(CheckpointKeysError, match="extra.weight"):
        llamagen_files.convert_state_dict({**state, "extra.weight": torch.zeros(1)}, config=config)


def test_a_missing_tensor_is_named_as_its_authors_name_it(state):
    rest = {key: value for key, value in state.items() if key != "layers.1.attention.wqkv.weight"}
    with pytest.raises(CheckpointKeysError, match="missing layers.1.attention.wqkv.weight") as caught:
        llamagen_files.convert_state_dict(rest, config=HEADS)
    assert caught.value.missing == ["layers.1.attention.wqkv.weight"]


def test_a_missing_layer_is_noticed(state):
    rest = {key: value for key, value in state.items() if not key.startswith("layers.1.")}
    with pytest.raises(CheckpointKeysError, match=r"layers.N.* N = \[1\]"):
        llamagen_files.convert_state_dict(rest, config=HEADS)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layers.1.feed_forward.w2.weight", (64, 255)),
        ("layers.1.attention.wo.weight", (63, 64)),
        ("layers.0.attention.wqkv.weight", (190, 64)),
        ("layers.2.attention.wqkv.weight", (180, 64)),
        ("output.weight", (95, 64)),
        ("norm.weight", (1, 64)),
        ("tok_embeddings.weight", (96,)),
    ],
)
def test_a_wrong_shape_is_named(name, shape, state):
    with pytest.raises(CheckpointShapeError, match=name):
        llamagen_files.convert_state_dict({**state, name: torch.zeros(shape)}, config=HEADS)


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        (None, ValueError, "attention heads.*num_heads"),
        ({"n_head": 5}, ValueError, "must divide the width 64"),
        ({"num_heads": "four"}, ValueError, "num_heads"),
        ({"n_heads": 4}, ValueError, "unknown `config` options n_heads"),
        ({"n_head": 4, "dim": 128}, CheckpointShapeError, "dim = 128, but the tensors of the file say 64"),
        ({"n_head": 4, "num_classes": 1000}, CheckpointShapeError, "num_classes = 1000.*say 10"),
        ({"n_head": 4, "model_type": "t2i"}, CheckpointShapeError, "model_type"),
        ("missing.json", ValueError, "not a readable JSON file"),
        (4, TypeError, "`config` must be a dict"),
    ],
)
def test_a_config_is_checked_against_the_tensors(config, error, match, state):
    with pytest.raises(error, match=match):
        llamagen_files.convert_state_dict(state, config=config)


def test_a_config_may_be_a_json_file(state, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 4, "num_classes": 10}))
    model = llamagen_files.convert_state_dict(state, config=tmp_path / "config.json")
    assert model.config.transformer["num_heads"] == 4


def test_the_tokenizer_is_recognised_and_its_sizes_read(states):
    model = llamagen_files.convert_state_dict(states["tokenizer"])
    assert isinstance(model, VQTokenizer) and not model.training
    assert (model.codebook_size, model.downsample, model.latent_channels) == (64, 4, 8)
    assert list(model.config.encoder_multipliers) == [1, 2, 1] and list(model.config.decoder_multipliers) == [1, 1, 1]


def test_published_sizes_need_no_config():
    """Every published transformer's shapes give its configuration; no weights are allocated."""
    for (dim, layers), heads in llamagen_files.PUBLISHED_HEADS.items():
        hidden = -(-int(8 * dim / 3) // 256) * 256
        state = {
            "tok_embeddings.weight": torch.empty(16384, dim, device="meta"),
            "cls_embedding.embedding_table.weight": torch.empty(1001, dim, device="meta"),
            "layers.0.feed_forward.w1.weight": torch.empty(hidden, dim, device="meta"),
            "layers.0.attention.wqkv.weight": torch.empty(3 * dim, dim, device="meta"),
            **{f"layers.{i}.ffn_norm.weight": torch.empty(dim, device="meta") for i in range(layers)},
        }
        config = llamagen_files.transformer_arguments(state, {})
        trunk = config["transformer"]
        assert (trunk["num_heads"], trunk["num_kv_heads"], trunk["num_layers"]) == (heads, heads, layers)
        assert config["condition"] == {"type": "class", "num_classes": 1000}
        assert sum(trunk["rotary_axes"]) == dim // heads


def test_weights_are_copies_in_the_asked_dtype(states, tmp_path):
    path = tmp_path / "c2i.pt"
    torch.save({"model": states["c2i"]}, path)
    model = convert("llamagen", path, config=HEADS, dtype=torch.bfloat16)
    assert isinstance(model, AutoregressiveModel)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    path.write_bytes(b"")  # what was loaded does not depend on the file any more
    assert torch.equal(model.head.projection.weight, states["c2i"]["output.weight"].bfloat16())
    tokenizer = llamagen_files.convert_state_dict(states["tokenizer"], dtype=torch.bfloat16)
    assert tokenizer.quantizer.embedding.weight.dtype is torch.float32
    assert tokenizer.quant_conv.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "config", "grid"),
    [
        ("c2i_B_256.pt", {}, (16, 16)),
        ("c2i_XL_384.pt", {}, (24, 24)),
        ("t2i_XL_stage2_512.pt", {}, (32, 32)),
        ("mine.pt", {}, (16, 16)),
        ("mine.pt", {"block_size": 1024}, (32, 32)),
        ("c2i_B_256.pt", {"grid": [8, 12]}, (8, 12)),
    ],
)
def test_the_grid_comes_from_the_config_or_the_name(name, config, grid, state):
    model = llamagen_files.convert_state_dict(state, config={**HEADS, **config}, name=name)
    assert model.grid == grid


def test_a_block_size_must_be_a_square(state):
    with pytest.raises(ValueError, match="`block_size`.*square"):
        llamagen_files.convert_state_dict(state, config={**HEADS, "block_size": 24})


# ---------------------------------------------------------------------- folders of shards


def test_folders_of_shards(tmp_path):
    tensors = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(3)}
    places = {name: f"pytorch_model-{i}.bin" for i, name in enumerate(tensors)}
    for name, shard in places.items():
        torch.save({name: tensors[name]}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for source in (tmp_path, index):
        assert {name: value.tolist() for name, value in load_folder(source).items()} == {
            name: value.tolist() for name, value in tensors.items()
        }
    assert list(load_folder(tmp_path / "pytorch_model-1.bin")) == ["layers.1.weight"]
    assert read_beside(index, index.name) == read_beside(tmp_path, index.name) != read_beside(tmp_path) == {}
    with pytest.raises(CheckpointKeysError, match="no moving average"):
        load_folder(tmp_path, use_ema=True)
    for weight_map, message in [
        ({}, "no `weight_map`"),
        ({**places, "a": "../a.bin"}, "must lie beside it"),
        ({**places, "a": "a.bin"}, r"lacks the shards \['a.bin'\]"),
        ({**places, "norm.weight": "pytorch_model-0.bin"}, "lack norm.weight"),
    ]:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            load_folder(tmp_path)
