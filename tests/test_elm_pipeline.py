"""ELM: binary codes, several sub-codes a position, masked decoding, guidance schedules, the pipeline and its files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import armm
from armm.convert import CheckpointKeysError, CheckpointShapeError, convert
from armm.convert.elm import convert_state_dict
from armm.decoding.guidance import Guidance
from armm.decoding.masked_tokens import MaskedTokenDecoding, join_noise
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import NoiseSource, Sampler
from armm.model import AutoregressiveModel
from pipelines.elm import AUTOREGRESSIVE_SCHEDULES, ELMPipeline, crossfade
from tokenizers_visual import BinaryTokenizer, Codes, ConvEncoder
from tokenizers_visual.autoencoder import ResidualBlock, SpatialAttention
from tokenizers_visual.binary_quantizer import bits_to_ids, ids_to_bits, uniform_noise

TRUNK = {"dim": 32, "num_layers": 2, "num_heads": 2, "mlp_hidden": 48, "rotary_axes": [8, 8]}
MASKED = {
    "sub_code_layout": "sequence", "mask_token": True, "causal": False, "head": {"type": "tied"}, "head_bias": True
}  # fmt: skip
EXACT = {"rtol": 0.0, "atol": 1e-4}


def tiny_model(sub_codes: int = 2, **options: Any) -> AutoregressiveModel:
    """Eight values a sub-code on a grid of 3 x 4, with weights large enough that the ids depend on everything."""
    torch.manual_seed(4)
    condition = {"type": "class", "num_classes": 6}
    model = AutoregressiveModel(
        vocab_size=8, transformer=TRUNK, condition=condition, grid=(3, 4), sub_codes=sub_codes, **options
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_tokenizer(sub_codes: int = 2) -> BinaryTokenizer:
    torch.manual_seed(5)
    return BinaryTokenizer(
        base_channels=8, channel_multipliers=[1, 2], encoder_blocks=1, decoder_blocks=1, z_channels=8, bits=3 * sub_codes,
        sub_codes=sub_codes, norm_groups=4,
    ).eval()  # fmt: skip


def tiny_pipeline(sub_codes: int = 2, masked: bool = False, **preset: Any) -> ELMPipeline:
    pipe = ELMPipeline(
        tokenizer=tiny_tokenizer(sub_codes),
        transformer=tiny_model(sub_codes, **(MASKED if masked else {})),
        decoding=MaskedTokenDecoding() if masked else NextTokenDecoding(),
        generation_config={"guidance_scale": 2.0, **preset},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


KINDS = pytest.mark.parametrize(("sub_codes", "masked"), [(1, False), (2, False), (1, True), (2, True)])


# ---------------------------------------------------------------------- binary codes


@given(st.integers(1, 4), st.integers(1, 20), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_ids_are_the_chunks_of_the_bits_read_as_numbers(sub_codes, bits, tokens, random):
    rows = [[random.randint(0, 1) for _ in range(sub_codes * bits)] for _ in range(tokens)]
    expected = [
        [int("".join(map(str, row[i * bits : (i + 1) * bits])), 2) for i in range(sub_codes)] for row in rows
    ]
    ids = bits_to_ids(torch.tensor(rows, dtype=torch.float32), sub_codes)
    assert ids.tolist() == expected and ids.dtype == torch.int64
    assert ids_to_bits(ids, bits).tolist() == rows


def test_vectors_are_sums_of_the_embeddings_of_set_bits():
    model = tiny_tokenizer()
    codes = Codes(ids=torch.tensor([[[5, 1], [0, 7]]]), grid=(1, 1, 2))
    rows = model.quantizer.embedding.weight
    expected = torch.stack([rows[0] + rows[2] + rows[5], rows[3] + rows[4] + rows[5]])
    torch.testing.assert_close(model.embed(codes)[0], expected)
    assert model.to_bits(codes).tolist() == [[[1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1]]]


def test_the_tokenizer_keeps_its_contract():
    model, pixels = tiny_tokenizer(), torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = model.encode(pixels)
    assert codes.ids.shape == (2, 12, 2) and codes.grid == (1, 3, 4)
    assert (model.codebook_size, model.sub_codes, model.latent_channels, model.downsample) == (8, 2, 8, 2)
    assert model.decode(codes).shape == pixels.shape and model.embed(codes).shape == (2, 12, 8)
    torch.testing.assert_close(model(pixels)[0], model.decode(codes), rtol=0, atol=1e-5)
    whole = tiny_tokenizer(1)
    assert whole.encode(pixels).ids.shape == (2, 12)


def test_drawn_bits_follow_their_probabilities_and_their_own_generator():
    model, pixels = tiny_tokenizer(), torch.rand(3, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    drawn = model.encode(pixels, sample=True, generator=generators([1, 2, 3]))
    for row, seed in enumerate((1, 2, 3)):
        alone = model.encode(pixels[row : row + 1], sample=True, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(alone.ids[0], drawn.ids[row])
    probabilities = model.quantizer.probabilities(model.features(pixels).flatten(2).transpose(1, 2))
    noise = uniform_noise((400, *probabilities.shape), torch.Generator().manual_seed(0), probabilities.device)
    draws = model.quantizer.decide(probabilities.expand_as(noise), noise)
    assert (draws.double().mean(0) - probabilities).abs().max() < 0.1125  # 4.5 standard deviations
    assert torch.equal(model.to_bits(model.encode(pixels)), (probabilities > 0.5).long())


def test_gradients_reach_the_encoder_through_the_bits():
    model = tiny_tokenizer()
    pixels, quantized = model(torch.zeros(1, 3, 4, 4))
    pixels.square().mean().backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused and set(quantized.bits.unique().tolist()) <= {0.0, 1.0}


def test_attention_is_chosen_by_level():
    encoder = ConvEncoder(3, 8, [1, 1, 2], 1, 8, use_attention=[True, False, True], norm_groups=4)
    assert [len(level.attentions) for level in encoder.levels] == [1, 0, 1]
    with pytest.raises(ValueError, match="one for each of the 3 levels"):
        ConvEncoder(3, 8, [1, 1, 2], 1, 8, use_attention=[True], norm_groups=4)


# ---------------------------------------------------------------------- sub-codes


def test_stacked_sub_codes_are_separate_tables_and_heads():
    model = tiny_model(2)
    ids = torch.tensor([[[3, 5], [0, 7]]])
    tables = model.token_embedding.weight.view(2, 8, -1)
    joined = torch.cat([tables[0][ids[..., 0]], tables[1][ids[..., 1]]], dim=-1)
    torch.testing.assert_close(model.embed(ids), joined @ model.sub_code_projection.weight.T)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    heads = model.head.projection.weight.view(2, 8, -1)
    expected = torch.stack([hidden @ heads[0].T, hidden @ heads[1].T], dim=-2)
    torch.testing.assert_close(model.logits(hidden), expected)


@pytest.mark.parametrize("sub_codes", [1, 2, 3])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_cached_decoding_equals_the_whole_sequence(sub_codes, prefix):
    model = tiny_model(sub_codes)
    labels = torch.tensor([1, 4])
    condition, null = model.condition(labels), model.null_condition(2)
    known = torch.randint(8, (2, 12, *model.code_shape), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, :prefix] = True
    guidance = Guidance(2.0, "linear", progress="done")
    out = NextTokenDecoding()(
        model, condition, null, sampler=Sampler(do_sample=False), guidance=guidance, known_ids=known, known_mask=mask,
        prefix=prefix, record_logits=True,
    )  # fmt: skip
    assert torch.equal(out.ids[:, :prefix], known[:, :prefix]) and out.num_calls == 12 - prefix
    both = torch.stack([model(out.ids[:, :-1], rows) for rows in (condition, null)])
    for step in range(prefix, 12):
        scale = 1.0 + (step - prefix + 1) / (12 - prefix)
        expected = both[1, :, step] + scale * (both[0, :, step] - both[1, :, step])
        torch.testing.assert_close(out.logits[:, step], expected, **EXACT)


def test_every_sub_code_has_its_own_filter_and_noise():
    logits = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.empty(3, 2, 8).exponential_(generator=torch.Generator().manual_seed(1))
    sampler = Sampler(top_k=3)
    both = sampler(logits, noise)
    for i in range(2):
        assert torch.equal(both[:, i], sampler(logits[:, i], noise[:, i]))


SCALES = {
    "constant": lambda k, n: 1.0,
    "linear": lambda k, n: (k + 1) / n,
    "cos": lambda k, n: math.cos(-math.pi / 2 + (k + 1) / n * math.pi / 2),
    "log": lambda k, n: math.log(1 + (k + 1) / n * (math.e - 1)),
    "square": lambda k, n: ((k + 1) / n) ** 2,
    "square_root": lambda k, n: math.sqrt(k / n),
}


@pytest.mark.parametrize("name", AUTOREGRESSIVE_SCHEDULES)
@given(steps=st.integers(1, 300), scale=st.floats(1.1, 20))
@settings(max_examples=25, deadline=None)
def test_guidance_schedules_are_the_published_formulas(name, steps, scale):
    guidance = Guidance(scale, **AUTOREGRESSIVE_SCHEDULES[name])
    for step in range(steps):
        expected = 1 + (scale - 1) * SCALES[name](step, steps)
        assert guidance.scale_at(step, steps) == pytest.approx(expected, abs=1e-9)


def test_power_cosine_guidance():
    guidance = Guidance(3.0, "cosine", progress="done", power=2.0)
    for step in range(8):
        expected = 1 + 2 * (1 - math.cos(math.pi * ((step + 1) / 8) ** 2)) / 2
        assert guidance.scale_at(step, 8) == pytest.approx(expected)


# ---------------------------------------------------------------------- masked decoding


def unmask(model: AutoregressiveModel, labels: list[int], **options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The ids, and what the callback saw after every step."""
    seen: list[torch.Tensor] = []
    decoding = options.pop("decoding", MaskedTokenDecoding())
    condition = model.condition(torch.tensor(labels))
    output = decoding(
        model, condition, model.null_condition(len(labels)), callback=lambda step, ids: seen.append(ids.clone()), **options
    )
    return output.ids, seen


@pytest.mark.parametrize("sub_codes", [1, 2])
@pytest.mark.parametrize("schedule", ["cos", "linear"])
@given(steps=st.integers(1, 20), seed=st.integers(0, 1000), known=st.integers(0, 12))
@settings(max_examples=8, deadline=None)
def test_every_position_is_decided_exactly_once(sub_codes, schedule, steps, seed, known):
    model = tiny_model(sub_codes, **MASKED)
    generator = torch.Generator().manual_seed(seed)
    given_ids = torch.randint(8, (2, 12, *model.code_shape), generator=generator)
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, torch.randperm(12, generator=generator)[:known]] = True  # rows of different lengths
    ids, seen = unmask(
        model, [0, 3], decoding=MaskedTokenDecoding(steps, schedule), noise=generator, known_ids=given_ids,
        known_mask=mask,
    )  # fmt: skip
    assert len(seen) == steps and ids.shape == given_ids.shape
    decided, before = mask.clone(), given_ids
    for state in seen:
        is_open = (state.view(2, 12, -1) < 0).any(-1)
        assert not (decided & is_open).any()
        assert torch.equal(state[decided], before[decided])
        decided, before = ~is_open, state
    assert decided.all() and torch.equal(before, ids) and int(ids.min()) >= 0 and int(ids.max()) < 8


@given(steps=st.integers(2, 16), seed=st.integers(0, 1000))
@settings(max_examples=6, deadline=None)
def test_the_number_of_open_positions_follows_the_schedule(steps, seed):
    _, seen = unmask(tiny_model(1, **MASKED), [0, 3], decoding=MaskedTokenDecoding(steps), noise=generators([seed, 7]))
    is_open = 12
    for step, state in enumerate(seen[:-1]):
        wanted = math.floor(12 * math.cos(math.pi / 2 * (step + 1) / steps))
        is_open = max(1, min(is_open - 1, wanted))
        assert (state < 0).sum(1).tolist() == [is_open, is_open]


@KINDS
def test_an_image_does_not_depend_on_its_batch(sub_codes, masked):
    pipe = tiny_pipeline(sub_codes, masked)
    together = pipe([1, 5, 2], generator=generators([1, 2, 3]), output_type="latent").images
    for row, (label, seed) in enumerate(((1, 1), (5, 2), (2, 3))):
        alone = pipe(label, generator=torch.Generator().manual_seed(seed), output_type="latent").images
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("sub_codes", [1, 2])
def test_masked_noise_can_be_recorded(sub_codes):
    model, decoding = tiny_model(sub_codes, **MASKED), MaskedTokenDecoding(4)
    source = NoiseSource(torch.Generator().manual_seed(3), 2, 12 * sub_codes * 9)
    drawn = torch.stack([source.draw(step) for step in range(4)], dim=1)
    guesses, confidence = drawn[..., : 12 * sub_codes * 8], drawn[..., 12 * sub_codes * 8 :]
    joined = join_noise(guesses.view(2, 4, 12, sub_codes, 8), confidence.view(2, 4, 12, sub_codes))
    first, _ = unmask(model, [0, 3], decoding=decoding, noise=torch.Generator().manual_seed(3))
    assert torch.equal(first, unmask(model, [0, 3], decoding=decoding, noise=joined)[0])


def test_masked_models_see_everything_and_repeat_the_class():
    model = tiny_model(2, **MASKED)
    condition = model.condition(torch.tensor([1, 2]))
    assert condition.length == 2 and torch.equal(condition.embeds[:, 0], condition.embeds[:, 1])
    ids = torch.randint(8, (2, 12, 2), generator=torch.Generator().manual_seed(0))
    logits = model(ids, condition)
    assert logits.shape == (2, 13, 2, 8)
    other = ids.clone()
    other[:, -1] = model.mask_id
    assert (model(other, condition)[:, 1] - logits[:, 1]).abs().max() > 1e-3  # the first position sees the last


def test_remasking_may_open_what_differs_but_never_what_was_given():
    model = tiny_model(1, **MASKED)
    known = torch.randint(8, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, :4] = True
    decoding = MaskedTokenDecoding(12, "linear", remask=True)
    ids, seen = unmask(model, [0, 3], decoding=decoding, noise=generators([1, 2]), known_ids=known, known_mask=mask)
    assert torch.equal(ids[:, :4], known[:, :4]) and all(torch.equal(state[:, :4], known[:, :4]) for state in seen)
    pairs = list(zip(seen[:-1], seen[1:], strict=True))
    assert any(((before >= 0) & (after < 0)).any() for before, after in pairs)
    assert not any(((before >= 0) & (after < 0)).any() for before, after in pairs[6:])


def test_a_callback_may_replace_ids_and_interrupt():
    pipe = tiny_pipeline(1, masked=True)

    def keep_threes(pipe, step, time, tensors):
        ids = tensors["latents"].clone()
        ids[:, 0] = 3
        return {"latents": ids}

    ids = pipe(2, callback_on_step_end=keep_threes, output_type="latent", num_inference_steps=5).images
    assert int(ids[0, 0]) == 3
    steps = []

    def stop(pipe, step, time, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return {}

    pipe(2, callback_on_step_end=stop, output_type="latent", num_inference_steps=5)
    assert steps == [0, 1]


# ---------------------------------------------------------------------- the pipeline


@KINDS
def test_images_come_out_and_settings_are_used(sub_codes, masked):
    pipe = tiny_pipeline(sub_codes, masked)
    out = pipe([0, 5], generator=torch.Generator().manual_seed(0), output_type="pt", output_codes=True)
    assert out.images.shape == (2, 3, 6, 8) and out.codes.grid == (1, 3, 4)
    fused = tiny_pipeline(sub_codes, masked)
    fused.fuse_projections()
    again = fused([0, 5], generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert torch.equal(again, out.codes.ids)
    images = pipe(3, num_images_per_prompt=2, generator=torch.Generator().manual_seed(1)).images
    assert len(images) == 2 and images[0].size == (8, 6)
    larger = pipe(3, height=8, width=10, output_type="pt").images
    assert larger.shape == (1, 3, 8, 10)


@KINDS
def test_saved_and_loaded_it_draws_the_same(sub_codes, masked, tmp_path):
    pipe = tiny_pipeline(sub_codes, masked, top_k=5)
    pipe.save_pretrained(tmp_path / "elm")
    for load in (ELMPipeline.from_pretrained, armm.pipeline):
        loaded = load(tmp_path / "elm")
        loaded.set_progress_bar_config(disable=True)
        assert loaded.generation_config["top_k"] == 5 and loaded.is_masked == masked
        ids = [p([1, 2], generator=generators([1, 2]), output_type="latent").images for p in (pipe, loaded)]
        assert torch.equal(*ids)


@KINDS
def test_known_ids_are_kept(sub_codes, masked):
    pipe = tiny_pipeline(sub_codes, masked)
    latents = torch.randint(8, (1, 12, *pipe.transformer.code_shape), generator=torch.Generator().manual_seed(0))
    latents[:, [3, 4, 8, 11]] = -1
    ids = pipe([1, 2], latents=latents, output_type="latent").images
    kept = (latents >= 0).expand_as(ids)
    assert torch.equal(ids[kept], latents.expand_as(ids)[kept])


@KINDS
@pytest.mark.parametrize("direction", ["right", "down"])
def test_images_are_extended(sub_codes, masked, direction):
    pipe = tiny_pipeline(sub_codes, masked)
    first = pipe([1, 2], generator=torch.Generator().manual_seed(0), output_codes=True).codes
    longer = pipe.extend(first, [1, 2], direction, overlap=1, output_type="pt", generator=torch.Generator().manual_seed(1))
    height, width = (3, 7) if direction == "right" else (5, 4)
    assert longer.codes.grid == (1, height, width) and longer.images.shape == (2, 3, 2 * height, 2 * width)
    cells = longer.codes.ids.unflatten(1, (height, width))
    assert torch.equal(cells[:, :3, :4], first.ids.unflatten(1, (3, 4)))
    start = pipe.pixels_to_images(pipe.tokenizer.decode(first), "pt")
    keep = (slice(None), slice(None), slice(None), slice(6)) if direction == "right" else (slice(None), slice(None), slice(4))
    torch.testing.assert_close(longer.images[keep], start[keep])
    assert pipe.extend(longer.codes, [1, 2], direction, overlap=2, output_type="latent").codes.grid[1:] == (
        (3, 9) if direction == "right" else (6, 4)
    )


def test_crossfade_is_linear():
    faded = crossfade(torch.zeros(1, 6), torch.ones(1, 5), 4, 1)
    torch.testing.assert_close(faded, torch.tensor([[0, 0, 0.125, 0.375, 0.625, 0.875, 1.0]]))


BAD_CALLS = [
    (False, {"guidance_schedule": "powercos"}, ValueError, "unknown `guidance_schedule` 'powercos'.*square_root"),
    (True, {"guidance_schedule": "square"}, ValueError, "unknown `guidance_schedule` 'square'.*powercos"),
    (False, {"guidance_power": 2.0}, ValueError, "`guidance_power` is for the schedule 'powercos'"),
    (False, {"num_inference_steps": 5}, ValueError, "`num_inference_steps` is for masked models"),
    (True, {"num_inference_steps": 0}, ValueError, "`num_inference_steps` must be at least 1"),
    (False, {"top_k": -1}, ValueError, "`top_k` must be at least 0"),
    (False, {"top_k": None, "temperature": -1.0}, ValueError, "`temperature` must be at least 0"),
    (False, {"class_labels": 6}, ValueError, "`class_labels` must lie between 0 and 5"),
    (False, {"class_labels": "red fox"}, ValueError, "class names are known for ImageNet"),
    (False, {"height": 7}, ValueError, "`height` must be a multiple of 2"),
    (False, {"latents": torch.zeros(1, 12, dtype=torch.long)}, ValueError, r"`latents` must be \[1, 12, 2\]"),
    (False, {"latents": torch.full((1, 12, 2), 8)}, ValueError, "between -1 .open. and 7"),
    (False, {"latents": torch.tensor([[[0, -1]] * 12])}, ValueError, "all sub-codes of a position or none"),
    (False, {"latents": torch.zeros(1, 12, 2)}, TypeError, "`latents` must be an int64 tensor"),
    (False, {"noise": torch.ones(1, 12, 8)}, ValueError, r"`noise` must be a tensor \[1, 12, 2, 8\]"),
    (True, {"noise": torch.ones(1, 9, 216)}, ValueError, r"`noise` must be a tensor \[1, 10, 216\]"),
    (False, {"do_sample": 1}, TypeError, "`do_sample` must be True or False"),
]


@pytest.mark.parametrize(("masked", "arguments", "error", "says"), BAD_CALLS)
def test_bad_calls_are_answered(masked, arguments, error, says):
    with pytest.raises(error, match=says):
        tiny_pipeline(2, masked)(**{"class_labels": 1, "output_type": "latent", **arguments})


def test_bad_parts_are_answered():
    model = tiny_model(2)
    with pytest.raises(ValueError, match="predicts 2 sub-codes of 8 values, `tokenizer` has 1 of 8"):
        ELMPipeline(tokenizer=tiny_tokenizer(1), transformer=model, decoding=NextTokenDecoding())
    with pytest.raises(ValueError, match="no vocabulary ranges"):
        model.logits(torch.zeros(1, 32), low=2)
    with pytest.raises(ValueError, match=r"ids must be \[batch, tokens, 2\]"):
        model.embed(torch.zeros(1, 3, dtype=torch.long))
    for options, says in (
        ({"sub_codes": 0}, "sub_codes must be a positive integer"),
        ({"sub_code_layout": "beside"}, "'stacked' or 'sequence'"),
        ({"mask_token": True}, "needs sub_code_layout='sequence'"),
        ({"head": {"type": "tide"}}, "head type must be one of"),
    ):
        with pytest.raises(ValueError, match=says):
            tiny_model(**{"sub_codes": 2, **options})
    condition = model.condition(torch.tensor([1]))
    with pytest.raises(ValueError, match="masked decoding needs a model with a mask token"):
        MaskedTokenDecoding()(model, condition)
    masked = tiny_model(1, **MASKED)
    with pytest.raises(ValueError, match="needs a causal model"):
        NextTokenDecoding()(masked, masked.condition(torch.tensor([1])))
    with pytest.raises(ValueError, match="prefix=3 tokens must all be given"):
        NextTokenDecoding()(model, condition, prefix=3)
    for options, says in (
        ({"mask_schedule": "sine"}, "mask_schedule must be one of"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a positive integer"),
        ({"confidence_temperature": -1.0}, "confidence_temperature must be"),
    ):
        with pytest.raises(ValueError, match=says):
            MaskedTokenDecoding(**options)
    for options, says in (({"progress": "half"}, "progress must be one of"), ({"power": 0.0}, "power must be")):
        with pytest.raises(ValueError, match=says):
            Guidance(2.0, **options)


def test_bad_codes_and_tokenizers_are_answered():
    model = tiny_tokenizer()
    for ids, says in ((torch.zeros(1, 4, dtype=torch.long), r"shape \[B, N, 2\]"), (torch.full((1, 4, 2), 8), r"\[0, 7\]")):
        with pytest.raises(ValueError, match=says):
            model.decode(Codes(ids=ids, grid=(1, 2, 2)))
    with pytest.raises(ValueError, match="`uniform` is noise"):
        model.encode(torch.zeros(1, 3, 4, 4), uniform=torch.zeros(1, 4, 6))
    with pytest.raises(ValueError, match="2 generators for a batch of 1"):
        model.encode(torch.zeros(1, 3, 4, 4), sample=True, generator=generators([1, 2]))
    with pytest.raises(ValueError, match="`sub_codes` must divide the 5 bits"):
        bits_to_ids(torch.zeros(1, 5), 2)
    for options, says in (
        ({"bits": 5, "sub_codes": 2}, "`sub_codes` must cut the 5 bits"),
        ({"bits": 0}, "`bits` must be a positive integer"),
        ({"z_channels": 6}, "`norm_groups` 4 must divide every width"),
    ):
        with pytest.raises(ValueError, match=says):
            BinaryTokenizer(**{"base_channels": 8, "channel_multipliers": [1], "z_channels": 8, "norm_groups": 4, **options})


# ---------------------------------------------------------------------- the authors' files


def authors_transformer(sub_codes: int = 2, masked: bool = False, vocab: int = 8, dim: int = 32) -> dict[str, torch.Tensor]:
    """Random tensors under the authors' names."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    state = {"cls_embedding.embedding_table.weight": tensor(7, dim), "norm.weight": 1 + tensor(dim)}
    if masked:
        state |= {"tok_embedder.weight": tensor(vocab + 1, dim), "pos_embed.weight": tensor(9, dim)}
        state |= {"mlm_layer.bias": tensor(1, 1, vocab + 1), "mlm_layer.fc.weight": tensor(dim, dim)}
        state |= {f"mlm_layer.{name}": tensor(dim) for name in ("fc.bias", "ln.weight", "ln.bias")}
    names = {"output"} if masked else {"tok_embedder", "output"}
    for name in names:
        if sub_codes == 1:
            state[f"{name}.weight"] = tensor(vocab + masked, dim)
        else:
            state |= {f"{name}.{i}.weight": tensor(vocab + masked, dim) for i in range(sub_codes)}
    if sub_codes > 1:
        state["proj.weight"] = tensor(dim, sub_codes * dim)
    for name, shape in (
        ("attention.wqkv", (3 * dim, dim)), ("attention.wo", (dim, dim)), ("attention_norm", (dim,)), ("ffn_norm", (dim,)),
        ("feed_forward.w1", (48, dim)), ("feed_forward.w3", (48, dim)), ("feed_forward.w2", (dim, 48)),
    ):  # fmt: skip
        state[f"layers.0.{name}.weight"] = tensor(*shape)
    return state


def authors_autoencoder(model: BinaryTokenizer) -> dict[str, torch.Tensor]:
    """The tensors of `model` as the authors number them, inside a training module."""
    state: dict[str, torch.Tensor] = {"disc.main.0.weight": torch.zeros(1)}

    def put(name: str, module: torch.nn.Module, names: dict[str, str] | None = None) -> None:
        for leaf, tensor in module.state_dict().items():
            part, _, kind = leaf.rpartition(".")
            part = (names or {}).get(part, part)
            tensor = tensor[..., None, None] if part in ("q", "k", "v", "proj_out") and kind == "weight" else tensor
            state[f"ae.{name}.{part + '.' if part else ''}{kind}"] = tensor

    def residual(name: str, block: Any) -> None:
        put(name, block, {"shortcut": "conv_out"})
        width = block.conv2.out_channels
        state.setdefault(f"ae.{name}.conv_out.weight", torch.zeros(width, width, 1, 1))

    attention = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}

    def coder(name: str, ours: Any, start: list[Any]) -> None:
        middle = [ours.mid_block1, ours.mid_attention, ours.mid_block2]
        inner = []
        for level in ours.levels:
            for i, block in enumerate(level.blocks):
                inner += [block, *(level.attentions[i : i + 1])]
            inner += [change for change in (level.downsample, level.upsample) if change is not None]
        blocks = inner + middle if name == "encoder" else middle + inner
        for i, block in enumerate([*start, ours.conv_in, *blocks, ours.norm_out, ours.conv_out]):
            if isinstance(block, ResidualBlock):
                residual(f"{name}.blocks.{i}", block)
            else:
                put(f"{name}.blocks.{i}", block, attention if isinstance(block, SpatialAttention) else None)

    coder("encoder", model.encoder, [])
    coder("generator", model.decoder, [model.decoder.norm_in] if model.config.norm_first else [])
    put("quantize.embed", model.quantizer.embedding)
    state["ae.quantize.proj.0.weight"] = model.quantizer.projection.weight[..., None, None]
    state["ae.quantize.proj.0.bias"] = model.quantizer.projection.bias
    return {name: tensor.detach().clone() for name, tensor in state.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_first": False, "encoder_blocks": 2, "sub_codes": 3},
        {"channel_multipliers": [1, 2, 2], "encoder_attention": [False, True, True], "decoder_attention": [True, False, False]},
        {"channel_multipliers": [1], "encoder_attention": False, "in_channels": 1, "decoder_blocks": 3},
    ],
    ids=["plain", "no first norm", "three levels", "one level"],
)
def test_autoencoders_of_any_layout_are_read(options, tmp_path):
    torch.manual_seed(6)
    settings = {"channel_multipliers": [2, 1], "encoder_blocks": 1, "decoder_blocks": 1, "bits": 6, **options}
    model = BinaryTokenizer(base_channels=8, z_channels=16, norm_groups=4, **settings).eval()
    torch.save(authors_autoencoder(model), tmp_path / "binaryae_ema.th")
    config = {"norm_groups": 4, "token_each": model.sub_codes}
    read = convert("elm", tmp_path / "binaryae_ema.th", config=config)
    pixels = torch.rand(1, settings.get("in_channels", 3), 8, 8) * 2 - 1
    codes = read.encode(pixels)
    assert torch.equal(codes.ids, model.encode(pixels).ids)
    torch.testing.assert_close(read.decode(codes), model.decode(codes))


CONFIG = {"n_head": 2, "block_size": 9}


@KINDS
@pytest.mark.parametrize("wrapped", [False, True])
def test_files_become_pipelines(sub_codes, masked, wrapped, tmp_path):
    state = authors_transformer(sub_codes, masked)
    if wrapped:  # what the trainer writes
        other = {name: tensor + 1 for name, tensor in state.items()}
        torch.save({"model": state, "ema": other, "opt": {"state": {}}}, tmp_path / "model.pth")
    else:
        torch.save(state, tmp_path / "model.pth")
    tokenizer = tiny_tokenizer(sub_codes)
    config = {"n_head": 2} if masked else CONFIG  # the stored position table tells the number of tokens
    pipe = ELMPipeline.from_single_file(tmp_path / "model.pth", tokenizer=tokenizer, config=config)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer
    assert pipe.is_masked == masked and model.sub_codes == sub_codes and model.vocab_size == 8 and model.grid == (3, 3)
    assert torch.equal(model.condition_embedding.embedding.weight, state["cls_embedding.embedding_table.weight"])
    assert pipe([1], output_type="pt").images.shape == (1, 3, 6, 6)
    if wrapped:
        average = convert("elm", tmp_path / "model.pth", config=config, use_ema=True)
        assert torch.equal(average.trunk.norm.weight, state["norm.weight"] + 1)


def test_damaged_files_are_answered(tmp_path):
    state = authors_transformer()
    cases: list[tuple[dict[str, torch.Tensor], dict[str, Any], type[Exception], str]] = [
        ({**state, "layers.0.adaLN.weight": torch.zeros(2)}, CONFIG, CheckpointKeysError, "unknown tensors.*adaLN"),
        ({k: v for k, v in state.items() if k != "proj.weight"}, CONFIG, CheckpointKeysError, "missing proj.weight"),
        ({k: v for k, v in state.items() if k != "output.1.weight"}, CONFIG, CheckpointShapeError, "2 tables.*1 heads"),
        ({k: v for k, v in state.items() if k != "tok_embedder.0.weight"}, CONFIG, CheckpointKeysError, "tok_embedder"),
        (state, {}, ValueError, "config={'num_heads': ...}"),
        (state, {**CONFIG, "token_each": 3}, CheckpointShapeError, "token_each = 3, but the tensors of the file say 2"),
        (state, {**CONFIG, "code_dim": 5}, CheckpointShapeError, "code_dim = 5, but the tensors of the file say 3"),
        (state, {**CONFIG, "pos_type": "rope1d"}, ValueError, "`pos_type` must be 'rope2d'"),
        (state, {"n_head": 2, "block_size": 8}, ValueError, "tokens of a square image"),
        (authors_transformer(1, vocab=9), CONFIG, CheckpointShapeError, "no power of two"),
        ({"weight": torch.zeros(2)}, CONFIG, CheckpointKeysError, "this is no ELM checkpoint"),
        ({"quantize.embed.weight": torch.zeros(4, 8)}, {}, CheckpointKeysError, "lacks tensors encoder.blocks"),
        ({"quantize.embed.weight": torch.zeros(4, 8)}, {"use_tanh": True}, ValueError, "`use_tanh`"),
    ]
    for damaged, config, error, says in cases:
        with pytest.raises(error, match=says):
            convert_state_dict(damaged, config=config)
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="holds a transformer, not a tokenizer"):
        ELMPipeline.from_single_file(tmp_path / "model.pth", tokenizer=tmp_path / "model.pth", config=CONFIG)


@pytest.mark.parametrize("name", armm.list_models("elm-*"))
def test_the_table_names_what_fits_together(name):
    from armm import zoo

    entry = zoo.get(name)
    if entry.task == "tokenizer":
        return
    sub_codes, bits = entry.file.removesuffix(".pth").split("-")[-2:]
    assert entry.tokenizer == f"elm-bae-{int(sub_codes) * int(bits)}"
    assert ("num_inference_steps" in entry.generation_config) == ("mlm" in name)
