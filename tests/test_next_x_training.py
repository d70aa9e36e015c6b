"""Training of next-X models on scenes with every entity, and drawing from captions with the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import armm
from armm.decoding import NextXDecoding
from armm.evaluation.common import load_pipeline
from armm.masked_latent_model import MaskedLatentModel
from armm.model import AutoregressiveModel
from armm.next_x_model import NextXModel
from armm.training import load_recipe, run
from armm.training.task import build_task
from armm.training.tasks.kl_start import kl_from_vq
from armm.training.tasks.latent_start import start_from_unified, start_masked_latents_from_unified
from pipelines import decodings
from pipelines.mar_text_to_image import MARTextToImagePipeline
from pipelines.next_x_text_to_image import NextXTextToImagePipeline
from tokenizers_visual.kl_tokenizer import KLTokenizer
from tokenizers_visual.vq_tokenizer import VQTokenizer

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("scenes-next-x-*-64.yaml"))
MIXED = RECIPES[0].parent / "scenes-next-x-64.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a tiny KL tokenizer of eight pixels a token."""
    root = tmp_path_factory.mktemp("next-x")
    torch.manual_seed(0)
    tokenizer = KLTokenizer(
        base_channels=8, channel_multipliers=[1, 1, 1, 1], num_res_blocks=1, latent_channels=4, norm_groups=4
    )
    tokenizer.save_pretrained(root / "tokenizer")
    return root


def tiny(path: Path, root: Path, **overrides):
    """A shipped recipe with a few steps of a narrow trunk."""
    values = {
        "output": str(root / path.stem),
        "steps": 2,
        "batch_size": 4,
        "precision": "no",
        "validate_every": 2,
        "sample_every": 0,
        "model.compile": False,
        "model.start": None,
        "model.transformer.dim": 16,
        "model.transformer.num_layers": 2,
        "model.transformer.num_heads": 2,
        "model.transformer.mlp_hidden": 24,
        "model.transformer.rotary_axes": [2, 2, 4],
        "model.generation.num_flow_steps": 2,
        "data.tokenizer": str(root / "tokenizer"),
        "data.scenes": 16,
        "data.validation": 4,
        "data.captions": 3,
    }
    return load_recipe(path, {**values, **overrides})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem.split("-")[3])
def test_every_recipe_trains_and_its_export_draws(path, root):
    export = run(tiny(path, root), progress=False)
    figures = [json.loads(line) for line in (root / path.stem / "log.jsonl").read_text().splitlines()]
    assert any("prompt_gain" in json.dumps(entry) for entry in figures)
    pipe = load_pipeline("text-to-image", export)  # as `armm evaluate` does
    assert type(pipe) is NextXTextToImagePipeline
    assert pipe.transformer.dtype == torch.float32
    assert pipe.decoding.config.entity == path.stem.split("-")[3] and pipe.grid == (8, 8)
    prompts = ["a small red sphere", "a large blue cube behind a green cone"]

    def draw(prompts, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, output_type="pt").images

    both = draw(prompts, 1, 2)
    assert both.shape == (2, 3, 64, 64) and torch.allclose(draw(prompts[1], 2)[0], both[1], atol=1e-4)


def test_there_is_a_recipe_for_every_entity():
    assert {path.stem.split("-")[3] for path in RECIPES} == {"patch", "cell", "subsample", "scale", "image"}


def test_one_model_learns_every_entity_and_draws_with_any(root):
    task = build_task(tiny(MIXED, root))
    task.prepare(torch.device("cpu"))
    sizes = {int(batch["kind"]): batch["times"].shape[1] for batch in (task.batch(step, 2, 0) for step in range(30))}
    assert sizes == {0: 64, 1: 4, 2: 4, 3: 4, 4: 1}
    assert all(task.batch_loss(task.batch(step, 2, 0)).isfinite() for step in range(8))
    pipe = load_pipeline("text-to-image", run(tiny(MIXED, root), progress=False))
    assert pipe.transformer.config.entities[0] == ["patch", 1] and pipe.decoding.config.entity == "cell"
    pictures = []
    for entity, size in pipe.transformer.config.entities[1:]:
        pipe.decoding = NextXDecoding.from_config(pipe.decoding.config, entity=entity, size=size)
        pictures.append(pipe("a cone", generator=torch.Generator().manual_seed(0), output_type="pt").images)
    assert all(not torch.equal(pictures[0], other) for other in pictures[1:])
    for overrides, message in (
        ({"model.entities": [{"entity": "image", "size": 1}]}, "must contain that of `model.decoding`"),
        ({"model.entities": [{"shape": "image"}]}, "model.entities"),
    ):
        with pytest.raises(ValueError, match=message):
            build_task(tiny(MIXED, root, **overrides))


def test_a_next_x_model_can_go_on_with_other_entities(root):
    export = run(tiny(RECIPES[0], root, output=str(root / "first")), progress=False)
    task = build_task(tiny(MIXED, root, **{"model.start": str(export / "transformer"), "output": str(root / "second")}))
    first, second = NextXModel.from_pretrained(export / "transformer").state_dict(), task.model.state_dict()
    places = "trunk.position_embedding.weight"
    assert all(torch.equal(first[name], second[name]) for name in second if name != places)
    slots = task.text_slots
    assert len(second[places]) == 64 + 21 + slots and len(first[places]) == 64 + slots
    assert torch.equal(second[places][:64], first[places][:64])
    assert torch.equal(second[places][-slots:], first[places][-slots:])


def test_batches_are_what_they_say(root):
    torch.manual_seed(0)
    recipe = tiny(RECIPES[0], root, **{"data.null_share": 0.5})
    task = build_task(recipe)
    task.prepare(torch.device("cpu"))
    batch = task.batch(3, 16, 0)
    again = task.batch(3, 16, 0)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    null = (batch["captions"][:, 0] == task.words.null).float()
    assert 0 < float(null.mean()) < 1 and (batch["captions"][null.bool()][:, 1:] == task.words.pad).all()
    assert batch["latents"].shape == (16, 64, 4) and 0 < float(batch["times"].min()) < float(batch["times"].max()) < 1
    rows = torch.arange(4)
    mean = task.train_data.latents(rows, None)
    drawn = task.train_data.latents(rows, torch.Generator().manual_seed(0))
    assert torch.equal(mean, task.train_data.mean[rows].float())
    assert torch.allclose(
        (drawn - mean) / task.train_data.spread[rows],
        torch.randn(4, 64, 4, generator=torch.Generator().manual_seed(0)),
        atol=1e-2,
    )


def test_the_loss_falls(root):
    torch.manual_seed(0)
    task = build_task(tiny(RECIPES[0], root))
    task.prepare(torch.device("cpu"))
    task.module.train()
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=3e-3)
    batch, losses = task.batch(0, 16, 0), []
    for _ in range(12):
        loss, logs = task.loss(batch, 0, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(logs["velocity"]))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.tokenizer": None}, "data.tokenizer"),
        ({"model.decoding.entities": "cell"}, "model.decoding"),
        ({"model.decoding.entity": "cell", "model.decoding.size": 3}, "cells of 3x3"),
        ({"model.text_slot": 3}, "did you mean text_slots"),
        ({"loss.l1": 1.0}, "loss.l1"),
    ],
)
def test_bad_recipes_are_refused(overrides, message, root):
    with pytest.raises(ValueError, match=message):
        build_task(tiny(RECIPES[0], root, **overrides))


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (7, TypeError, "must be a string"),
        ([], ValueError, "empty list"),
        ("a red dragon", ValueError, "dragon"),
    ],
)
def test_bad_prompts_are_refused(prompt, error, message, root):
    pipe = build_task(tiny(RECIPES[0], root)).pipeline()
    with pytest.raises(error, match=message):
        pipe(prompt)


def test_vocabulary_and_transformer_belong_together(root):
    task = build_task(tiny(RECIPES[0], root))
    parts = {"tokenizer": task.tokenizer, "transformer": task.model, "decoding": task.decoding}
    with pytest.raises(ValueError, match="must list the words"):
        NextXTextToImagePipeline(**parts)
    with pytest.raises(ValueError, match="do not belong together"):
        NextXTextToImagePipeline(**parts, vocabulary=[*task.vocabulary, "more"])


def test_the_recipe_of_the_tokenizer_trains(tmp_path):
    path = RECIPES[0].parent / "scenes-kl-tokenizer-64.yaml"
    small = {"base_channels": 8, "norm_groups": 4, "patch_size": 2}
    multipliers = [1, 1, 2]
    vq = VQTokenizer(**small, encoder_multipliers=multipliers, decoder_multipliers=multipliers, codebook_dim=4)
    vq.save_pretrained(tmp_path / "vq")
    values = {
        "output": str(tmp_path / "run"),
        "steps": 3,
        "batch_size": 4,
        "precision": "no",
        "model.start": str(tmp_path / "vq"),
        "data.scenes": 8,
        "data.validation": 4,
        "validate_every": 3,
        "sample_every": 3,
    }
    export = run(load_recipe(path, values), progress=False)
    with safe_open(export / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert file.get_slice("decoder.conv_in.weight").get_dtype() == "I8"
    tokenizer = KLTokenizer.from_pretrained(export, dtype=torch.float32)
    assert tokenizer.downsample == 8 and tokenizer.scaling_factor != 0.2325
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    assert tokenizer.decode(tokenizer.encode(pixels)).shape == pixels.shape
    posterior = tokenizer.posterior(pixels)
    assert torch.allclose(tokenizer.encode(pixels).latents, posterior.mean.flatten(2).mT * tokenizer.scaling_factor)
    again = build_task(load_recipe(path, {**values, "model.start": str(export)}))  # or from a KL tokenizer
    torch.testing.assert_close(again.tokenizer.decoder.conv_in.weight, tokenizer.decoder.conv_in.weight)
    scratch = {**small, "channel_multipliers": multipliers, "latent_channels": 4}
    assert build_task(load_recipe(path, {**values, "model": scratch})).tokenizer.latent_channels == 4
    with pytest.raises(ValueError, match="channels"):
        build_task(load_recipe(path, {**values, "model": {**scratch, "channels": 8}}))


# ---------------------------------------------------------------------- masked autoregression


def tiny_mar_recipe(root: Path, **overrides):
    small = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 24}
    values = {
        "output": str(root / "mar"),
        "steps": 2,
        "batch_size": 4,
        "precision": "no",
        "validate_every": 2,
        "sample_every": 0,
        "model.start": None,
        "model.compile": False,
        "model.encoder": small,
        "model.decoder": small,
        "model.head": {"type": "mlp", "width": 16, "depth": 1},
        "model.generation.head_steps": "3,1,0",
        "model.generation.num_inference_steps": 3,
        "data.tokenizer": str(root / "tokenizer"),
        "data.scenes": 16,
        "data.validation": 4,
        "data.captions": 3,
    }
    return load_recipe(RECIPES[0].parent / "scenes-mar-64.yaml", {**values, **overrides})


def test_the_recipe_of_masked_autoregression_trains_and_its_export_draws_and_redraws(root):
    export = run(tiny_mar_recipe(root), progress=False)
    assert "prompt_gain" in (root / "mar" / "log.jsonl").read_text()
    pipe = load_pipeline("text-to-image", export)
    assert type(pipe) is MARTextToImagePipeline and pipe.transformer.dtype == torch.float32
    prompts = ["a small red sphere", "a large blue cube behind a green cone"]
    for module in pipe.transformer.head.modules():  # two steps move what began as zero too little
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.3)

    def draw(prompts, *seeds, **options):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(prompts, generator=generators, output_type="latent", **options).images

    both = draw(prompts, 1, 2)
    assert both.shape == (2, 64, 4) and torch.allclose(draw(prompts[1], 2)[0], both[1], atol=1e-4)
    assert not torch.allclose(draw(prompts[0], 2)[0], both[1], atol=1e-4), "the prompt does not matter"
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    redrawn = draw(prompts[0], 3, latents=both[1:], mask_image=mask)
    left = torch.arange(64).view(8, 8)[:, :4].flatten()
    assert torch.equal(redrawn[0, left], both[1, left]) and not torch.equal(redrawn, both[1:])
    with pytest.raises(ValueError, match="`latents` has 2 entries for 3 images"):
        draw([*prompts, "a cone"], 1, 2, 3, latents=both, mask_image=mask)


def test_a_directory_offers_decodings_of_another_pipeline(root):
    cells = run(tiny(RECIPES[0], root, output=str(root / "offers")), progress=False)
    masked = run(tiny_mar_recipe(root, output=str(root / "offered")), progress=False)
    assert decodings.add(cells, masked).name == "masked_latents"
    pipe = armm.pipeline(cells, decoding="masked-latents", dtype=torch.float32)
    assert type(pipe) is MARTextToImagePipeline and pipe.generation_config["num_inference_steps"] == 3
    alone = load_pipeline("text-to-image", masked)
    draws = [
        p("a small red sphere", generator=torch.Generator().manual_seed(1), output_type="pt").images for p in (pipe, alone)
    ]
    torch.testing.assert_close(*draws)
    assert type(armm.pipeline(cells)) is NextXTextToImagePipeline
    with pytest.raises(ValueError, match="holds a MARTextToImagePipeline, not a NextXTextToImagePipeline"):
        NextXTextToImagePipeline.from_pretrained(cells, decoding="masked_latents")


def test_the_loss_of_masked_autoregression_falls(root):
    task = build_task(tiny_mar_recipe(root, **{"output": str(root / "mar-falls"), "model.repeat": 2}))
    task.prepare(torch.device("cpu"))
    batch = task.batch(0, 8, 0)
    masked = batch["masked"].sum(1)
    assert (masked == 64 - batch["kept"].shape[1]).all() and masked[0] >= 45
    assert not batch["masked"].gather(1, batch["kept"]).any() and batch["noise"].shape == (8, 2 * 64, 4)
    optimizer = torch.optim.Adam(task.module.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        loss = task.batch_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_masked_autoregression_refuses_bad_recipes(root):
    for overrides, message in (
        ({"model.decoding": {"entity": "cell"}}, "entity"),
        ({"data.tokenizer": None}, "must name the directory"),
    ):
        with pytest.raises(ValueError, match=message):
            build_task(tiny_mar_recipe(root, **overrides))
    with pytest.raises(ValueError, match="one of them must be 0"):
        MaskedLatentModel(num_classes=3, vocab_size=4)


# ---------------------------------------------------------------------- going on from other weights


def test_a_kl_tokenizer_can_start_from_a_vq_tokenizer():
    torch.manual_seed(0)
    vq = VQTokenizer(
        base_channels=8,
        encoder_multipliers=[1, 2],
        decoder_multipliers=[1, 2],
        num_res_blocks=[1, 2],
        decoder_res_blocks=[2, 1],
        z_channels=12,
        codebook_size=16,
        codebook_dim=4,
        norm_groups=4,
        patch_size=2,
    )
    torch.nn.init.zeros_(vq.post_quant_conv.bias)  # elsewhere the border of the picture would differ
    kl = kl_from_vq(vq)
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    features = vq.features(pixels)
    posterior = kl.posterior(pixels)
    torch.testing.assert_close(posterior.mean, features, atol=1e-5, rtol=1e-4)
    assert posterior.std.max() < 0.06
    torch.testing.assert_close(
        kl.decode_features(features), vq.decoder(vq.post_quant_conv(features)), atol=1e-5, rtol=1e-4
    )
    with pytest.raises(ValueError, match="encoder_multipliers and decoder_multipliers differ"):
        kl_from_vq(VQTokenizer(base_channels=8, encoder_multipliers=[1, 2], decoder_multipliers=[2, 1], norm_groups=4))


def unified_and_next_x(**options):
    torch.manual_seed(0)
    shared = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp_hidden": 24, "rotary_axes": [2, 2, 4], "qk_norm": "rms"}
    other = AutoregressiveModel(
        vocab_size=30, grid=[4, 4], text_slots=5, answer_slots=3, transformer={**shared, "learned_positions": 25}
    )
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    extra = {"norm_affine": False, "modulation": "shared", "learned_positions": 21, **options}
    model = NextXModel(
        latent_channels=4, grid=[4, 4], num_classes=0, vocab_size=20, text_length=5, transformer={**shared, **extra}
    )
    return other, model


@pytest.mark.parametrize("options", [{}, {"norm_affine": True}], ids=["folded norms", "own norms"])
def test_a_next_x_model_can_start_from_a_unified_one(options):
    other, model = unified_and_next_x(**options)
    fresh = start_from_unified(model, other, words=20)
    assert {name.partition(".")[0] for name in fresh} <= {
        "trunk",
        "latent_projection",
        "time_embedding",
        "head",
        "class_embedding",
    }
    assert all("modulation.linear" in name or "norm" in name for name in fresh if name.startswith("trunk"))
    torch.nn.init.zeros_(model.trunk.shared_modulation.linear.weight)
    x, table = torch.randn(2, 6, 16), other.positions_for(torch.arange(6))
    own = model.trunk.position_table(other.layout().coordinates[:6], index=torch.arange(6))
    condition = model.trunk.shared_modulation(torch.randn(2, 6, 16))
    for ours, theirs in zip(model.trunk.blocks, other.trunk.blocks, strict=True):
        after = ours(x, rotary=own.rotary, condition=condition)
        x = theirs(x, rotary=table.rotary)
        torch.testing.assert_close(after, x, atol=1e-4, rtol=1e-3)
    positions, source = (m.trunk.position_embedding.weight for m in (model, other))
    torch.testing.assert_close(positions[:16], source[6:22])
    torch.testing.assert_close(positions[16:], source[:5])
    torch.testing.assert_close(model.text_embedding.weight, other.token_embedding.weight[:20])
    with pytest.raises(ValueError, match="must be the same"):
        start_from_unified(model, other, words=19)


def test_a_masked_latent_model_can_start_from_a_unified_one():
    other, _ = unified_and_next_x()
    stack = {"dim": 16, "num_layers": 1, "num_heads": 2, "mlp_hidden": 24, "rotary_axes": [2, 2, 4], "qk_norm": "rms"}

    def build(**options):
        return MaskedLatentModel(
            4, [4, 4], 1, 0, 5, {**stack, "final_norm": False, **options}, stack, {"type": "mlp", "width": 8}, 20
        )

    model = build()
    fresh = start_masked_latents_from_unified(model, other, words=20)
    new = {"token_projection", "decoder_projection", "output_position", "class_embedding", "head"}
    assert {name.partition(".")[0] for name in fresh} <= new and "decoder_projection.weight" not in fresh
    words = torch.randint(20, (2, 5))
    words[:] = words[:1]
    embeds = other.token_embedding(words)
    layout = other.layout().coordinates
    rows = torch.cat([torch.arange(5), torch.arange(6, 22)])  # begin-of-image has no place here
    table = other.trunk.position_table(layout[rows], index=rows)
    kept = torch.arange(16).expand(2, -1)
    own = model._positions(model.encoder, kept, 0)
    torch.testing.assert_close(own.learned, table.learned.expand(2, -1, -1))
    torch.testing.assert_close(own.rotary, table.rotary.expand_as(own.rotary))
    x = y = torch.cat([embeds, torch.randn(2, 16, 16)], 1)
    for block in other.trunk.blocks:
        x = block(x, rotary=table.rotary)
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        y = block(y, rotary=table.rotary)
    torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="as many together"):
        start_masked_latents_from_unified(build(num_layers=2), other, words=20)
    with pytest.raises(ValueError, match="no rotary_axes, or three"):
        build(rotary_axes=[4, 4])
