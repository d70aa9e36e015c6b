"""SEED's and LaVIT's tokenizers and what they are made of, on tiny random models."""

from __future__ import annotations

import pytest
import tiny_semantic as tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.convert import CheckpointKeysError, CheckpointShapeError, convert, eva
from armm.convert.lavit_tokenizer import convert_tokenizer
from armm.nn import attention, causal_key_mask, key_mask, record_attention, smoothed_weights
from armm.nn.block import Block, BlockConfig
from tokenizers_visual import Codes, LaVITDecoder, LaVITTokenizer, QueryTransformer, SEEDTokenizer, lavit_losses
from tokenizers_visual.quantizers import MovingAverageCodebook
from tokenizers_visual.token_selection import TokenSelector, gather_kept


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def pixels(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------- attention and blocks


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), queries=st.integers(1, 4), keys=st.integers(1, 5), causal=st.booleans())
def test_smoothed_attention_is_the_published_formula(seed, queries, keys, causal):
    keys = max(keys, queries)
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, n, 3) for n in (queries, keys, keys))
    mask, eps = torch.rand(1, 1, queries, keys) < 0.5, 1e-2
    found = attention(query, key, value, mask=mask, causal=causal, smoothing=eps)
    for head in range(2):
        for i in range(queries):
            logits = [float(query[0, head, i] @ key[0, head, j]) / 3**0.5 for j in range(keys)]
            seen = [bool(mask[0, 0, i, j]) and (not causal or j <= i + keys - queries) for j in range(keys)]
            weights = [
                torch.tensor(logit - max(logits)).exp().item() * see for logit, see in zip(logits, seen, strict=True)
            ]
            weights = [(weight + eps / keys) / (sum(weights) + eps) for weight in weights]
            expected = sum(weight * value[0, head, j] for j, weight in enumerate(weights))
            torch.testing.assert_close(found[0, head, i], expected, atol=1e-5, rtol=0)


def test_smoothed_attention_approaches_the_masked_one_and_wants_a_boolean_mask():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 4, 8) for _ in range(3))
    mask = torch.eye(4, dtype=torch.bool) | (torch.rand(4, 4) < 0.5)
    plain = attention(query, key, value, mask=mask)
    torch.testing.assert_close(attention(query, key, value, mask=mask, smoothing=1e-9), plain, atol=1e-4, rtol=0)
    nothing = smoothed_weights(query, key, torch.zeros(4, 4, dtype=torch.bool), 1e-6)
    torch.testing.assert_close(nothing, torch.full_like(nothing, 0.25))
    with record_attention() as record:
        attention(query, key, value, mask=mask, smoothing=1e-3, layer=3)
    torch.testing.assert_close(record[3][0].sum(-1), torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match="boolean mask"):
        attention(query, key, value, mask=torch.zeros(4, 4), smoothing=1e-6)


@torch.enable_grad()
@pytest.mark.parametrize("kind", [key_mask, causal_key_mask])
def test_weights_of_keys_are_a_mask_with_gradients(kind):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 4, 8, dtype=torch.float64) for _ in range(3))
    seen = torch.tensor([[True, False, True, True], [False, False, True, False]])
    weights = seen.float().requires_grad_()
    mask = kind(weights)
    assert torch.equal(mask.bool(), kind(seen))
    found = attention(query, key, value, mask=mask, smoothing=1e-3)
    assert torch.equal(found, attention(query, key, value, mask=kind(seen), smoothing=1e-3))
    target = torch.randn_like(found)
    (found * target).sum().backward()
    for row, column in ((0, 1), (0, 3), (1, 2)):  # the slope is what a small change of the weight makes
        moved = []
        for step in (-1e-2, 1e-2):
            other = weights.detach().clone()
            other[row, column] += step
            made = attention(query, key, value, mask=kind(other.requires_grad_()), smoothing=1e-3)
            moved.append((made * target).sum().item())
        torch.testing.assert_close(float(weights.grad[row, column]), (moved[1] - moved[0]) / 2e-2, atol=2e-2, rtol=2e-2)


def test_a_block_with_norms_behind_the_residual_sums():
    torch.manual_seed(0)
    options = {
        "dim": 8,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 4,
        "mlp": "gelu",
        "mlp_hidden": 12,
        "norm": "layer",
    }
    block = Block(BlockConfig(**options, norm_placement="residual", context_dim=6, normalize_context=False)).eval()
    x, context = torch.randn(1, 3, 8), torch.randn(1, 4, 6)
    seen = torch.tensor([True, False, True, True])
    h = block.attention_norm(x + block.attention(x, None, None, True, None, 0, 0, None))
    crossed = block.cross_attention(h, None, None, False, None, 0, 0, None, context[:, seen])
    h = block.cross_norm(h + crossed)
    expected = block.mlp_norm(h + block.mlp(h))
    torch.testing.assert_close(block(x, causal=True, context=context, context_mask=seen.view(1, 1, 1, 4)), expected)
    assert not block.fuse()
    with pytest.raises(ValueError, match="norm_placement"):
        Block(BlockConfig(**options, norm_placement="behind"))
    with pytest.raises(ValueError, match="no modulation"):
        Block(BlockConfig(**options, norm_placement="residual", modulation="block", modulation_dim=8))


def test_queries_see_what_they_may():
    model = tiny.randomised(QueryTransformer(8, 2, 2, context_dim=6, num_queries=4, causal=True, cross_layers=[1]), 0)
    context = torch.randn(2, 5, 6)
    found = model(context)
    assert found.shape == (2, 4, 8) and model.blocks[0].cross_attention is None
    queries = model.queries.expand(2, -1, -1)
    torch.testing.assert_close(model(context, queries[:, :3]), found[:, :3], atol=1e-5, rtol=0)  # causal
    torch.testing.assert_close(model(context[:1]), found[:1], atol=1e-5, rtol=0)
    mask = torch.tensor([True, True, False, True, False]).view(1, 1, 1, 5)
    torch.testing.assert_close(model(context, context_mask=mask), model(context[:, [0, 1, 3]]), atol=1e-5, rtol=0)


def test_query_transformers_say_what_is_wrong():
    with pytest.raises(ValueError, match="heads divide"):
        QueryTransformer(9, 1, 2)
    with pytest.raises(ValueError, match="cross_layers"):
        QueryTransformer(8, 2, 2, cross_layers=[2])
    with pytest.raises(ValueError, match="norm_placement"):
        QueryTransformer(8, 2, 2, norm_placement="output")
    with pytest.raises(ValueError, match="num_queries"):
        QueryTransformer(8, 2, 2, num_queries=-1)
    model = QueryTransformer(8, 1, 2, context_dim=6)
    with pytest.raises(ValueError, match="no learned queries"):
        model(torch.randn(1, 2, 6))
    with pytest.raises(ValueError, match="`context` must be"):
        model(torch.randn(1, 2, 8), torch.randn(1, 2, 8))
    with pytest.raises(ValueError, match="`queries` must be"):
        model(torch.randn(1, 2, 6), torch.randn(2, 2, 8))


# ---------------------------------------------------------------------- selection


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.lists(st.booleans(), min_size=6, max_size=6).filter(any), min_size=1, max_size=4))
def test_kept_tokens_are_gathered_in_order(rows):
    keep = torch.tensor(rows)
    tokens = torch.arange(keep.numel() * 2, dtype=torch.float32).view(*keep.shape, 2) + 1
    found, mask = gather_kept(tokens, keep)
    assert found.shape[1] == max(sum(row) for row in rows)
    for number, row in enumerate(rows):
        torch.testing.assert_close(found[number, mask[number]], tokens[number][torch.tensor(row)])
        assert not found[number, ~mask[number]].any() and int(mask[number].sum()) == sum(row)


def test_decisions_keep_at_least_one_token():
    log_probs = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.1, 0.9]]).log().expand(2, 3, 2).clone()
    log_probs[1, 2] = torch.tensor([0.5, 0.5]).log()  # equally likely: kept
    assert TokenSelector.decide(log_probs).tolist() == [[False, True, False], [False, False, True]]
    noise = torch.zeros(2, 3, 2)
    noise[0, 0, 0] = 9.0
    assert TokenSelector.decide(log_probs, noise).tolist() == [[True, False, False], [False, False, True]]


@torch.enable_grad()
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.floats(0.3, 3.0))
def test_relaxed_decisions_are_decisions_with_the_gradient_of_a_softmax(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(2, 5, 2, generator=generator).log_softmax(-1).requires_grad_()
    noise = torch.randn(2, 5, 2, generator=generator)
    weights = torch.randn(2, 5, generator=generator)
    relaxed = TokenSelector.relax(log_probs, noise, temperature)
    assert torch.equal(relaxed, TokenSelector.decide(log_probs, noise).float())
    (slope,) = torch.autograd.grad((relaxed * weights).sum(), log_probs)
    for row in range(2):
        for token in range(5):
            margin = (log_probs + noise)[row, token].detach()
            p = torch.sigmoid((margin[0] - margin[1]) / temperature)
            expected = weights[row, token] * p * (1 - p) / temperature
            torch.testing.assert_close(slope[row, token], torch.stack([expected, -expected]), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="`temperature` must be"):
        TokenSelector.relax(log_probs, temperature=0.0)


# ---------------------------------------------------------------------- SEED


def test_seed_codes_are_ordered_and_placeless():
    model = tiny.seed_tokenizer()
    codes = model.encode(pixels())
    assert codes.ids.shape == (2, 5) and codes.grid is None and codes.mask is None and model.reads == "ids"
    assert torch.equal(model.encode(pixels()[1:]).ids, codes.ids[1:])
    features, mask = model.reading_features(pixels())
    assert mask is None
    distances = (model.quant_proj(features)[:, :, None] - model.quantizer.embedding.weight).square().sum(-1)
    assert torch.equal(distances.argmin(-1), codes.ids)
    torch.testing.assert_close(model.embed(codes), model.quantizer.embedding.weight[codes.ids])
    assert model.condition(codes).embeds is None
    torch.testing.assert_close(model.condition(codes).pooled, model(pixels())[0])
    assert (model.codebook_size, model.latent_channels, model.downsample, model.is_discrete) == (tiny.CODES, 4, 4, True)


@pytest.mark.parametrize("head", ["flatten", "query"])
def test_seed_embeddings_depend_on_every_code(head):
    model = tiny.seed_tokenizer(head=head)
    ids = torch.randint(0, tiny.CODES, (1, 5))
    whole = model.condition(Codes(ids=ids)).pooled
    assert whole.shape == (1, 8)
    for place in range(5):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % tiny.CODES
        assert (model.condition(Codes(ids=changed)).pooled - whole).abs().max() > 1e-5


def test_seed_says_what_is_wrong():
    model = tiny.seed_tokenizer()
    with pytest.raises(ValueError, match="resize the images to 8x8"):
        model.encode(torch.zeros(1, 3, 8, 16))
    with pytest.raises(ValueError, match="exactly 5 ids"):
        model.condition(Codes(ids=torch.zeros(1, 4, dtype=torch.long)))
    with pytest.raises(ValueError, match="codebook of this tokenizer"):
        model.embed(Codes(ids=torch.full((1, 5), tiny.CODES)))
    with pytest.raises(ValueError, match="no decoder to pixels"):
        model.decode(model.encode(pixels()))
    with pytest.raises(ValueError, match="`head` must be"):
        tiny.seed_tokenizer(head="mean")
    with pytest.raises(ValueError, match="`reduction` is empty"):
        tiny.seed_tokenizer(reduction=())


# ---------------------------------------------------------------------- LaVIT


def test_lavit_codes_are_as_many_as_an_image_needs():
    model = tiny.lavit_tokenizer()
    codes = model.encode(pixels(4))
    numbers = codes.mask.sum(1)
    assert (
        codes.grid is None and numbers.min() >= 1 and int(numbers.max()) == codes.num_tokens <= model.max_tokens == 16
    )
    assert not codes.ids[~codes.mask].any()
    for row in range(4):
        alone = model.encode(pixels(4)[row : row + 1])
        assert torch.equal(alone.ids[0], codes.ids[row, codes.mask[row]]) and bool(alone.mask.all())
    features, mask = model.reading_features(pixels(4))
    assert torch.equal(mask, codes.mask) and features.shape[-1] == tiny.DIM and not features[~mask].any()


def test_lavit_draws_what_is_kept_for_each_image_alone():
    model = tiny.lavit_tokenizer()
    made = [model.encode(pixels(3), sample=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0].ids, made[1].ids)
    assert made[0].ids.shape != made[2].ids.shape or not torch.equal(made[0].mask, made[2].mask)
    together = model.encode(
        pixels(3), sample=True, generator=[torch.Generator().manual_seed(seed) for seed in range(3)]
    )
    alone = model.encode(pixels(3)[1:2], sample=True, generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(alone.ids[0], together.ids[1, together.mask[1]])
    quiet = model.encode(pixels(3), noise=torch.zeros(3, 16, 2))
    assert torch.equal(quiet.ids, model.encode(pixels(3)).ids)
    with pytest.raises(ValueError, match="`noise` must be"):
        model.encode(pixels(3), noise=torch.zeros(3, 4, 2))


def test_lavit_merges_dropped_tokens_into_kept_ones():
    model = tiny.lavit_tokenizer()
    features = model.image_features(pixels(1))
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[0, [2, 5, 11]] = True
    whole = model.merger(features, keep)
    dropped, later = features.clone(), features.clone()
    dropped[0, 7] += torch.randn(16)
    later[0, 11] += torch.randn(16)
    assert (model.merger(dropped, keep) - whole)[0, 2].abs().max() > 1e-4
    changed = (model.merger(later, keep) - whole)[0].abs().amax(-1)
    assert changed[[2, 5]].max() < 1e-4 < changed[11]  # a kept token is seen by those behind it only


def test_lavit_reads_through_a_merger_of_its_own():
    model = tiny.lavit_tokenizer(separate_reading=True)
    plain = tiny.lavit_tokenizer()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("reading_merger.")})
    assert torch.equal(plain.encode(pixels()).ids, model.encode(pixels()).ids)
    assert (plain.reading_features(pixels())[0] - model.reading_features(pixels())[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no `reading_dim`"):
        tiny.lavit_tokenizer(reading_dim=None).reading_features(pixels())
    with pytest.raises(ValueError, match="needs a `reading_dim`"):
        tiny.lavit_tokenizer(reading_dim=None, separate_reading=True)


def test_lavit_trains_on_the_codes_that_it_encodes():
    model = tiny.lavit_tokenizer()
    noise = -torch.empty(3, 16, 2).exponential_(generator=torch.Generator().manual_seed(0)).log()
    codes = model.encode(pixels(3), noise=noise)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            selected = model(pixels(3), noise=noise)
        assert torch.equal(selected.quantized.ids, codes.ids) and torch.equal(selected.mask, codes.mask)
        vectors = model.embed(codes).masked_fill(~codes.mask.unsqueeze(-1), 0)
        torch.testing.assert_close(selected.quantized.vectors, vectors, atol=1e-6, rtol=0)
        assert torch.equal(selected.keep.sum(1).long(), codes.mask.sum(1)) and selected.features.shape == (3, 16, 16)
        assert selected.keep.requires_grad == gradients
    sources = [torch.Generator().manual_seed(seed) for seed in range(3)]
    together = model(pixels(3), generator=sources)
    alone = model(pixels(3)[1:2], generator=[torch.Generator().manual_seed(1)])
    assert torch.equal(alone.quantized.ids[0], together.quantized.ids[1, together.mask[1]])
    # padding is not counted: the losses are those of all real codes
    merged = model.merger(selected.features, selected.keep.detach())[selected.keep.bool()]
    kept = F.normalize(model.quant_proj(merged), dim=-1)
    expected = (kept - model.quantizer.embedding.weight[codes.ids[codes.mask]]).square().mean()
    torch.testing.assert_close(selected.quantized.codebook_loss, expected)
    with pytest.raises(ValueError, match="`noise` must be"):
        model(pixels(3), noise=noise[:, :4])


@torch.enable_grad()
def test_lavit_learns_to_restore_features_at_the_wanted_rate():
    torch.manual_seed(0)
    model, decoder = tiny.lavit_tokenizer(std=0.15), tiny.lavit_decoder(feature_dim=16, std=0.15)
    model.vision.requires_grad_(False)
    optimizer = torch.optim.Adam([*model.parameters(), *decoder.parameters()], lr=5e-3)
    generator, made = torch.Generator().manual_seed(0), []
    for _ in range(40):
        losses = lavit_losses(model, decoder, pixels(8), keep_rate=0.25, generator=generator)
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
        made.append([loss.item() for loss in losses[:4]])
    first, last = torch.tensor(made[:5]).mean(0), torch.tensor(made[-5:]).mean(0)
    assert last[0] < 0.5 * first[0] and last[1] < 0.2 * first[1] and last[1] < 0.02
    assert all(parameter.grad is None for parameter in model.vision.parameters())


@torch.enable_grad()
def test_lavit_codes_may_follow_moving_averages():
    torch.manual_seed(0)
    model, decoder = tiny.lavit_tokenizer(std=0.15), tiny.lavit_decoder(feature_dim=16, std=0.15)
    average, generator = MovingAverageCodebook(model.quantizer, decay=0.8), torch.Generator().manual_seed(0)
    average.adopt(model.quantizer)
    made = []
    for _ in range(10):
        losses = lavit_losses(model, decoder, pixels(8), generator=generator)
        losses.total(codebook=0).backward()
        selected = losses.selected
        assert len(selected.vectors) == int(selected.mask.sum())
        ids = selected.quantized.ids[selected.mask]
        average.update(model.quantizer, selected.vectors.detach(), ids, restart=False)
        made.append(losses.codebook.item())
    assert model.quantizer.embedding.weight.grad is None and made[-1] < 0.5 * made[0]


def test_lavit_training_says_what_is_wrong():
    model = tiny.lavit_tokenizer()
    with pytest.raises(ValueError, match=r"code_dim, num_queries and feature_dim \(4, 16, 16\), got \(4, 16, 8\)"):
        lavit_losses(model, tiny.lavit_decoder(), pixels())
    decoder = tiny.lavit_decoder(feature_dim=16)
    with pytest.raises(ValueError, match=r"`keep_rate` must lie in \(0, 1\], got 0"):
        lavit_losses(model, decoder, pixels(), keep_rate=0)
    with pytest.raises(ValueError, match="resize the images to 8x8"):
        lavit_losses(model, decoder, torch.zeros(1, 3, 8, 12))


def test_lavit_decoder_ignores_padding():
    decoder = tiny.lavit_decoder(embed_dims=(8, 6), pooled_dim=10, pool_heads=2)
    vectors, mask = torch.randn(2, 5, 4), torch.tensor([[True] * 5, [True, True, True, False, False]])
    condition = decoder(vectors, mask)
    assert condition.embeds.shape == (2, 16, 14) and condition.pooled.shape == (2, 10)
    vectors[1, 3:] = 7.0
    for given_mask, given_vectors in ((mask, vectors), (None, vectors[1:, :3])):
        again = decoder(given_vectors, given_mask)
        torch.testing.assert_close(again.embeds[-1], condition.embeds[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(again.pooled[-1], condition.pooled[1], atol=1e-5, rtol=0)
    assert tiny.lavit_decoder()(vectors).pooled is None
    with pytest.raises(ValueError, match="hides all codes"):
        decoder(vectors, torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="`vectors` must be"):
        decoder(torch.randn(1, 17, 4))
    with pytest.raises(ValueError, match="belong together"):
        tiny.lavit_decoder(pooled_dim=4)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "model",
    [
        tiny.seed_tokenizer(head="query"),
        tiny.lavit_tokenizer(separate_reading=True),
        tiny.lavit_decoder(pooled_dim=6, pool_heads=2),
    ],
    ids=["seed", "lavit", "decoder"],
)
def test_saved_models_are_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    if isinstance(model, (SEEDTokenizer, LaVITTokenizer)):
        assert torch.equal(loaded.encode(pixels()).ids, model.encode(pixels()).ids)
    else:
        assert isinstance(loaded, LaVITDecoder)


@pytest.mark.parametrize("made", [tiny.seed_tokenizer, tiny.lavit_tokenizer], ids=["seed", "lavit"])
def test_models_in_half_precision_keep_what_decides_in_float32(made, tmp_path):
    made().save_pretrained(tmp_path)
    model = made().__class__.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (
        model.quantizer.embedding.weight.dtype == torch.float32 and model.quant_proj[0].weight.dtype == torch.bfloat16
    )
    codes = model.encode(pixels().bfloat16())
    assert model.embed(codes).dtype == torch.float32
    assert model.reading_features(pixels().bfloat16())[0].dtype == torch.bfloat16
    if isinstance(model, SEEDTokenizer):
        assert model.condition(codes).pooled.dtype == torch.bfloat16
    else:
        assert model.selector.proj_in.weight.dtype == torch.float32


def test_wrong_files_are_named(tmp_path):
    for family, match in (("seed", "no file of SEED"), ("lavit", "no file of LaVIT")):
        file = tmp_path / f"{family}.pt"
        torch.save({"weight": torch.zeros(2)}, file)
        with pytest.raises(CheckpointKeysError, match=match):
            convert(family, file)
    torch.save({"quantize.embedding.weight": torch.zeros(2, 2)}, tmp_path / "seed.pt")
    with pytest.raises(CheckpointKeysError, match="eva_vit_g.pth"):
        convert("seed", tmp_path / "seed.pt")
    with pytest.raises(CheckpointKeysError, match="eva_vitg_psz14.bin"):
        convert_tokenizer({"token_predictor.in_conv.0.weight": torch.zeros(2)})
    state = {"blocks.0.attn.q_bias": torch.zeros(2)}
    with pytest.raises(CheckpointKeysError, match="v_bias"):
        eva.joined_biases(state, "")
    with pytest.raises(CheckpointShapeError, match="no class token"):
        eva.sizes({"patch_embed.proj.weight": torch.zeros(4, 3, 2, 2), "pos_embed": torch.zeros(1, 4, 4)}, "")
    with pytest.raises(ValueError, match="none of the published"):
        eva.num_heads(30, None, "vision_heads")
    with pytest.raises(ValueError, match="must divide"):
        eva.num_heads(30, 4, "vision_heads")
