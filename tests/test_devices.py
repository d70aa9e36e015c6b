"""Every pipeline on a (pretended) GPU: nothing mixes devices, and the results are those of the CPU. Every model in other dtypes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import test_elm_pipeline as elm
import test_parallel_pipelines as parallel
import tiny_chameleon
import tiny_dar
import tiny_janus
import tiny_llamagen
import tiny_mar
import tiny_ming
import tiny_next_x
import tiny_semantic
import tiny_unified
import tiny_var
import torch
from pretend_device import CUDA, PretendGenerator, PretendTensor, pretend_cuda

import armm
from pipelines.chameleon import ChameleonPipeline
from pipelines.lumina_mgpt import LuminaMGPTPipeline
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline
from pipelines.unified_inpaint import UnifiedInpaintPipeline

PICTURE = PIL.Image.fromarray((np.arange(32 * 32 * 3) * 7 % 256).astype(np.uint8).reshape(32, 32, 3))
MASK = PIL.Image.fromarray((np.arange(32) // 16 * np.full((32, 1), 255)).astype(np.uint8))


def generators(count: int) -> list[torch.Generator]:
    device = "cpu" if torch.Generator is not PretendGenerator else "cuda"
    return [torch.Generator(device).manual_seed(seed) for seed in range(count)]


def classes(pipe: Any, **options: Any) -> Any:
    return pipe([1, 2], generator=generators(2), output_type="pt", **options)


def text(pipe: Any, **options: Any) -> Any:
    return pipe(["a red", "a"], generator=generators(2), output_type="pt", **options)


def chameleon(cls: type, block: Any, **settings: Any) -> Any:
    return tiny_chameleon.pipeline(cls, block, max_new_tokens=12, **settings)


def unified(cls: type) -> Any:
    pipe = tiny_unified.unified_pipeline()
    config = {key: pipe.config[key] for key in ("vocabulary",)}
    made = cls(pipe.tokenizer, pipe.transformer, pipe.decoding, **config)
    made.set_progress_bar_config(disable=True)
    return made


def accelerated(pipe: Any, acceleration: Any) -> Any:
    pipe.enable_acceleration(acceleration)
    return pipe


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "llamagen": (tiny_llamagen.class_pipeline, classes),
    "llamagen text": (lambda: tiny_llamagen.text_pipeline(**tiny_llamagen.text_encoder()), text),
    "nar": (parallel.nar, classes),
    "par": (parallel.par, classes),
    "nar video": (parallel.nar_video, classes),
    "dar": (tiny_dar.tiny_dar_pipeline, classes),
    **{
        f"elm {codes} {masked}": (lambda codes=codes, masked=masked: elm.tiny_pipeline(codes, masked), classes)
        for codes in (1, 2)
        for masked in (False, True)
    },
    "var": (tiny_var.tiny_pipeline, classes),
    "var smooth": (tiny_var.tiny_pipeline, lambda pipe: classes(pipe, more_smooth=True)),
    "mar": (tiny_mar.tiny_mar_pipeline, classes),
    "mar annealed": (lambda: accelerated(tiny_mar.tiny_mar_pipeline(), armm.StepAnnealing(10, 3)), classes),
    "himar": (tiny_mar.tiny_himar_pipeline, classes),
    "xar": (tiny_next_x.tiny_xar_pipeline, classes),
    "xar scale": (lambda: tiny_next_x.tiny_xar_pipeline("subsample", 2), classes),
    "flowar": (tiny_next_x.tiny_flowar_pipeline, classes),
    "unified": (tiny_unified.unified_pipeline, text),
    "unified reading": (
        lambda: unified(UnifiedImageToTextPipeline),
        lambda pipe: pipe([PICTURE] * 2, ["what color is the cube?"] * 2),
    ),
    "inpainting": (
        lambda: unified(UnifiedInpaintPipeline),
        lambda pipe: pipe(["a red cube", "a"], [PICTURE] * 2, [MASK] * 2, generator=generators(2), output_type="pt"),
    ),
    "janus": (tiny_janus.janus_pipeline, text),
    "janus reading": (tiny_janus.janus_pipeline, lambda pipe: pipe.chat([PICTURE] * 2, ["a", "b c"])),
    "ming": (tiny_ming.ming_pipeline, text),
    "ming edit": (
        tiny_ming.ming_pipeline,
        lambda pipe: pipe(["a", "b"], [PICTURE] * 2, generator=generators(2), output_type="latent"),
    ),
    "ming reading": (tiny_ming.ming_pipeline, lambda pipe: pipe.chat([PICTURE] * 2, ["a", "b c"])),
    "chameleon": (lambda: chameleon(ChameleonPipeline, tiny_chameleon.fixed_block()), text),
    "lumina": (lambda: chameleon(LuminaMGPTPipeline, tiny_chameleon.sized_block(), image_size=8), text),
    "lumina reading": (
        lambda: chameleon(LuminaMGPTPipeline, tiny_chameleon.sized_block(), image_size=8),
        lambda pipe: pipe.describe(
            [PICTURE] * 2, ["what is this", "describe"], max_new_tokens=6, generator=generators(2), cautious=True
        ),
    ),
    "lumina jacobi": (
        lambda: accelerated(
            chameleon(LuminaMGPTPipeline, tiny_chameleon.sized_block(), image_size=8), armm.JacobiSpeculative(window=4)
        ),
        text,
    ),
    "seed": (
        tiny_semantic.seed_pipeline,
        lambda pipe: pipe("a red bus", generator=generators(1), output_type="latent"),
    ),
    "seed reading": (tiny_semantic.seed_pipeline, lambda pipe: pipe.describe(PICTURE, "what", generator=generators(1))),
    "lavit": (
        tiny_semantic.lavit_pipeline,
        lambda pipe: pipe("a red bus", generator=generators(1), output_type="latent"),
    ),
    "lavit reading": (
        tiny_semantic.lavit_pipeline,
        lambda pipe: pipe.describe(PICTURE, "what", generator=generators(1)),
    ),
}


def result(output: Any) -> Any:
    for name in ("images", "frames", "texts"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(output)


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_what_the_cpu_gives(name):
    make, call = CASES[name]
    pipe = make()
    expected = result(call(pipe))
    with pretend_cuda() as syncs:
        pipe.to("cuda")
        syncs.clear()
        found = result(call(pipe))
    check(found, expected)
    # Before and after the loop, not in it. Experts wait where their weights are not merged, speculation to know what was accepted.
    if name in DRAWING and name not in ("ming", "lumina jacobi"):
        assert syncs.total() <= 16, syncs


def check(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, PretendTensor) and found.device == CUDA
        torch.testing.assert_close(found.elem, expected, atol=1e-4, rtol=1e-4)
    else:
        assert found == expected


def shows_previews(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The call with a callback that lets the tokenizer work after every step."""

    def callback(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        hook = getattr(pipe.tokenizer, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(pipe.tokenizer)
        return {}

    return lambda pipe: call(functools.partial(pipe, callback_on_step_end=callback))


DRAWING = [name for name, (_, call) in CASES.items() if call in (classes, text)]


@pytest.mark.parametrize("name", sorted(CASES))
def test_offloaded_models_come_when_they_are_needed(name):
    make, call = CASES[name]
    pipe = make()
    expected = result(call(pipe))
    with pretend_cuda():
        pipe.enable_model_cpu_offload(device="cuda")
        found = result(call(pipe))
        assert not any(isinstance(p, PretendTensor) for p in pipe.transformer.parameters()), "not offloaded again"
    check(found, expected)


@pytest.mark.parametrize("name", DRAWING)
def test_offloaded_models_come_back_after_previews(name):
    make, call = CASES[name]
    pipe = make()
    expected = result(call(pipe))
    with pretend_cuda():
        pipe.enable_model_cpu_offload(device="cuda")
        found = result(shows_previews(call)(pipe))
    check(found, expected)


# "ming" keeps part of its tokenizer in float32, which is seen to when it is loaded.
@pytest.mark.parametrize("name", sorted(CASES.keys() - {"ming"}))
def test_half_precision(name):
    make, call = CASES[name]
    pipe = make().to(torch.bfloat16)
    found = result(call(pipe))
    assert len(found) and (not isinstance(found, torch.Tensor) or bool(found.float().isfinite().all()))


@pytest.mark.parametrize("name", DRAWING)
def test_weights_stored_in_eight_bits(name):
    make, call = CASES[name]
    pipe = make()
    pipe.fuse_projections()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = result(call(pipe))
    assert bool(found.isfinite().all())
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("name", CASES)
def test_models_are_made_without_memory(name):
    transformer = CASES[name][0]().transformer
    with torch.device("meta"):
        # diffusers takes arguments given without their name for defaults
        empty = type(transformer).from_config(
            {k: v for k, v in transformer.config.items() if k != "_use_default_values"}
        )
    assert {name: p.shape for name, p in empty.named_parameters()} == {
        name: p.shape for name, p in transformer.named_parameters()
    }


def test_explanations_of_a_gpu_are_of_pictures():
    """Maps are compared with masks of pictures, which are on the CPU."""
    make = CASES["unified reading"][0]
    expected = make().explain(PICTURE, "what color is the cube?")
    with pretend_cuda():
        pipe = make().to("cuda")
        found = pipe.explain(PICTURE, "what color is the cube?")
        assert not any(isinstance(values, PretendTensor) for values in found.maps)
        assert found.mass_inside(torch.ones(32, 32, dtype=torch.bool))
    assert found.words == expected.words
    torch.testing.assert_close(found.maps, expected.maps, atol=1e-4, rtol=1e-4)


def test_a_beam_searches_on_a_gpu():
    make = CASES["unified reading"][0]
    for search in (armm.BeamSearch(num_beams=3), armm.OPERA(num_beams=2)):
        expected = make().ask(PICTURE, "what color is the cube?", search=search).texts
        with pretend_cuda():
            assert make().to("cuda").ask(PICTURE, "what color is the cube?", search=search).texts == expected


@pytest.mark.parametrize("acceleration", [armm.TokenPruning(after=(1,), keep=(0.5,))], ids=["transitions"])
def test_image_tokens_are_dropped_on_a_gpu(acceleration):
    make = CASES["unified reading"][0]
    expected = accelerated(make(), acceleration).ask(PICTURE, "what color is the cube?").texts
    with pretend_cuda():
        assert accelerated(make().to("cuda"), acceleration).ask(PICTURE, "what color is the cube?").texts == expected


# ---------------------------------------------------------------------- the pretended device itself


def test_devices_are_told_apart():
    with pretend_cuda() as syncs:
        here, there = torch.arange(3), torch.arange(3, device="cuda")
        assert (
            there.device == CUDA and (there + 1).device == CUDA and there.cpu().tolist() == there.tolist() == [0, 1, 2]
        )
        for mixed in (lambda: here + there, lambda: here[there], lambda: torch.cat([there, torch.tensor([1])])):
            with pytest.raises(RuntimeError, match="device|indices"):
                mixed()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, device="cuda", generator=torch.Generator())
        assert torch.rand(2, device="cuda", generator=torch.Generator("cuda")).device == CUDA
        syncs.clear()
        there[0] = 5
        there.view(1, 3)[:, 1:].mul_(2)
        assert not syncs and there.tolist() == [5, 2, 4] and syncs.total() == 1
