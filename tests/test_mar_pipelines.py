"""MAR and Hi-MAR: calls, editing, mixing, annealing, files, directories, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_mar import STEPS, authors_state, tiny_himar, tiny_himar_pipeline, tiny_mar, tiny_mar_pipeline
from tiny_next_x import tiny_tokenizer
from tiny_var import tiny_tokenizer as tiny_discrete_tokenizer

import armm
from armm.convert import CheckpointKeysError, CheckpointShapeError, himar, mar
from armm.decoding import Guidance, MaskedLatentDecoding, PivotLatentDecoding
from armm.decoding.solvers.noise import GaussianNoise
from pipelines.himar import HiMARPipeline
from pipelines.mar import MARPipeline

PIPELINES = {"mar": tiny_mar_pipeline, "himar": tiny_himar_pipeline}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=sorted(PIPELINES))
def pipe(request) -> Any:
    return PIPELINES[request.param]()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def latents_of(pipe: Any, labels: Any, *seeds: int, **options: Any) -> torch.Tensor:
    return pipe(labels, generator=generators(*seeds), output_type="latent", **options).images


# ---------------------------------------------------------------------- what both have


def test_an_image_does_not_depend_on_its_batch(pipe):
    both = pipe([3, 7], generator=generators(1, 2), output_type="pt").images
    assert both.shape == (2, 3, *pipe.image_size) == (2, 3, 8, 8)
    assert torch.allclose(pipe(7, generator=generators(2), output_type="pt").images[0], both[1], atol=1e-4)
    twice = latents_of(pipe, [7], 2, 3, num_images_per_prompt=2)
    assert torch.allclose(twice[0], latents_of(pipe, [7], 2)[0], atol=1e-4) and not torch.equal(twice[0], twice[1])


def test_pipelines_are_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.generation_config == pipe.generation_config
    assert again.decoding.num_calls(()) == pipe.decoding.num_calls(())
    assert torch.allclose(latents_of(again, [4], 5), latents_of(pipe, [4], 5), atol=1e-5)


def test_authors_files_make_the_same_pipeline(pipe, tmp_path):
    raw = {name: value + 1 for name, value in authors_state(pipe.transformer).items()}
    torch.save(
        {"model": raw, "model_ema": authors_state(pipe.transformer), "epoch": 3}, tmp_path / "checkpoint-last.pth"
    )
    config = {"encoder_num_heads": 2, **({"head": 2} if isinstance(pipe, HiMARPipeline) else {})}
    again = type(pipe).from_single_file(
        tmp_path / "checkpoint-last.pth",
        tokenizer=pipe.tokenizer,
        config=config,
        generation_config=pipe.config.generation_config,
    )
    again.set_progress_bar_config(disable=True)
    assert torch.allclose(latents_of(again, [4], 5), latents_of(pipe, [4], 5), atol=1e-5)
    family = armm.convert.mar if isinstance(pipe, MARPipeline) else armm.convert.himar
    first = next(iter(family.convert(tmp_path / "checkpoint-last.pth", config=config, use_ema=False).parameters()))
    ours = next(iter(pipe.transformer.parameters()))
    assert torch.allclose(first, ours + 1)


def test_guidance_temperature_and_seeds_matter(pipe):
    base = latents_of(pipe, 2, 1)
    assert torch.equal(base, latents_of(pipe, 2, 1))
    for change in (
        {"guidance_scale": 1.0},
        {"guidance_schedule": "constant"},
        {"temperature": 0.5},
        {"head_steps": "2,2,0"},
    ):
        assert not torch.allclose(base, latents_of(pipe, 2, 1, **change), atol=1e-4), change
    assert not torch.allclose(base, latents_of(pipe, 3, 1), atol=1e-4)
    assert not torch.allclose(base, latents_of(pipe, 2, 2), atol=1e-4)


def test_callbacks_see_replace_and_stop(pipe):
    steps: list[int] = []

    def watch(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    zeros = latents_of(pipe, 2, 1, callback_on_step_end=watch)
    assert steps == list(range(pipe.num_timesteps)) and not zeros.any()

    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True

    stopped = latents_of(pipe, 2, 1, callback_on_step_end=stop)
    assert (stopped == 0).all(-1).any()


def test_annealing_takes_fewer_steps_of_the_head(pipe):
    base = latents_of(pipe, 2, 1)
    pipe.enable_acceleration(armm.StepAnnealing(5, 2, last_timestep=300))
    annealed = latents_of(pipe, 2, 1)
    assert not torch.allclose(base, annealed, atol=1e-4)
    overridden = (
        {"head_steps": STEPS} if isinstance(pipe, MARPipeline) else {"head_steps": STEPS, "pivot_head_steps": STEPS}
    )
    assert torch.equal(latents_of(pipe, 2, 1, **overridden), base)  # the call's own numbers go before
    pipe.disable_acceleration()
    assert torch.equal(latents_of(pipe, 2, 1), base)
    preset = armm.StepAnnealing.preset("mar-base")
    if isinstance(pipe, MARPipeline):
        pipe.enable_acceleration(preset)
        assert pipe.generation_config["num_inference_steps"] == 64
    with pytest.raises(ValueError, match="it supports StepAnnealing"):
        pipe.enable_acceleration("faster")


def test_components_that_do_not_belong_together(pipe):
    parts = (pipe.transformer, pipe.decoding)
    with pytest.raises(ValueError, match="codes are discrete"):
        type(pipe)(tiny_discrete_tokenizer(), *parts)
    with pytest.raises(ValueError, match="5 channels, the transformer makes 4"):
        type(pipe)(tiny_tokenizer(5), *parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": -1.0}, "`guidance_scale` must be at least 0.0"),
        ({"guidance_schedule": "liner"}, "did you mean 'linear'"),
        ({"temperature": float("nan")}, "`temperature`"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        ({"num_inference_steps": 17}, "num_inference_steps=17 is more than the 16 tokens"),
        ({"head_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"head_steps": "ddim600"}, "no whole stride"),
        ({"orders": torch.zeros(1, 16, dtype=torch.long)}, "orders must be"),
        ({"generator": [torch.Generator()] * 2}, "2 generators"),
        ({"output_type": "jpeg"}, "`output_type`"),
    ],
)
def test_bad_arguments(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(1, **options)


def test_bad_files(pipe):
    family, state = (mar if isinstance(pipe, MARPipeline) else himar), authors_state(pipe.transformer)
    config = {"num_heads": 2, **({"dense_heads": 2} if family is himar else {})}
    with pytest.raises(CheckpointKeysError, match="this is no "):
        family.convert_state_dict({"weight": torch.zeros(1)})
    with pytest.raises(CheckpointKeysError, match="missing decoder_blocks.1.attn.proj.bias"):
        family.convert_state_dict(
            {k: v for k, v in state.items() if k != "decoder_blocks.1.attn.proj.bias"}, config=config
        )
    with pytest.raises(CheckpointKeysError, match="fake_latent"):
        family.convert_state_dict({k: v for k, v in state.items() if k != "fake_latent"}, config=config)
    with pytest.raises(CheckpointShapeError, match="num_classes = 1000"):
        family.convert_state_dict(state, config={**config, "class_num": 1000})
    with pytest.raises(ValueError, match="how many attention heads"):
        family.convert_state_dict(state)
    with pytest.raises(ValueError, match="pass MAR"):
        family.load_single_file("checkpoint-last.pth")


# ---------------------------------------------------------------------- MAR


@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_patches_and_grids(patch_size, grid):
    pipe = tiny_mar_pipeline(patch_size, grid, num_inference_steps=3)
    latents = torch.randn(2, grid[0] * grid[1], 4, generator=torch.Generator().manual_seed(0))
    tokens = pipe.transformer.patchify(latents)
    assert tokens.shape == (2, grid[0] * grid[1] // patch_size**2, 4 * patch_size**2)
    assert torch.equal(pipe.transformer.unpatchify(tokens), latents)
    assert pipe(1, generator=generators(0), output_type="np").images.shape == (1, 2 * grid[0], 2 * grid[1], 3)
    with pytest.raises(ValueError, match="multiples of patch_size=3"):
        tiny_mar(grid, 3)


def test_what_is_masked_cannot_be_seen():
    model = tiny_mar()
    tokens = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[1, 4, 9]])
    hidden = model(tokens, kept, model.condition(torch.tensor([3])))
    changed = tokens.clone()
    changed[:, [0, 2, 15]] += 1
    assert torch.equal(model(changed, kept, model.condition(torch.tensor([3]))), hidden)
    changed[:, 4] += 1
    assert not torch.allclose(model(changed, kept, model.condition(torch.tensor([3]))), hidden, atol=1e-3)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_editing_keeps_what_is_not_masked(patch_size):
    pipe = tiny_mar_pipeline(patch_size)
    image = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    mask = np.zeros((8, 8), dtype=bool)
    mask[:, 4:] = True
    codes = pipe.tokenizer.encode(torch.from_numpy(image).permute(2, 0, 1)[None] * 2 - 1)
    edited = latents_of(pipe, 3, 1, image=image, mask_image=mask).unflatten(1, (4, 4))
    rounded = torch.from_numpy((image * 255).round()).permute(2, 0, 1)[None] / 127.5 - 1
    original = pipe.tokenizer.encode(rounded).latents.unflatten(1, (4, 4))
    assert torch.allclose(edited[:, :, :2], original[:, :, :2], atol=1e-5)
    assert not torch.isclose(edited[:, :, 2:], original[:, :, 2:], atol=1e-3).all(-1).any()
    # the same from latents; without a class; several at once; a number of steps that is too large
    known = pipe.tokenizer.encode(rounded).latents
    assert torch.allclose(
        latents_of(pipe, 3, 1, latents=known, mask_image=mask).unflatten(1, (4, 4)), edited, atol=1e-4
    )
    several = latents_of(pipe, [5, 3], 0, 1, image=[image, image], mask_image=mask).unflatten(1, (4, 4))
    assert torch.allclose(several[1], edited[0], atol=1e-4)
    assert codes.latents.shape == latents_of(pipe, None, 1, image=image, mask_image=mask).shape
    with pytest.raises(ValueError, match="is more than the"):
        pipe(3, image=image, mask_image=mask, num_inference_steps=9)


def test_editing_asks_for_what_it_needs():
    pipe = tiny_mar_pipeline()
    image, mask = torch.rand(3, 8, 8), torch.zeros(8, 8)
    mask[:2] = 1
    other = torch.zeros(8, 8)
    other[:4] = 1
    for arguments, message in (
        ({"image": image}, "editing takes `mask_image`"),
        ({"mask_image": mask}, "one of `image` and `latents`"),
        ({"image": image, "latents": torch.zeros(1, 16, 4), "mask_image": mask}, "one of `image` and `latents`"),
        (
            {"latents": torch.zeros(1, 9, 4), "mask_image": mask},
            r"`latents` must be a tensor \[B, 16, 4\], got \[1, 9, 4\]",
        ),
        ({"image": image, "mask_image": torch.stack([mask, other])}, "same number of positions"),
        ({"image": image, "mask_image": torch.zeros(8, 8)}, "masks nothing"),
        (
            {"image": torch.stack([image] * 3), "mask_image": torch.stack([mask] * 2)},
            "give one for all or one for each",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([1], **arguments)
    with pytest.raises(ValueError, match="give one for all or one for each"):
        pipe([1, 2, 3], image=torch.stack([image] * 2), mask_image=mask)
    with pytest.raises(ValueError, match="give `class_labels`"):
        pipe()


def test_classes_are_mixed_by_weight():
    pipe = tiny_mar_pipeline()
    model = pipe.transformer
    table = model.class_embedding.embedding.weight
    mixed = pipe.condition_of(pipe.class_weights([{2: 3, 5: 1}, -1, 7]))
    assert torch.allclose(mixed.embeds[0, 0], 0.75 * table[2] + 0.25 * table[5], atol=1e-6)
    assert torch.allclose(mixed.embeds[1], model.null_condition(1).embeds[0], atol=1e-6)
    assert torch.allclose(mixed.embeds[2], table[7].expand(3, -1), atol=1e-6)
    between = latents_of(pipe, {2: 1, 5: 1}, 4)
    for label in (2, 5):
        assert not torch.allclose(between, latents_of(pipe, label, 4), atol=1e-3)
        assert torch.allclose(latents_of(pipe, {label: 2}, 4), latents_of(pipe, label, 4), atol=1e-5)
    for bad, message in (
        ({2: -1}, "weight of a class"),
        ({2: 0.0}, "must not all be 0"),
        ({11: 1}, "between 0 and 9"),
        ([], "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(bad)
    with pytest.raises(TypeError, match="`class_labels` must be class numbers"):
        pipe([2.5])
    with pytest.raises(ValueError, match=r"weights must be \[batch, 10\]"):
        model.mixed_condition(torch.ones(1, 4))


def test_one_token_a_step_in_the_given_order():
    model, decoding = tiny_mar(), MaskedLatentDecoding(num_inference_steps=16, head_steps=STEPS)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))[None]
    output = decoding(model, model.condition(torch.tensor([1])), orders=order, noise=generators(0), record=True)
    drawn = [int((a & ~b).nonzero()[0, 1]) for a, b in zip(output.open, output.open[1:], strict=False)]
    assert drawn == order[0].flip(0).tolist()[:-1] and output.num_calls == output.steps == 16
    assert output.head_calls == [4] * 16
    annealed = decoding(
        model, model.condition(torch.tensor([1])), annealing=armm.StepAnnealing(40, 5), noise=generators(0)
    )
    assert annealed.head_calls == [decoding.solver.num_calls(n, 950) for n in armm.StepAnnealing(40, 5).table(16)]


def test_a_last_timestep_limits_the_noise_that_the_head_sees():
    model = tiny_mar()
    condition, seen = model.condition(torch.tensor([1])), []
    model.head.register_forward_hook(lambda module, args, output: seen.append(int(args[1].max())))
    out = MaskedLatentDecoding(2, head_steps=50, last_timestep=700)(model, condition, noise=torch.Generator().manual_seed(0))
    assert max(seen) == 700 and out.head_calls == [len(seen) // 2] * 2 and len(seen) < 100
    seen.clear()
    MaskedLatentDecoding(2, head_steps=50)(model, condition, noise=torch.Generator().manual_seed(0))
    assert max(seen) == 999 and len(seen) == 100


def test_decoding_says_what_is_wrong():
    model, decoding = tiny_mar(), MaskedLatentDecoding(4, head_steps=STEPS)
    condition = model.condition(torch.tensor([1]))
    tokens, mask = torch.zeros(1, 16, 4), torch.zeros(1, 16, dtype=torch.bool)
    for arguments, message in (
        ({"known_tokens": tokens}, "belong together"),
        ({"known_tokens": tokens[:, :3], "known_mask": mask}, "known_tokens must be floating point"),
        ({"known_tokens": tokens, "known_mask": mask.int()}, "known_mask must be bool"),
        ({"known_tokens": tokens, "known_mask": ~mask}, "leaves nothing to draw"),
        ({"noise": torch.zeros(1, 5, 16, 4)}, "needs the recorded orders"),
        ({"noise": torch.zeros(1, 5, 9, 4)}, "recorded noise must be"),
        ({"noise": torch.zeros(1, 2, 16, 4), "orders": torch.arange(16)[None]}, "recorded noise is of 1 steps"),
        ({"guidance": Guidance(2.0)}, "needs a null_condition"),
    ):
        with pytest.raises(ValueError, match=message):
            decoding(model, condition, **arguments)
    with pytest.raises(ValueError, match="mask_schedule must be one of"):
        MaskedLatentDecoding(mask_schedule="cosine")
    with pytest.raises(ValueError, match="last_timestep` must be None or an integer between 0 and 999, got 1000"):
        MaskedLatentDecoding(last_timestep=1000)
    with pytest.raises(ValueError, match="labels must lie in 0 .. 9"):
        model.condition(torch.tensor([11]))
    with pytest.raises(ValueError, match="one width, got 16 and 8"):
        tiny_mar(decoder={"dim": 8, "num_heads": 2, "num_layers": 1})
    with pytest.raises(ValueError, match="encoder must have"):
        tiny_mar(encoder={"dim": 16, "num_heads": 2, "learned_positions": 3})


# ---------------------------------------------------------------------- Hi-MAR


def test_pivots_are_returned_and_seen_by_the_second_phase():
    pipe = tiny_himar_pipeline()
    output = pipe(3, generator=generators(1), output_type="pt", output_pivots=True, output_codes=True)
    assert (
        output.pivots.shape == (1, 3, 4, 4) and output.images.shape == (1, 3, 8, 8) and output.codes.grid == (1, 4, 4)
    )
    images, pivots = pipe(3, generator=generators(1), output_type="pt", output_pivots=True, return_dict=False)
    assert torch.equal(images, output.images) and torch.equal(pivots, output.pivots)
    stronger = pipe(3, generator=generators(1), output_type="pt", output_pivots=True, pivot_guidance_scale=6.0)
    assert not torch.allclose(stronger.pivots, output.pivots, atol=1e-4)
    model = pipe.transformer
    tokens, kept, condition = (
        torch.zeros(1, 16, 4),
        torch.zeros(1, 0, dtype=torch.long),
        model.condition(torch.tensor([1])),
    )
    unknown = model(tokens, kept, condition)
    seen = model(tokens, kept, condition, model.embed_pivots(latents=torch.ones(1, 4, 4)))
    assert unknown.shape == seen.shape == (1, 16, 16) and not torch.allclose(unknown, seen, atol=1e-3)
    with pytest.raises(ValueError, match="either the hidden states"):
        model.embed_pivots()


def test_four_steps_for_each_row_of_pivots_and_every_open_place_is_drawn_at_each():
    model, decoding = tiny_himar(), PivotLatentDecoding(3, head_steps=STEPS, pivot_head_steps=STEPS)
    condition = model.condition(torch.tensor([1]))
    with pytest.raises(ValueError, match="num_inference_steps=8 is more than the 4 tokens"):
        decoding(model, condition, noise=generators(0))
    output = decoding(model, condition, num_pivot_steps=2, noise=generators(0), record=True)
    assert (output.pivots.steps, output.picture.steps) == (2, 3) and output.pivot_states.shape == (1, 4, 16)
    for now, tokens in zip(output.picture.open[1:], output.picture.states[1:], strict=True):
        assert now.any() and (tokens != 0).any(-1).all()
    first, second = (GaussianNoise(generators(0), 1) for _ in range(2))
    again = decoding(model, condition, num_pivot_steps=2, noise=first)
    alone = decoding(model, condition, num_pivot_steps=2, noise=second, interrupt=lambda: False)
    assert torch.equal(again.picture.tokens, output.picture.tokens) and torch.equal(
        alone.picture.tokens, again.picture.tokens
    )
    with pytest.raises(ValueError, match=r"orders must be \[1, 4 \+ 16\]"):
        decoding(model, condition, orders=torch.zeros(1, 16, dtype=torch.long))


def test_the_attention_backend_is_that_of_the_heads_too():
    model = tiny_himar_pipeline().transformer
    model.set_attention_backend("reference")
    assert model.dense_head.trunk._attention_backend == model.encoder._attention_backend == "reference"
    model.reset_attention_backend()
    assert model.dense_head.trunk._attention_backend is None
