"""The pipelines of xAR and FlowAR: calls, settings, files, directories, errors."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
import torch
from tiny_next_x import (
    authors_state,
    tiny_flowar,
    tiny_flowar_pipeline,
    tiny_model,
    tiny_tokenizer,
    tiny_xar_pipeline,
)
from tiny_var import tiny_tokenizer as tiny_discrete_tokenizer

import armm
from armm.convert import CheckpointKeysError, CheckpointShapeError, convert, flowar, xar
from armm.decoding import NextScaleFlowDecoding, NextXDecoding
from pipelines.flow import FlowPipeline
from pipelines.preview import NEUTRAL, appearing, progress

PIPELINES = {"xar": tiny_xar_pipeline, "flowar": tiny_flowar_pipeline}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=sorted(PIPELINES))
def pipe(request) -> FlowPipeline:
    return PIPELINES[request.param]()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe: FlowPipeline, labels: list[int], *seeds: int, **options) -> torch.Tensor:
    return pipe(labels, generator=generators(*seeds), output_type="latent", **options).images


def test_an_image_does_not_depend_on_its_batch(pipe):
    both = pipe([3, 7], generator=generators(1, 2), output_type="pt").images
    assert both.shape == (2, 3, 8, 8) == (2, 3, *pipe.image_size)
    assert torch.allclose(pipe(7, generator=generators(2), output_type="pt").images[0], both[1], atol=1e-4)
    twice = latents_of(pipe, [7], 2, 3, num_images_per_prompt=2)
    assert torch.allclose(twice[0], latents_of(pipe, [7], 2)[0], atol=1e-4) and not torch.equal(twice[0], twice[1])


def test_pipelines_are_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    again = type(pipe).from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    assert again.generation_config == pipe.generation_config
    assert (type(again.decoding), again.decoding.solver) == (type(pipe.decoding), pipe.decoding.solver)
    assert torch.allclose(latents_of(again, [4], 5), latents_of(pipe, [4], 5), atol=1e-5)
    assert type(armm.pipeline(tmp_path / "pipe")) is type(pipe)


def test_outputs_settings_and_callbacks(pipe):
    assert pipe(1, generator=generators(0)).images[0].size == (8, 8)
    images, codes = pipe(1, generator=generators(0), return_dict=False, output_type="np", output_codes=True)
    assert images.shape == (1, 8, 8, 3) and codes.grid == (1, 4, 4) and codes.latents.shape == (1, 16, 4)
    plain = latents_of(pipe, [1], 0)
    assert torch.allclose(plain, codes.latents) and not torch.equal(plain, latents_of(pipe, [2], 0))
    assert not torch.allclose(plain, latents_of(pipe, [1], 0, guidance_scale=1.0), atol=1e-3)
    assert not torch.allclose(plain, latents_of(pipe, [1], 0, guidance_high=0.5), atol=1e-3)
    assert not torch.allclose(plain, latents_of(pipe, [1], 0, num_flow_steps=6), atol=1e-3)
    assert not torch.allclose(plain, latents_of(pipe, [1], 0, guidance_schedule="constant"), atol=1e-3)
    free = [latents_of(pipe, [1], 0, **off) for off in ({"guidance_high": 0.0}, {"guidance_scale": 1.0})]
    assert torch.allclose(*free, atol=1e-4)
    seen: list[int] = []

    def callback(pipe, step, timestep, tensors):
        assert tensors["latents"].shape == (1, 16, 4)
        seen.append(step)
        pipe._interrupt = step == 1
        return {}

    pipe(1, callback_on_step_end=callback)
    assert seen == [0, 1] and pipe.num_timesteps == pipe.num_entities


def test_step_annealing(pipe):
    calls: list[int] = []
    module = pipe.transformer if isinstance(pipe.decoding, NextXDecoding) else pipe.transformer.head
    name = "velocity" if isinstance(pipe.decoding, NextXDecoding) else "forward"
    inner = getattr(module, name)
    setattr(module, name, lambda *arguments, **options: calls.append(1) or inner(*arguments, **options))
    try:
        acceleration = armm.StepAnnealing(6, 4, settings={"guidance_scale": 1.2})
        pipe.enable_acceleration(acceleration)
        annealed = latents_of(pipe, [1], 0)
        assert sum(calls) == sum(pipe.decoding.solver.num_calls(n) for n in acceleration.table(pipe.num_entities))
        assert pipe.guidance_scale == 1.2
        calls.clear()
        given = latents_of(pipe, [1], 0, num_flow_steps=4)
        assert sum(calls) == 4 * pipe.num_entities and not torch.allclose(given, annealed, atol=1e-3)
        pipe.enable_acceleration(armm.StepAnnealing(6, 1))
        with pytest.raises(ValueError, match="num_flow_steps. must be at least"):
            pipe(1)
        with pytest.raises(ValueError, match="it supports StepAnnealing"):
            pipe.enable_acceleration("annealing")
    finally:
        delattr(module, name)
        pipe.disable_acceleration()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"class_labels": 3.5}, TypeError, "class numbers or names"),
        ({"class_labels": 10}, ValueError, "between 0 and 9"),
        ({"class_labels": 1, "guidance_scale": -1.0}, ValueError, "guidance_scale"),
        ({"class_labels": 1, "guidance_high": 1.5}, ValueError, "guidance_high"),
        ({"class_labels": 1, "guidance_schedule": "linaer"}, ValueError, "did you mean 'linear'"),
        ({"class_labels": 1, "num_flow_steps": 1}, ValueError, "num_flow_steps. must be at least"),
        ({"class_labels": 1, "num_flow_steps": 4.5}, TypeError, "num_flow_steps"),
        ({"class_labels": 1, "output_type": "jpg"}, ValueError, "output_type"),
        ({"class_labels": [1, 2], "generator": "one"}, TypeError, "generator"),
        ({"class_labels": 1, "noise": []}, TypeError, "noise must be"),
        ({"class_labels": 1, "noise": [torch.zeros(1, 3, 4)]}, ValueError, "recorded noise must be"),
        (
            {"class_labels": 1, "callback_on_step_end_tensor_inputs": ["ids"]},
            ValueError,
            "callback_on_step_end_tensor_inputs",
        ),
    ],
)
def test_clear_errors_of_a_call(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(**arguments)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_half_precision_and_backends(name):
    pipe = PIPELINES[name]()
    expected = latents_of(pipe, [1], 0)
    pipe.transformer.set_attention_backend("reference")
    assert torch.allclose(latents_of(pipe, [1], 0), expected, atol=1e-3)
    pipe.to(torch.bfloat16)
    images = pipe(1, generator=generators(0), output_type="pt").images
    assert images.dtype == torch.bfloat16 and images.isfinite().all()


@pytest.mark.parametrize(("name", "model"), [("xar", "xar-large-256"), ("flowar", "flowar-huge-256")])
def test_presets_of_the_authors(name, model):
    pipe = PIPELINES[name]()
    pipe.enable_acceleration(armm.StepAnnealing.preset(model))
    pipe(1)
    assert pipe.guidance_scale == armm.zoo.get(model).generation_config["guidance_scale"]
    assert pipe.acceleration.table(pipe.num_entities)[0] == 50 and pipe.acceleration.table(pipe.num_entities)[-1] == 15


def test_two_steps_are_too_few_for_xar_only():
    with pytest.raises(ValueError, match="at least 3"):
        tiny_xar_pipeline()(1, num_flow_steps=2)
    assert len(tiny_flowar_pipeline()(1, num_flow_steps=2).images) == 1


def test_components_that_do_not_belong_together():
    for make, model, decoding in (
        (armm.XARPipeline, tiny_model(), NextXDecoding("cell", 2)),
        (armm.FlowARPipeline, tiny_flowar(), NextScaleFlowDecoding()),
    ):
        with pytest.raises(ValueError, match="latents of 6 channels, the transformer makes 4"):
            make(tiny_tokenizer(6), model, decoding)
        with pytest.raises(ValueError, match="whose codes are discrete"):
            make(tiny_discrete_tokenizer(), model, decoding)
    with pytest.raises(ValueError, match="cells of 8x8"):
        tiny_xar_pipeline("cell", 8)(1)


# ---------------------------------------------------------------------- files


FILES = {
    "xar": (lambda: tiny_model(), lambda: xar.rules(1, 1), 2, armm.XARPipeline),
    "flowar-attn": (lambda: tiny_flowar(), lambda: flowar.rules(1, 1), 0, armm.FlowARPipeline),
    "flowar-cross": (lambda: tiny_flowar(True), lambda: flowar.rules(1, 1), 0, armm.FlowARPipeline),
}


def save(state: dict[str, torch.Tensor], path: Path, container: str = "") -> Path:
    torch.save({container: state} if container else state, path)
    return path


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_the_authors(name, tmp_path):
    make, rules, cell, pipeline_class = FILES[name]
    model, family = make(), name.partition("-")[0]
    state = authors_state(model, rules(), cell)
    pipe = pipeline_class.from_single_file(
        save(state, tmp_path / "model.pth"), tokenizer=tiny_tokenizer(), generation_config={"num_flow_steps": 4}
    )
    pipe.set_progress_bar_config(disable=True)
    found = pipe.transformer.state_dict()
    assert set(found) == set(model.state_dict())
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert pipe(1).images[0].size == (8, 8)
    trainers = convert(family, save(state, tmp_path / "ema.pth", "model_ema"), use_ema=True)
    assert all(torch.equal(trainers.state_dict()[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="kl16.ckpt"):
        pipeline_class.from_single_file(tmp_path / "model.pth")


@pytest.mark.parametrize("name", sorted(FILES))
def test_clear_errors_of_files(name, tmp_path):
    make, rules, cell, _ = FILES[name]
    family = name.partition("-")[0]
    state = authors_state(make(), rules(), cell)

    def read(config: dict | None = None, without: str = "", **extra: torch.Tensor):
        kept = {key: value for key, value in state.items() if not key.endswith(without or "nothing")}
        return convert(family, save({**kept, **extra}, tmp_path / "model.pth"), config=config)

    with pytest.raises(CheckpointKeysError, match="encoder_norm.weight"):
        read(without="encoder_norm.weight")
    with pytest.raises(CheckpointKeysError, match="unknown tensors .* more.weight"):
        read(**{"more.weight": torch.zeros(1)})
    with pytest.raises(CheckpointShapeError, match="z_proj_ln.weight"):
        read(**{"z_proj_ln.weight": torch.zeros(3)})
    with pytest.raises(CheckpointShapeError, match="num_heads = 4"):
        read({"encoder_num_heads": 4})
    with pytest.raises(ValueError, match="unknown .config. options depths"):
        read({"depths": 4})
    with pytest.raises(CheckpointKeysError, match="this is no"):
        read(without="pos_embed_learned" if family == "flowar" else "pred.weight")
    # without the buffers the file does not say everything
    with pytest.raises(ValueError, match="num_heads"):
        read(without="rope.freqs")
    model = read({"encoder_num_heads": 2, **({"head_heads": 3} if family == "flowar" else {})}, without="rope.freqs")
    assert model.trunk.config.num_heads == 2
    if family == "flowar":
        assert read(without="mask").scales == (1, 2, 4)
    else:
        with pytest.raises(CheckpointShapeError, match="cell_size"):
            read({"cell_size": 4})
        assert read({"cell_size": 2}, without="mask").grid == (4, 4)


@pytest.mark.parametrize(("entity", "known"), [("cell", [0, 4, 8, 12, 16]), ("scale", [0, 16, 16, 16])])
def test_pictures_of_continuous_tokens_appear_entity_by_entity(entity, known):
    pipe = tiny_xar_pipeline(entity)
    pipe.register_modules(transformer=tiny_model(positions=pipe.decoding.plan(pipe.grid).num_tokens))
    groups = pipe.decoding.groups(pipe.grid)
    assert sorted(torch.cat(groups).tolist()) == list(range(16)) and len(groups) == len(known) - 1
    seen = []

    def watch(pipe, step, timestep, tensors):
        latents, cells = progress(tensors["latents"], 16)
        assert latents is tensors["latents"]
        seen.append(int(cells.sum()))
        return {}

    output = pipe(3, num_flow_steps=3, output_codes=True, callback_on_step_end=watch)
    assert seen == known[1:]
    frames = list(appearing(pipe, output.codes, 64))
    neutral = [
        sum(frame.getpixel((16 * (i % 4) + 8, 16 * (i // 4) + 8)) == NEUTRAL for i in range(16)) for [frame] in frames
    ]
    assert neutral == [16 - count for count in known]
    assert frames[-1][0].tobytes() == output.images[0].resize((64, 64), PIL.Image.Resampling.BICUBIC).tobytes()
