"""D-AR: partial decodes, the pipeline with its previews and shared layouts, and the files of its authors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import MutableMapping
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_dar import TOKENIZER, tiny_dar_pipeline, tiny_dar_tokenizer

import armm
from armm.cli.main import main
from armm.convert import CheckpointKeysError, CheckpointShapeError, UnsafeCheckpointError, convert, dar, llamagen
from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.model import AutoregressiveModel
from pipelines.dar import DARPipeline
from tokenizers_visual import Codes, DARTokenizer, VQTokenizer
from tokenizers_visual.dar_decoder import shifted_times, window_starts


@pytest.fixture(scope="module")
def tokenizer() -> DARTokenizer:
    return tiny_dar_tokenizer()


@pytest.fixture(scope="module")
def pipe() -> DARPipeline:
    return tiny_dar_pipeline()


def some_ids(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(24, (batch, 8), generator=torch.Generator().manual_seed(seed))


NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------- the schedule


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.data())
def test_windows_are_those_of_the_nearest_group(steps, groups, size, data):
    tokens = groups * size
    window = data.draw(st.integers(1, tokens))
    found = window_starts(steps, groups, tokens, window)
    for step, start in enumerate(found):
        nearest = (2 * step * groups + steps) // (2 * steps)  # halves go up
        assert start == min(tokens - window, nearest * size)
    assert found == sorted(found)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.floats(0.1, 8))
def test_times_grow_from_noise_to_the_image(steps, shift):
    times = shifted_times(steps, shift)
    assert times[0] == 0 and times[-1] == 1 and times == sorted(times) and len(times) == steps + 1
    if shift == 2.0:
        assert times[1] == pytest.approx(1 / (2 * steps - 1))


# ---------------------------------------------------------------------- partial decoding


@torch.no_grad()
def test_a_preview_does_not_depend_on_later_tokens(tokenizer):
    ids = some_ids()
    for steps in range(1, 5):
        needed = tokenizer.start_decoding(2, noise=NOISE).tokens_of(steps)
        assert needed == 2 * steps
        preview = tokenizer.decode(Codes(ids=ids), noise=NOISE, preview_steps=steps)
        changed = ids.clone()
        changed[:, needed:] = 0
        for codes in (Codes(ids=changed), Codes(ids=ids[:, :needed])):
            torch.testing.assert_close(
                tokenizer.decode(codes, noise=NOISE, preview_steps=steps), preview, atol=1e-5, rtol=0
            )
        if steps < 4:
            changed[:, needed - 1] = (changed[:, needed - 1] + 1) % 24
            assert (tokenizer.decode(Codes(ids=changed), noise=NOISE, preview_steps=steps) - preview).abs().max() > 1e-3
    torch.testing.assert_close(tokenizer.decode(Codes(ids=ids), noise=NOISE), preview)


@torch.no_grad()
def test_the_denoising_is_the_written_out_loop(tokenizer):
    ids, x, before = some_ids(), NOISE, None
    condition = tokenizer.condition(tokenizer.embed(Codes(ids=ids)))
    times, starts = tokenizer.schedule(6)
    for step in range(6):
        time = torch.full((2,), times[step])
        velocity = tokenizer.flow(x, time, condition[:, starts[step] : starts[step] + 2])
        slope = velocity if before is None else 1.5 * velocity - 0.5 * before
        x, before = x + (times[step + 1] - times[step]) * slope, velocity
    found = tokenizer.decode(Codes(ids=ids), noise=NOISE, num_inference_steps=6)
    torch.testing.assert_close(found, x / tokenizer.config.data_std, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sizes_noise_and_ids_that_do_not_fit_are_refused(tokenizer):
    codes = Codes(ids=some_ids())
    assert tokenizer.decode(codes, height=12, width=8).shape == (2, 3, 12, 8)
    for options, words in (
        ({"height": 4}, "at least 8"),
        ({"width": 10}, "multiple of 4"),
        ({"noise": NOISE[:1]}, "`noise`"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"preview_steps": 5}, "`preview_steps`"),
        ({"solver": "heun"}, "adams_bashforth"),
    ):
        with pytest.raises(ValueError, match=words):
            tokenizer.decode(codes, **options)
    with pytest.raises(ValueError, match="first 2 of 8 ids"):
        tokenizer.decode(Codes(ids=some_ids()[:, :1]))
    with pytest.raises(ValueError, match="at most 8 ids"):
        tokenizer.decode(Codes(ids=torch.zeros(1, 9, dtype=torch.int64)))
    decoding = tokenizer.start_decoding(2, noise=NOISE)
    with pytest.raises(ValueError, match="no preview"):
        decoding.preview()
    with pytest.raises(ValueError, match="needs 2 tokens"):
        decoding.step(some_ids()[:, :1])


@pytest.mark.parametrize(
    "options,words",
    [
        ({"encoder_dim": 48}, "encoder_dim"),
        ({"window": 9}, "window"),
        ({"image_size": 10}, "image_size"),
        ({"data_std": 0.0}, "data_std"),
    ],
)
def test_impossible_tokenizers_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DARTokenizer(**{**TOKENIZER, **options})


# ---------------------------------------------------------------------- the pipeline


def test_previews_arrive_with_the_tokens_and_change_nothing(pipe):
    seen, tokens = [], []
    plain = pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(0), output_type="pt").images
    output = pipe(
        class_labels=[1, 2],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        output_previews=True,
        output_codes=True,
        callback_on_preview=lambda pipe, count, images: seen.append((count, len(tokens))),
        callback_on_step_end=lambda pipe, step, time, tensors: tokens.append(step) or {},
    )
    assert torch.equal(output.images, plain) and output.codes.grid is None
    assert seen == [(2, 2), (4, 4), (6, 6)] and len(output.previews) == 3
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe.tokenizer.decode(output.codes, noise=noise, preview_steps=2)
    torch.testing.assert_close(output.previews[1], pipe.pixels_to_images(expected, "pt"), atol=1e-5, rtol=0)
    images, codes, previews = pipe(class_labels=1, output_codes=True, output_previews=True, return_dict=False)
    assert isinstance(images[0], Image.Image) and codes.ids.shape == (1, 8) and len(previews) == 3


def test_an_image_with_its_own_generator_does_not_depend_on_the_batch(pipe):
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    together = pipe(class_labels=[1, 2, 3], generator=generators, output_type="pt", output_codes=True)
    for i in range(3):
        alone = pipe(
            class_labels=i + 1, generator=torch.Generator().manual_seed(i), output_type="pt", output_codes=True
        )
        assert torch.equal(alone.codes.ids[0], together.codes.ids[i])
        torch.testing.assert_close(alone.images[0], together.images[i], atol=1e-4, rtol=0)


def test_images_share_a_layout(pipe):
    ids = pipe(
        class_labels=[1, 2, 3], shared_prefix=3, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).images
    assert (ids[:, :3] == ids[:1, :3]).all() and not (ids[:, 3:] == ids[:1, 3:]).all()
    # with the ids of a reference, each continues as it would after them
    given = torch.full((1, 8), -1)
    given[:, :3] = ids[:1, :3]
    greedy = {"do_sample": False, "output_type": "latent"}
    together = pipe(class_labels=[1, 2], latents=given, **greedy).images
    for i in range(2):
        assert torch.equal(pipe(class_labels=i + 1, latents=given, **greedy).images[0], together[i])
    assert (together[:, :3] == given[:, :3]).all()


def test_previews_arrive_with_accelerated_tokens_too():
    pipe = tiny_dar_pipeline()
    options = {
        "class_labels": [1, 2],
        "do_sample": False,
        "pixel_noise": NOISE,
        "output_type": "pt",
        "output_previews": True,
    }
    plain = pipe(**options)
    pipe.enable_acceleration(armm.JacobiSpeculative(4))
    fast = pipe(**options)
    torch.testing.assert_close(fast.images, plain.images, atol=1e-5, rtol=0)
    assert len(fast.previews) == 3
    for ours, expected in zip(fast.previews, plain.previews, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="disable_acceleration"):
        pipe(**options, shared_prefix=2)


def test_the_class_token_has_a_place_in_the_line(pipe):
    model = pipe.transformer
    table = model.image_positions().rotary
    angles = torch.arange(9.0)[:, None] * 10000.0 ** (-torch.arange(8.0) / 8)
    torch.testing.assert_close(torch.view_as_real(table.squeeze(-2)), torch.stack([angles.cos(), angles.sin()], dim=-1))
    with torch.no_grad():
        ids, condition = some_ids(), model.condition(labels=torch.tensor([3, 4]))
        whole = model(ids, condition)
        cached = NextTokenDecoding()(
            model, condition, known_ids=ids, known_mask=torch.ones(2, 8, dtype=torch.bool), record_logits=True
        ).logits
    torch.testing.assert_close(cached, whole[:, :-1], atol=1e-4, rtol=1e-4)


def test_guidance_grows_along_a_line(pipe):
    guidance = pipe.guidance({"guidance_scale": 8.0, "guidance_start": 1.2, "guidance_interval": -1})
    assert [guidance.scale_at(step, 18) for step in (0, 17)] == pytest.approx([1.2, 8.0])
    assert guidance.scale_at(5, 18) == pytest.approx(1.2 + 6.8 * 5 / 17)
    assert pipe.guidance({"guidance_scale": 8.0, "guidance_start": 1.0, "guidance_interval": -1}).start == 1.001
    falling = Guidance(0.5, schedule="linear", start=3.0)
    assert falling.active and falling.scale_at(9, 10) == 1.0
    greedy = {"class_labels": [1, 2], "do_sample": False, "output_type": "latent"}
    constant = pipe(guidance_scale=3.0, guidance_start=3.0, **greedy).images
    assert torch.equal(constant, pipe(guidance_scale=3.0, **greedy).images)


def test_an_interrupted_call_shows_what_there_is(pipe):
    def stop(pipe, step, time, tensors):
        pipe._interrupt = step == 4
        return {}

    options = {"class_labels": 1, "output_type": "pt", "callback_on_step_end": stop}
    output = pipe(**options, output_codes=True, pixel_noise=NOISE[:1])
    expected = pipe.tokenizer.decode(output.codes, noise=NOISE[:1], preview_steps=2)
    torch.testing.assert_close(output.images, pipe.pixels_to_images(expected, "pt"), atol=1e-5, rtol=0)


def test_a_saved_pipeline_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "dar")
    loaded = armm.pipeline(tmp_path / "dar")
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded, DARPipeline) and loaded.generation_config["guidance_scale"] == 2.0
    images = [
        p(class_labels=4, generator=torch.Generator().manual_seed(3), output_type="np").images for p in (pipe, loaded)
    ]
    assert np.array_equal(*images)


@pytest.mark.parametrize(
    "options,words",
    [
        ({"class_labels": 10}, "class_labels"),
        ({"class_labels": 1, "shared_prefix": 9}, "shared_prefix"),
        ({"class_labels": 1, "height": 10}, "height"),
        ({"class_labels": 1, "width": 4}, "width"),
        ({"class_labels": 1, "guidance_start": -1.0}, "guidance_start"),
        ({"class_labels": 1, "num_inference_steps": 0}, "num_inference_steps"),
        ({"class_labels": 1, "pixel_noise": torch.zeros(2, 3, 8, 8)}, "pixel_noise"),
        ({"class_labels": 1, "output_type": "latent", "output_previews": True}, "previews"),
        ({"class_labels": 1, "latents": torch.full((1, 8), 24)}, "latents"),
    ],
)
def test_calls_that_cannot_be_answered_are_refused(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        pipe(**options)


def test_components_must_belong_together(pipe):
    other = AutoregressiveModel(
        vocab_size=24, transformer={"dim": 32, "num_layers": 1, "num_heads": 2, "rotary_axes": [16]},
        condition={"type": "class", "num_classes": 3}, grid=(1, 6), rotary_condition=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="6 tokens"):
        DARPipeline(pipe.tokenizer, other, NextTokenDecoding())
    with pytest.raises(ValueError, match="rotary_condition"):
        AutoregressiveModel(
            transformer={"dim": 32, "num_layers": 1, "num_heads": 2, "rotary_axes": [8, 8]},
            condition={"type": "class", "num_classes": 3}, rotary_condition=True,
        )  # fmt: skip


def test_the_command_line_animates_the_previews(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "dar")
    command = [
        "generate",
        "--model",
        str(tmp_path / "dar"),
        "--class-labels",
        "1",
        "2",
        "-o",
        str(tmp_path / "out.png"),
        "--quiet",
    ]
    assert (
        main([*command, "--grid", "--animate", str(tmp_path / "steps.gif"), "--animate-size", "16", "--device", "cpu"])
        == 0
    )
    with Image.open(tmp_path / "steps.gif") as gif:
        assert gif.n_frames == 4


# ---------------------------------------------------------------------- the authors' files


def authors_tokenizer(model: DARTokenizer) -> dict[str, torch.Tensor]:
    """The tensors of `model` as their authors store them, with what is left out."""
    state = {}
    for name, value in model.state_dict().items():
        source = next(found for rule in dar.TOKENIZER_RULES if (found := rule.source_of(name)))
        if source in ("query_embedding.weight", "decoder_embedding.weight"):
            value = torch.cat([value, torch.randn(5, value.shape[1])])
        if source.startswith("quant_") or (source.endswith((".conv_in.weight", ".conv_out.weight"))):
            value = value[:, :, None, None]
        state[source] = value
    state["quantize.codebook_used"] = torch.zeros(9)
    state["diff_decoder.net.repa_out.0.weight"] = torch.zeros(3, 3)
    return state


MODEL = {
    "num_all_queries": 8,
    "num_query_groups": 4,
    "queries_per_step": 2,
    "num_denoising_steps": 4,
    "sampling_resolution": 8,
}


def test_a_file_with_the_options_class_of_the_authors_is_read(tokenizer, tmp_path, monkeypatch):
    module = ModuleType("config_util")

    class Config(MutableMapping):
        def __init__(self, data):
            self._data = data

        def __getitem__(self, key):
            return self._data[key]

        def __setitem__(self, key, value):
            self._data[key] = value

        def __delitem__(self, key):
            del self._data[key]

        def __iter__(self):
            return iter(self._data)

        def __len__(self):
            return len(self._data)

    Config.__module__, Config.__qualname__, module.Config = "config_util", "Config", Config
    state = authors_tokenizer(tokenizer)
    content = {
        "model": {name: torch.zeros_like(value) for name, value in state.items()},
        "ema": state,
        "config": Config({"model": {**MODEL, "diff_decoder": {"data_std": 0.6, "time_shift": 2, "mlp_head": False}}}),
        "args": argparse.Namespace(lr=1e-4),
        "steps": 3,
    }
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "config_util", module)
        torch.save(content, tmp_path / "tokenizer.pt")
    loaded = convert("dar", tmp_path / "tokenizer.pt")
    assert all(torch.equal(value, tokenizer.state_dict()[name]) for name, value in loaded.state_dict().items())
    ids = some_ids()
    assert torch.equal(*(model.decode(Codes(ids=ids), noise=NOISE) for model in (loaded, tokenizer)))


def test_files_that_do_not_fit_are_refused(tokenizer, tmp_path):
    state = authors_tokenizer(tokenizer)
    for config, words in (
        ({**MODEL, "encoder_dim": 128}, "encoder_dim"),
        ({**MODEL, "num_all_queries": 99}, "num_tokens"),
        ({**MODEL, "diff_decoder": {"mlp_head": True}}, "mlp_head"),
        ({**MODEL, "color": 1}, "color"),
    ):
        with pytest.raises(ValueError, match=words):
            dar.convert_state_dict(state, config=config)
    with pytest.raises(CheckpointKeysError, match=r"decoder_layers\.0\.gate1"):
        dar.convert_state_dict({k: v for k, v in state.items() if k != "decoder_layers.0.gate1"}, config=MODEL)
    with pytest.raises(CheckpointKeysError, match="surprise"):
        dar.convert_state_dict({**state, "surprise": torch.zeros(1)}, config=MODEL)
    with pytest.raises(CheckpointShapeError):
        dar.convert_state_dict({**state, "diff_decoder.net.conv_in.weight": torch.zeros(64, 10, 1, 1)}, config=MODEL)
    with pytest.raises(CheckpointKeysError, match="no D-AR checkpoint"):
        dar.convert_state_dict({"a": torch.zeros(1)})

    class Trap:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"ema": state, "config": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UnsafeCheckpointError):
        convert("dar", tmp_path / "trap.pt")


def test_a_pipeline_is_made_of_two_files(pipe, tmp_path):
    rules = {"to_q": None, "to_k": None, "to_v": None}
    state = {}
    for name, value in pipe.transformer.state_dict().items():
        if name.split(".")[-2] in rules:
            continue
        source = next(
            found
            for rule in llamagen.TRANSFORMER_RULES
            if not isinstance(rule.target, tuple) and (found := rule.source_of(name))
        )
        state[source] = value
    for layer in range(2):
        block = pipe.transformer.trunk.blocks[layer].attention
        parts = [getattr(block, part).weight for part in rules]
        state[f"layers.{layer}.attention.wqkv.weight"] = torch.cat(parts)
    torch.save({"model": {f"_orig_mod.{name}": value.detach() for name, value in state.items()}}, tmp_path / "model.pt")
    torch.save({"ema": authors_tokenizer(pipe.tokenizer), "config": {"model": MODEL}}, tmp_path / "tokenizer.pt")
    made = DARPipeline.from_single_file(
        tmp_path / "model.pt", tokenizer=tmp_path / "tokenizer.pt", config={"n_head": 2, "block_size": 8}
    )
    made.set_progress_bar_config(disable=True)
    assert made.generation_config["guidance_scale"] == 4.0
    options = {"class_labels": [1, 2], "do_sample": False, "guidance_scale": 2.0, "output_type": "latent"}
    assert torch.equal(made(**options).images, pipe(**options).images)
    with pytest.raises(ValueError, match="tokenizer"):
        DARPipeline.from_single_file(tmp_path / "tokenizer.pt", tokenizer=pipe.tokenizer)
    with pytest.raises(ValueError, match="block_size"):
        convert("dar", tmp_path / "model.pt", config={"n_head": 2, "grid": [2, 4]})


def test_published_models_are_in_the_zoo():
    entries = {entry.name: entry for entry in armm.zoo.ZOO.values() if entry.family == "dar"}
    assert {(e.repo, e.file) for e in entries.values()} == {
        ("showlab/D-AR", name) for name in ("D-AR-tokenizer_v1.pt", "D-AR-L-360K.pt", "D-AR-XL-360K.pt")
    }
    assert {e.tokenizer for e in entries.values()} == {None, "dar-tokenizer"}


def test_published_sizes_without_options():
    """Shapes of the published tokenizer, on the meta device: nothing but the file is needed."""
    with torch.device("meta"):
        model = DARTokenizer()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(300.1, abs=1.6)
    assert not isinstance(model, VQTokenizer)
