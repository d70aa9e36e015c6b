"""Next-scale prediction: the multi-scale quantizer, the model, its decoding, and VAR's files and pipeline."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_var import SCALES, authors_tokenizer, authors_transformer, tiny_model, tiny_pipeline, tiny_tokenizer

import armm
from armm.convert import CheckpointError, CheckpointKeysError, CheckpointShapeError, convert
from armm.convert.var import PUBLISHED_SCALES, convert_state_dict, load_single_file, scales_of
from armm.decoding import Guidance, NextScaleDecoding, Sampler, scale_masks, top_p_filter
from tokenizers_visual import Codes, MultiScaleQuantizer
from tokenizers_visual.multi_scale import refiner_index


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---------------------------------------------------------------------- quantizer and tokenizer

SCALE_LISTS = st.sets(st.integers(1, 7), min_size=1, max_size=5).map(lambda sides: tuple(sorted(sides)))


@settings(max_examples=15, deadline=None)
@given(SCALE_LISTS, st.sampled_from([0, 1, 2, 4]), st.sampled_from([0.0, 0.5]), st.booleans())
def test_scale_by_scale_equals_all_at_once(scales, shared, ratio, cosine):
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(12, 3, scales, ratio, shared, cosine)
    torch.nn.init.normal_(quantizer.codes.embedding.weight)
    features = torch.randn(2, 3, scales[-1], scales[-1])
    ids = quantizer.encode(features)
    assert ids.shape == (2, sum(side * side for side in scales)) and ids.dtype == torch.int64
    total, inputs, rest, start = quantizer.empty(2), [], features, 0
    for step, side in enumerate(scales):
        if step:
            inputs.append(quantizer.next_input(total, step))
        part = ids[:, start : start + side * side]
        pooled = F.adaptive_avg_pool2d(rest, side).flatten(2).transpose(1, 2)
        assert torch.equal(part, quantizer.nearest(pooled))
        before, total = total, quantizer.accumulate(total, part, step)
        torch.testing.assert_close(total, quantizer.accumulate(before, quantizer.lookup(part), step))
        rest, start = rest - (total - before), start + side * side
        torch.testing.assert_close(quantizer.decode(ids, num_scales=step + 1), total)
    torch.testing.assert_close(quantizer.decode(ids), total)
    assert quantizer.inputs(ids).shape == (2, ids.shape[1] - scales[0] ** 2, 3)
    if inputs:
        torch.testing.assert_close(quantizer.inputs(ids), torch.cat(inputs, dim=1))


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 14])
def test_convolutions_are_shared_by_the_nearest_tick(steps):
    assert [refiner_index(step, steps, 1) for step in range(steps)] == [0] * steps
    assert [refiner_index(step, steps, steps) for step in range(steps)] == list(range(steps))
    found = [refiner_index(step, steps, 4) for step in range(steps)]
    assert found == sorted(found) and set(found) <= set(range(4))


def test_round_trip_and_partial_decoding(tokenizer):
    pixels = torch.rand(3, 3, 8, 8) * 2 - 1
    codes = tokenizer.encode(pixels)
    assert codes.scales == SCALES and codes.grid is None and codes.num_tokens == 30
    for i in range(3):
        assert torch.equal(tokenizer.encode(pixels[i : i + 1]).ids[0], codes.ids[i])
    assert tokenizer.decode(codes).shape == pixels.shape and tokenizer.embed(codes).shape == (3, 30, 4)
    partial = [tokenizer.decode(codes, num_scales=count) for count in (1, 2, 3, 4)]
    assert all(image.shape == pixels.shape for image in partial) and not torch.allclose(partial[0], partial[1])
    assert torch.equal(partial[3], tokenizer.decode(codes))
    other = tokenizer.encode(torch.rand(1, 3, 12, 12), scales=[1, 3, 6])
    assert other.scales == (1, 3, 6) and tokenizer.decode(other).shape == (1, 3, 12, 12)


def test_training_gives_gradients_to_everything():
    model = tiny_tokenizer(shared_refiners=2).train()
    with torch.enable_grad():
        pixels = torch.rand(2, 3, 8, 8) * 2 - 1
        restored, quantized = model(pixels)
        (F.mse_loss(restored, pixels) + quantized.codebook_loss + quantized.commitment_loss).backward()
    torch.testing.assert_close(restored, model.decode(Codes(ids=quantized.ids, scales=SCALES)), atol=1e-4, rtol=1e-4)
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_clear_errors_of_the_tokenizer(tokenizer):
    for arguments, match in (
        ({"scales": [2, 1]}, "growing positive integers"),
        ({"scales": []}, "growing positive integers"),
        ({"residual_ratio": 2.0}, "residual_ratio"),
        ({"shared_refiners": -1}, "shared_refiners"),
        ({"quant_kernel": 2}, "quant_kernel"),
        ({"norm_groups": 3}, "norm_groups"),
    ):
        with pytest.raises(ValueError, match=match):
            tiny_tokenizer(**arguments)
    with pytest.raises(ValueError, match="those of 8x8"):
        tokenizer.encode(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="side of the feature map"):
        tokenizer.quantizer.encode(torch.zeros(1, 4, 3, 3))
    with pytest.raises(ValueError, match="do not fill"):
        tokenizer.quantizer.decode(torch.zeros(1, 7, dtype=torch.long))
    codes = tokenizer.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="num_scales"):
        tokenizer.decode(codes, num_scales=5)
    with pytest.raises(ValueError, match="`scales` of their token maps"):
        tokenizer.decode(Codes(ids=codes.ids))
    with pytest.raises(ValueError, match="hold 5 tokens, but the codes have 30"):
        Codes(ids=codes.ids, scales=(1, 2))
    with pytest.raises(ValueError, match="not both"):
        Codes(ids=codes.ids, scales=SCALES, grid=(1, 5, 6))
    with pytest.raises(ValueError, match="another tokenizer"):
        tokenizer.decode(Codes(ids=codes.ids + 24, scales=SCALES))


# ---------------------------------------------------------------------- model and decoding


@pytest.mark.parametrize(
    ("scales", "options"),
    [
        (SCALES, {}),
        (SCALES, {"modulation": "shared"}),
        ((2, 3), {"qk_norm": None, "attention_scale": 0.1}),
        ((3,), {"modulation": "shared", "num_kv_heads": 1}),
    ],
)
def test_cached_logits_equal_teacher_forced_ones(scales, options):
    model, quantizer = tiny_model(scales, **options), tiny_tokenizer(scales=scales).quantizer
    condition, null = model.condition(torch.tensor([3, 10])), model.null_condition(2)
    arguments = {"sampler": Sampler(do_sample=False), "record_logits": True}
    plain = NextScaleDecoding()(model, quantizer, condition, **arguments)
    torch.testing.assert_close(model(quantizer.inputs(plain.ids), condition), plain.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(plain.features, quantizer.decode(plain.ids))
    assert plain.num_calls == plain.steps == NextScaleDecoding().num_calls(scales) == len(scales)

    guided = NextScaleDecoding()(model, quantizer, condition, null, guidance=Guidance(3.5, "linear"), **arguments)
    inputs = quantizer.inputs(guided.ids)
    steps = torch.cat([torch.full((side * side,), float(step)) for step, side in enumerate(scales)])
    t = 2.5 * (steps / (len(scales) - 1) if len(scales) > 1 else steps + 1)[None, :, None]
    expected = (1 + t) * model(inputs, condition) - t * model(inputs, null)
    torch.testing.assert_close(expected, guided.logits, atol=1e-4, rtol=0)


def test_a_token_sees_its_scale_and_those_before():
    model = tiny_model()
    inputs, condition = torch.randn(1, 29, 4), model.condition(torch.tensor([1]))
    base = model(inputs, condition)
    ends = [1, 5, 14, 30]
    for changed in range(29):
        other = inputs.clone()
        other[:, changed] += 1
        differs = (model(other, condition) - base).abs().amax(-1)[0] > 1e-6
        scale = next(k for k, end in enumerate(ends) if changed + 1 < end)
        assert differs.tolist() == [position >= ends[scale - 1] for position in range(30)]
    torch.testing.assert_close(model(inputs[:, :13], condition), base[:, :14])


def test_fused_heads_and_narrowed_guidance_change_nothing():
    model, quantizer = tiny_model(), tiny_tokenizer().quantizer
    condition, null = model.condition(torch.tensor([3, 4])), model.null_condition(2)
    arguments = {"sampler": Sampler(do_sample=False), "guidance": Guidance(2.0, "linear", interval=0)}
    output = NextScaleDecoding()(model, quantizer, condition, null, record_logits=True, **arguments)
    plain = model(quantizer.inputs(output.ids), condition)
    torch.testing.assert_close(output.logits[:, 5:], plain[:, 5:], atol=1e-4, rtol=0)
    model.fuse_projections()
    assert torch.equal(NextScaleDecoding()(model, quantizer, condition, null, **arguments).ids, output.ids)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 0.99), st.integers(0, 6))
def test_top_p_from_the_tail_against_its_definition(seed, p, hidden):
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed))
    logits[:hidden] = float("-inf")
    kept = top_p_filter(logits, p, from_tail=True).isfinite()
    ascending = sorted(range(9), key=lambda i: float(logits[i]))
    total, probabilities = torch.zeros(()), logits.softmax(-1)
    for place, i in enumerate(ascending):
        total = total + probabilities[i]
        if abs(float(total) - (1 - p)) > 1e-5:
            assert bool(kept[i]) == (float(total) > 1 - p or place == 8)
    assert torch.equal(kept, top_p_filter(logits, p).isfinite())  # the ends agree where nothing is on the edge


def test_given_ids_are_used_and_kept():
    model, quantizer = tiny_model(), tiny_tokenizer().quantizer
    condition = model.condition(torch.tensor([3, 4]))
    known = torch.randint(24, (2, 30), generator=generators(0)[0])
    everything = torch.ones(2, 30, dtype=torch.bool)
    output = NextScaleDecoding()(model, quantizer, condition, noise=generators(0)[0], known_ids=known, known_mask=everything)
    assert torch.equal(output.ids, known)
    torch.testing.assert_close(output.features, quantizer.decode(known))
    some = torch.rand(2, 30, generator=generators(1)[0]) < 0.5
    output = NextScaleDecoding()(model, quantizer, condition, noise=generators(0)[0], known_ids=known, known_mask=some)
    assert torch.equal(output.ids[some], known[some]) and not torch.equal(output.ids, known)
    torch.testing.assert_close(output.features, quantizer.decode(output.ids))


def test_smooth_sampling_averages_codes():
    model, quantizer = tiny_model(), tiny_tokenizer().quantizer
    condition = model.condition(torch.tensor([3, 4]))
    noise = torch.empty(2, 30, 24).exponential_(generator=generators(0)[0])
    sampler = Sampler(top_k=5, top_p=0.9, top_p_from_tail=True)
    hard = NextScaleDecoding()(model, quantizer, condition, sampler=sampler, noise=noise)
    soft = NextScaleDecoding()(model, quantizer, condition, sampler=sampler, noise=noise, smooth=True)
    assert torch.equal(hard.ids[:, :1], soft.ids[:, :1]) and not torch.allclose(hard.features, soft.features)
    cold = NextScaleDecoding(smooth_temperature=1e-4, smooth_floor=1e-4)
    parts: list[torch.Tensor] = []
    cold(model, quantizer, condition, sampler=sampler, noise=noise, smooth=True, callback=lambda *a: parts.append(a[2]))
    torch.testing.assert_close(parts[0], quantizer.decode(hard.ids, num_scales=1))


def test_callbacks_see_replace_and_interrupt():
    model, quantizer = tiny_model(), tiny_tokenizer().quantizer
    condition = model.condition(torch.tensor([3]))
    seen: list[tuple[int, int]] = []

    def callback(step, ids, features):
        seen.append((step, ids.shape[1]))
        torch.testing.assert_close(features, quantizer.decode(ids))
        return torch.full_like(ids, 7) if step == 1 else None

    output = NextScaleDecoding()(
        model, quantizer, condition, noise=generators(0)[0], callback=callback, interrupt=lambda: len(seen) == 3
    )
    assert seen == [(0, 1), (1, 5), (2, 14)] and output.steps == output.num_calls == 3
    assert output.ids[0, :5].tolist()[1:] == [7] * 4 and not output.ids[0, 14:].any()


def test_masks_of_all_scales():
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:, :2] = True
    parts = scale_masks(keep, SCALES)[0].split([1, 4, 9, 16])
    assert parts[0].all()  # the first scale is kept whole
    assert parts[1].tolist() == [True, False] * 2 and parts[2].tolist() == [True, False, False] * 3
    assert torch.equal(parts[3].view(4, 4), keep)
    assert scale_masks(torch.rand(3, 5, 5), SCALES).shape == (3, 30)


def test_clear_errors_of_model_and_decoding():
    model, quantizer = tiny_model(), tiny_tokenizer().quantizer
    condition, decode = model.condition(torch.tensor([3])), NextScaleDecoding()
    for call, match in (
        (lambda: model.condition(torch.tensor([11])), "labels must lie in 0 .. 9"),
        (lambda: model.condition(torch.tensor([0.5])), "vector of integers"),
        (lambda: model(torch.zeros(1, 7, 4), condition), r"one of \[0, 4, 13, 29\] tokens"),
        (lambda: model(torch.zeros(2, 4, 4), condition), "condition must be"),
        (lambda: tiny_model((0, 1)), "scales must be positive"),
        (lambda: tiny_model(learned_positions=7), "learned_positions=7, but scales"),
        (lambda: tiny_model(final_norm=True), "final_norm=False"),
        (lambda: decode(model, quantizer, condition, guidance=Guidance(2.0)), "needs a null_condition"),
        (lambda: decode(model, quantizer, condition, smooth=True, sampler=Sampler(do_sample=False)), "needs noise"),
        (lambda: decode(model, quantizer, condition[:, :3]), "condition must be"),
        (lambda: decode(model, MultiScaleQuantizer(8, 4, SCALES), condition), "do not belong together"),
        (lambda: decode(model, quantizer, condition, known_ids=torch.zeros(1, 30).long()), "give both"),
        (lambda: decode(model, quantizer, condition, noise=torch.ones(1, 30, 5)), "recorded noise must be"),
        (lambda: NextScaleDecoding(smooth_floor=0.0), "smooth_floor"),
        (lambda: scale_masks(torch.zeros(3), SCALES), "keep must be"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


# ---------------------------------------------------------------------- pipeline


def test_an_image_does_not_depend_on_its_batch(pipe):
    together = pipe([3, 5, 3], generator=generators(0, 1, 2), output_type="latent").images
    assert together.shape == (3, 30) and not torch.equal(together[0], together[2])
    for row, (label, seed) in enumerate(((3, 0), (5, 1), (3, 2))):
        assert torch.equal(pipe(label, generator=generators(seed), output_type="latent").images[0], together[row])
    double = pipe([3], num_images_per_prompt=2, generator=generators(0, 2), output_type="latent").images
    assert torch.equal(double, together[[0, 2]])


def test_pipelines_are_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "var")
    for load in (armm.pipeline, armm.VARPipeline.from_pretrained):
        loaded = load(tmp_path / "var")
        loaded.set_progress_bar_config(disable=True)
        assert loaded.generation_config == pipe.generation_config and type(loaded.decoding) is NextScaleDecoding
        images = [p([3, -1], generator=generators(0, 1), output_type="pt").images for p in (pipe, loaded)]
        assert torch.equal(*images) and images[0].shape == (2, 3, 8, 8)


def test_outputs_settings_and_callbacks(pipe):
    out = pipe(3, generator=generators(0), output_codes=True)
    assert out.images[0].size == (8, 8) and out.codes.scales == SCALES
    again = pipe.tokenizer.decode(out.codes)
    images, codes = pipe(3, generator=generators(0), output_type="pt", output_codes=True, return_dict=False)
    torch.testing.assert_close(images, again.add(1).div(2).clamp(0, 1), atol=1e-5, rtol=0)
    assert torch.equal(codes.ids, out.codes.ids)
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((pipe.num_timesteps, tensors["latents"].shape[1], tensors["features"].shape))
        assert pipe.tokenizer.decode_features(tensors["features"]).shape == (1, 3, 8, 8)
        pipe._interrupt = step == 1
        return {}

    pipe(3, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents", "features"])
    assert seen == [(4, 1, (1, 4, 4, 4)), (4, 5, (1, 4, 4, 4))]
    smooth = pipe(3, generator=generators(0), output_type="pt", more_smooth=True).images
    assert not torch.allclose(smooth, images)


def test_masked_editing(pipe):
    image = torch.rand(3, 8, 8)
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    before = pipe.tokenizer.encode(image[None] * 2 - 1).ids
    keep = scale_masks(1 - mask[::2, ::2], SCALES)
    out = pipe(image=image, mask_image=mask, generator=generators(0), output_codes=True)
    assert (out.codes.ids[keep] == before[keep]).float().mean() > 0.9  # the image passes through 8 bits
    assert not torch.equal(out.codes.ids, before)
    several = pipe([3, 4], image=image, mask_image=mask, generator=generators(0, 1), output_type="latent").images
    assert several.shape == (2, 30) and torch.equal(several[0][keep[0]], out.codes.ids[0][keep[0]])


def test_clear_errors_of_the_pipeline(pipe):
    image, mask = torch.rand(3, 8, 8), torch.ones(8, 8)
    for arguments, error, match in (
        ({}, ValueError, "give `class_labels`"),
        ({"class_labels": 10}, ValueError, "between 0 and 9"),
        ({"class_labels": "red fox"}, ValueError, "this checkpoint has 10"),
        ({"class_labels": []}, ValueError, "is empty"),
        ({"class_labels": 3.5}, TypeError, "class numbers or names"),
        ({"class_labels": 3, "image": image}, ValueError, "both `image` and `mask_image`"),
        ({"class_labels": 3, "mask_image": mask}, ValueError, "both `image` and `mask_image`"),
        ({"class_labels": [3, 4], "image": [image] * 3, "mask_image": mask}, ValueError, "one for all or one for each"),
        ({"image": image, "mask_image": mask * 0}, ValueError, "masks nothing"),
        ({"image": image, "mask_image": mask, "latents": torch.zeros(1, 30).long()}, ValueError, "not both"),
        ({"class_labels": 3, "latents": torch.zeros(1, 7).long()}, ValueError, r"must be \[1, 30\]"),
        ({"class_labels": 3, "guidance_scale": -1}, ValueError, "guidance_scale"),
        ({"class_labels": 3, "more_smooth": True, "do_sample": False}, ValueError, "do_sample"),
        ({"class_labels": 3, "noise": torch.ones(1, 3, 3)}, ValueError, "`noise` must be"),
        ({"class_labels": 3, "output_type": "jpeg"}, ValueError, "output_type"),
        ({"class_labels": 3, "generator": generators(0, 1)}, ValueError, "one for each image"),
    ):
        with pytest.raises(error, match=match):
            pipe(**arguments)
    with pytest.raises(ValueError, match="generation_config"):
        tiny_pipeline(guidance=3)


# ---------------------------------------------------------------------- the authors' files


def reference_logits(state: dict, inputs: torch.Tensor, label: int, heads: int, layers: int) -> torch.Tensor:
    """The published equations for one sequence, [M, C] -> [L, V]."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    condition, level = state["class_emb.weight"][label], state["lvl_1L"][0]
    length, dim = len(level), len(condition)
    x = torch.cat([condition + state["pos_start"][0], linear("word_embed", inputs)])
    x = x + state["pos_1LC"][0] + state["lvl_embed.weight"][level]
    hidden = (level[:, None] < level[None, :])[None]
    for i in range(layers):
        block = f"blocks.{i}."
        if block + "ada_gss" in state:
            six = linear("shared_ada_lin.1", F.silu(condition)).view(6, dim) + state[block + "ada_gss"][0, 0]
        else:
            six = linear(block + "ada_lin.1", F.silu(condition)).view(6, dim)
        gate1, gate2, scale1, scale2, shift1, shift2 = six
        h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale1) + shift1
        bias = torch.cat([state[block + f"attn.{name}_bias"] for name in ("q", "zero_k", "v")])
        q, k, v = (h @ state[block + "attn.mat_qkv.weight"].T + bias).view(length, 3, heads, -1).permute(1, 2, 0, 3)
        if block + "attn.scale_mul_1H11" in state:
            q = F.normalize(q, dim=-1) * state[block + "attn.scale_mul_1H11"][0].clamp(max=torch.tensor(100.0).log()).exp()
            scores = q @ F.normalize(k, dim=-1).transpose(1, 2)
        else:
            scores = q @ k.transpose(1, 2) * 0.25 / (dim // heads) ** 0.5
        attended = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        x = x + gate1 * linear(block + "attn.proj", attended.transpose(0, 1).reshape(length, dim))
        h = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale2) + shift2
        x = x + gate2 * linear(block + "ffn.fc2", F.gelu(linear(block + "ffn.fc1", h), approximate="tanh"))
    scale, shift = linear("head_nm.ada_lin.1", F.silu(condition)).view(2, dim)
    return linear("head", F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("l2", [True, False])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("scales", [(1, 2, 3), (2, 3)])
def test_any_transformer_follows_the_published_equations(scales, shared, l2):
    state = authors_transformer(scales=scales, shared=shared, l2=l2)
    model = convert_state_dict(state, config=None if l2 else {"num_heads": 3})
    inputs = torch.randn(2, sum(side * side for side in scales[1:]), 5)
    ours = model(inputs, model.condition(torch.tensor([4, 7])))
    for row, label in enumerate((4, 7)):
        expected = reference_logits(state, inputs[row], label, heads=3, layers=2)
        assert (ours[row] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shared", [0, 1, 3, 4])
def test_tokenizers_are_converted_whatever_they_share(shared):
    tokenizer = tiny_tokenizer(base_channels=32, norm_groups=32, shared_refiners=shared, quant_kernel=1)
    state = authors_tokenizer(tokenizer)
    found = convert_state_dict(state, config={"v_patch_nums": SCALES, "ch": 32})
    assert found.config.shared_refiners == shared and found.config.quant_kernel == 1
    ours, theirs = tokenizer.state_dict(), found.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match="sizes of its 4 token maps: pass config"):
        convert_state_dict(state)


def test_trainers_files_hold_both(tmp_path):
    scales = (1, 2, 3)
    tokenizer = tiny_tokenizer(base_channels=32, norm_groups=32, scales=scales, latent_channels=5, codebook_size=20)
    trainer = {
        "config": {"patch_nums": scales},
        "var_wo_ddp": {f"_orig_mod.{name}": value for name, value in authors_transformer().items()},
        "vae_local": authors_tokenizer(tokenizer),
        "var_opt": {"optimizer": {"state": {}, "param_groups": []}, "scaler": None},
    }
    torch.save({"epoch": 3, "iter": 0, "trainer": trainer, "args": {"depth": 2}}, tmp_path / "ar-ckpt-last.pth")
    model = convert("var", tmp_path / "ar-ckpt-last.pth")
    assert model.scales == scales
    pipe = armm.VARPipeline.from_single_file(tmp_path / "ar-ckpt-last.pth")
    pipe.set_progress_bar_config(disable=True)
    assert pipe.tokenizer.scales == scales and pipe.generation_config["top_k"] == 900
    torch.save(authors_transformer(), tmp_path / "var_d2.pth")
    torch.save(authors_tokenizer(tokenizer), tmp_path / "vae.pth")
    plain = armm.VARPipeline.from_single_file(tmp_path / "var_d2.pth", tokenizer=tmp_path / "vae.pth", use_ema=False)
    plain.set_progress_bar_config(disable=True)
    images = [p(3, generator=generators(0), output_type="pt").images for p in (pipe, plain)]
    assert torch.equal(*images) and images[0].shape == (1, 3, 6, 6)
    with pytest.raises(ValueError, match="holds no tokenizer: pass the tokenizer's file"):
        load_single_file(tmp_path / "var_d2.pth")
    with pytest.raises(ValueError, match="holds a tokenizer, not a transformer"):
        load_single_file(tmp_path / "vae.pth", tokenizer=tmp_path / "vae.pth")


def test_scales_are_found_or_asked_for():
    for scales in PUBLISHED_SCALES:
        tokens = sum(side * side for side in scales)
        tables = {"lvl_embed.weight": torch.zeros(len(scales), 2), "pos_1LC": torch.zeros(1, tokens, 2)}
        assert scales_of(tables, {}) == scales
        levels = torch.cat([torch.full((side * side,), k) for k, side in enumerate(scales)])
        assert scales_of({**tables, "lvl_1L": levels[None]}, {}) == scales
    state = authors_transformer()
    state.pop("lvl_1L")
    with pytest.raises(ValueError, match="3 token maps with 14 tokens: pass config"):
        convert_state_dict(state)
    assert convert_state_dict(state, config={"patch_nums": [1, 2, 3]}).scales == (1, 2, 3)
    with pytest.raises(ValueError, match="growing"):
        convert_state_dict(state, config={"patch_nums": [3, 2, 1]})
    with pytest.raises(CheckpointShapeError, match="lvl_1L counts"):
        convert_state_dict({**state, "lvl_1L": torch.zeros(1, 14, dtype=torch.long)})


def test_errors_name_the_authors_tensors():
    state = authors_transformer()
    for name in ("blocks.1.attn.q_bias", "head_nm.ada_lin.1.bias", "pos_start"):
        with pytest.raises(CheckpointKeysError) as error:
            convert_state_dict({key: value for key, value in state.items() if key != name})
        assert error.value.missing == [name]
    with pytest.raises(CheckpointKeysError, match="blocks.0.attn.surprise"):
        convert_state_dict({**state, "blocks.0.attn.surprise": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="no VAR checkpoint"):
        convert_state_dict({"something.weight": torch.zeros(1)})
    with pytest.raises(CheckpointShapeError, match="mat_qkv.weight.*expected 72 rows"):
        convert_state_dict({**state, "blocks.0.attn.mat_qkv.weight": torch.zeros(70, 24)})
    with pytest.raises(CheckpointShapeError, match="num_layers = 3, but the tensors of the file say 2"):
        convert_state_dict(state, config={"depth": 3})
    with pytest.raises(ValueError, match="unknown `config` options"):
        convert_state_dict(state, config={"deep": 3})
    with pytest.raises(ValueError, match="pass config={'num_heads'"):
        convert_state_dict(authors_transformer(l2=False))
    tokenizer = authors_tokenizer(tiny_tokenizer(base_channels=32, norm_groups=32))
    missing = "decoder.up.0.block.1.conv2.bias"
    with pytest.raises(CheckpointKeysError) as error:
        convert_state_dict({k: v for k, v in tokenizer.items() if k != missing}, config={"patch_nums": SCALES})
    assert error.value.missing == [missing]
