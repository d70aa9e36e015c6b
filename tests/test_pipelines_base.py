"""What every pipeline inherits: strict loading, whole saving, checked arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llamagen import class_pipeline, text_encoder, text_pipeline, tiny_tokenizer

import armm
from pipelines import ARPipeline, ARPipelineOutput, ARTextOutput, LlamaGenPipeline
from pipelines.loading import atomic_directory, weight_files

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipe():
    return class_pipeline()


@pytest.fixture
def saved(pipe, tmp_path) -> Path:
    folder = tmp_path / "saved"
    pipe.save_pretrained(folder)
    return folder


def generate(pipe, **arguments) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe([1, 7], generator=torch.Generator().manual_seed(5), output_type="latent", **arguments).images


def edit_json(path: Path, **values) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content))


def edit_weights(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# ---------------------------------------------------------------------- round trips


def test_a_saved_pipeline_is_a_diffusers_directory(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "LlamaGenPipeline"
    assert index["tokenizer"] == ["tokenizers_visual.vq_tokenizer", "VQTokenizer"]
    assert index["transformer"] == ["armm.model", "AutoregressiveModel"]
    assert index["decoding"] == ["armm.decoding.next_token", "NextTokenDecoding"]
    assert index["text_encoder"] == [None, None] or index["text_encoder"] is None
    assert index["generation_config"] == {"guidance_scale": 2.0}
    files = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert files == {
        "model_index.json", "decoding/scheduler_config.json", "tokenizer/config.json", f"tokenizer/{WEIGHTS}",
        "transformer/config.json", f"transformer/{WEIGHTS}",
    }  # fmt: skip
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]  # no temporary folder is left


@pytest.mark.parametrize("load", [LlamaGenPipeline.from_pretrained, ARPipeline.from_pretrained, armm.pipeline])
def test_a_loaded_pipeline_gives_the_same_tokens(load, pipe, saved):
    loaded = load(saved)
    assert type(loaded) is LlamaGenPipeline and loaded.generation_config == pipe.generation_config
    assert not loaded.transformer.training
    assert torch.equal(generate(loaded), generate(pipe))


def test_the_dtype_is_applied_under_both_names(saved):
    for arguments in ({"dtype": torch.bfloat16}, {"torch_dtype": torch.bfloat16}):
        loaded = armm.pipeline(saved, **arguments)
        assert loaded.transformer.dtype is torch.bfloat16
        assert loaded.tokenizer.quantizer.embedding.weight.dtype is torch.float32
        assert generate(loaded).shape == (2, 16)
    loaded = armm.pipeline(saved, dtype={"transformer": torch.bfloat16, "default": torch.float32})
    assert (loaded.transformer.dtype, loaded.tokenizer.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match="disagree"):
        armm.pipeline(saved, dtype=torch.bfloat16, torch_dtype=torch.float16)
    with pytest.raises(TypeError, match="`dtype` must be a torch.dtype"):
        armm.pipeline(saved, dtype="bfloat16")


def test_components_and_settings_can_be_given(saved, pipe):
    tokenizer = tiny_tokenizer()
    loaded = LlamaGenPipeline.from_pretrained(saved, tokenizer=tokenizer, generation_config={"top_k": 7})
    assert loaded.tokenizer is tokenizer and loaded.generation_config["top_k"] == 7
    assert set(loaded.components) == {"tokenizer", "transformer", "decoding", "text_encoder", "text_tokenizer"}


def test_text_components_survive_the_round_trip(tmp_path):
    pipe = text_pipeline(**text_encoder())
    pipe.save_pretrained(tmp_path / "text")
    loaded = armm.pipeline(tmp_path / "text")
    loaded.set_progress_bar_config(disable=True)
    images = [
        p("a red cube", generator=torch.Generator().manual_seed(1), output_type="latent").images for p in (pipe, loaded)
    ]
    assert torch.equal(*images)


def test_variants_and_shards_load(pipe, tmp_path):
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path / "v", variant="fp32")
    assert torch.equal(generate(armm.pipeline(tmp_path / "v", variant="fp32")), expected)
    pipe.save_pretrained(tmp_path / "s", max_shard_size="20KB")
    assert len(weight_files(tmp_path / "s" / "transformer")) > 1
    assert torch.equal(generate(armm.pipeline(tmp_path / "s")), expected)
    # saved again in one piece: the old shards are gone, other files stay
    (tmp_path / "s" / "notes.txt").write_text("mine")
    pipe.save_pretrained(tmp_path / "s")
    assert [path.name for path in weight_files(tmp_path / "s" / "transformer")] == [WEIGHTS]
    assert not list(tmp_path.rglob("s/*/*-of-*")) and not list(tmp_path.rglob("s/*/*.index.json"))
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
    assert torch.equal(generate(armm.pipeline(tmp_path / "s")), expected)


# ---------------------------------------------------------------------- strict loading


def test_a_missing_tensor_is_an_error(saved):
    edit_weights(saved / "transformer" / WEIGHTS, lambda tensors: tensors.pop("trunk.blocks.1.mlp.up.weight"))
    with pytest.raises(ValueError, match=r"transformer do not fit.*missing 'trunk.blocks.1.mlp.up.weight'"):
        armm.pipeline(saved)


def test_an_unknown_tensor_is_an_error(saved):
    edit_weights(saved / "tokenizer" / WEIGHTS, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"tokenizer do not fit.*unknown 'extra'"):
        armm.pipeline(saved)


def test_a_wrong_shape_is_an_error(saved):
    edit_weights(saved / "transformer" / WEIGHTS, lambda tensors: tensors.update({"trunk.norm.weight": torch.ones(31)}))
    with pytest.raises(ValueError, match="trunk.norm.weight|shape"):
        armm.pipeline(saved)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights_are_an_error(saved, share):
    path = saved / "transformer" / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is (truncated|not a whole)"):
        armm.pipeline(saved)


def remove_tree(path: Path) -> None:
    for entry in sorted(path.rglob("*"), reverse=True):
        entry.unlink() if entry.is_file() else entry.rmdir()
    path.rmdir()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda d: (d / "model_index.json").unlink(), "not a pipeline directory"),
        (lambda d: (d / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "model_index.json").write_text("[]"), "does not name its pipeline"),
        (lambda d: edit_json(d / "model_index.json", _class_name="LamaGenPipeline"), "did you mean 'LlamaGenPipeline'"),
        (lambda d: edit_json(d / "model_index.json", _class_name="ARPipelineOutput"), "unknown pipeline class"),
        (
            lambda d: edit_json(d / "model_index.json", transformer=["armm.nothing", "X"]),
            "unknown module 'armm.nothing'",
        ),
        (lambda d: edit_json(d / "model_index.json", transformer=["armm.model", "X"]), "has no class 'X'"),
        (lambda d: edit_json(d / "model_index.json", generation_config={"topk": 3}), "did you mean 'top_k'"),
        (lambda d: (d / "transformer" / WEIGHTS).unlink(), "holds no weights"),
        (lambda d: remove_tree(d / "tokenizer"), "lacks the folder 'tokenizer'"),
        (lambda d: edit_json(d / "tokenizer" / "config.json", codebook_size=64), "shape|size"),
    ],
)
def test_damaged_directories_are_refused(saved, damage, match):
    damage(saved)
    with pytest.raises(ValueError, match=match):
        armm.pipeline(saved)


def test_another_class_is_named(saved):
    edit_json(saved / "model_index.json", _class_name="UnifiedTextToImagePipeline")
    with pytest.raises(ValueError, match="holds a UnifiedTextToImagePipeline, not a LlamaGenPipeline"):
        LlamaGenPipeline.from_pretrained(saved)


def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(tmp_path):
    (tmp_path / "c2i_B_256.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="from_single_file"):
        LlamaGenPipeline.from_pretrained(tmp_path / "c2i_B_256.pt")
    for name in ("nothing", "./nothing/here", "a/b/c"):
        with pytest.raises(ValueError, match="neither a directory nor a hub id"):
            LlamaGenPipeline.from_pretrained(name)
    with pytest.raises(ValueError, match="no published single-file format"):
        ARPipeline.from_single_file("x.pt")


# ---------------------------------------------------------------------- whole saving


def test_a_failed_save_leaves_nothing(pipe, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(pipe.decoding), "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path / "deep" / "folder")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_keeps_what_was_there(pipe, saved, monkeypatch):
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    monkeypatch.setattr(type(pipe), "save_config", lambda self, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe.save_pretrained(saved)
    assert {path: path.read_bytes() for path in saved.parent.rglob("*") if path.is_file()} == before


def test_saving_over_a_file_is_refused(pipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="it is a file"):
        pipe.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_an_atomic_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "a" / "b") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "1" and len(list((tmp_path / "a").iterdir())) == 1


# ---------------------------------------------------------------------- checked arguments


def test_outputs_are_dataclasses_and_tuples():
    output = ARPipelineOutput(images=[1])
    assert output[0] == output["images"] == output.images == [1] and output.to_tuple() == ([1],)
    assert ARTextOutput(texts=["a"]).texts == ["a"]


def test_generators_are_counted(pipe):
    generators = [torch.Generator() for _ in range(2)]
    ARPipeline.check_generator(generators, 2)
    ARPipeline.check_generator(None, 2)
    ARPipeline.check_generator(generators[0], 2)
    with pytest.raises(ValueError, match="holds 2 generators, but the call makes 3 images"):
        ARPipeline.check_generator(generators, 3)
    with pytest.raises(TypeError, match="`generator` must be"):
        ARPipeline.check_generator(42, 1)


@pytest.mark.parametrize("bad", ["PIL", "numpy", "", None])
def test_output_types_are_checked(bad):
    with pytest.raises(ValueError, match="`output_type` must be one of"):
        ARPipeline.check_output_type(bad)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 11])
def test_numbers_are_checked(value):
    with pytest.raises(ValueError, match="`x` must be between 0 and 10"):
        ARPipeline.check_number("x", value, low=0, high=10)


@pytest.mark.parametrize("value", ["3", None, True, 2.5])
def test_number_types_are_checked(value):
    with pytest.raises(TypeError, match="`x` must be an integer"):
        ARPipeline.check_number("x", value, low=0, integer=True)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="unknown `generation_config` key 'guidance'.*did you mean 'guidance_scale'"):
        class_pipeline(guidance=3.0)


def test_layer_by_layer_offload_is_refused(pipe):
    with pytest.raises(ValueError, match=r"LlamaGenPipeline cannot be offloaded layer by layer: use `enable_model_cpu_offload"):
        pipe.enable_sequential_cpu_offload()
