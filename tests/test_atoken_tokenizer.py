"""AToken: sparse tokens, windows, finite scalar quantizer, and the tokenizer on images, videos and voxels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.convert import CheckpointKeysError, convert
from armm.convert.atoken import RULES
from armm.convert.containers import CheckpointShapeError, UnreadableCheckpointError
from armm.nn.rotary import rotary_table
from tokenizers_visual import ATokenTokenizer, Codes, FiniteScalarQuantizer, SparseTokens
from tokenizers_visual.atoken import ROTARY_THETA
from tokenizers_visual.quantizers import FSQ_LEVELS
from tokenizers_visual.sparse import patchify, unpatchify, windows

TINY = {
    "patch_size": [2, 4, 4], "latent_channels": 6, "encoder_dim": 16, "encoder_layers": 2, "encoder_heads": 2, "encoder_mlp_hidden": 24,
    "decoder_dim": 16, "decoder_layers": 1, "decoder_heads": 1, "decoder_mlp_hidden": 20, "position_table": 4, "window_frames": 4,
}  # fmt: skip


def tokenizer(**changes) -> ATokenTokenizer:
    torch.manual_seed(0)
    model = ATokenTokenizer(**{**TINY, **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def continuous():
    return tokenizer()


@pytest.fixture(scope="module")
def discrete():
    return tokenizer(codebook_size=64, num_codebooks=3)


# ---------------------------------------------------------------------- sparse tokens


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(3, 11), st.integers(5, 12)), min_size=1, max_size=3))
def test_patches_put_together_again_are_the_video_without_its_rest(sizes):
    patch = (3, 2, 4)
    videos = [torch.randn(2, *((t if t >= 3 else 1), h, w)) for t, h, w in sizes]
    tokens = patchify(videos, patch)
    assert tokens.coordinates[:, 0].tolist() == sorted(tokens.coordinates[:, 0].tolist())
    for video, restored in zip(videos, unpatchify(tokens, patch), strict=True):
        t, h, w = (size - size % step for size, step in zip(video.shape[1:], patch, strict=True))
        top, left = (video.shape[2] - h) // 2, (video.shape[3] - w) // 2
        kept = video[:, : max(t, 1), top : top + h, left : left + w]
        assert torch.equal(restored[:, : kept.shape[1]], kept)
        assert video.shape[1] > 1 or not restored[:, 1:].any()  # a single frame is followed by grey ones


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 7), st.integers(0, 3)), min_size=1, max_size=20),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_windows_are_the_tokens_of_a_thing_and_a_time_in_their_order(rows, frames):
    coordinates = torch.tensor([[batch, time, row, 0, 0] for batch, time, row in rows])
    placed = windows(coordinates, frames)
    first = min(time for _, time, _ in rows)
    groups: dict[tuple[int, int], list[int]] = {}
    for number, (batch, time, _) in enumerate(rows):
        groups.setdefault((batch, 0 if frames is None else (time - first) // frames), []).append(number)
    expected = [groups[key] for key in sorted(groups)]
    found = [index[real].tolist() for index, real in zip(placed.index, placed.real, strict=True)]
    assert found == expected and placed.batch.tolist() == [key[0] for key in sorted(groups)]
    values = torch.randn(len(rows), 3)
    assert torch.equal(placed.scatter(placed.gather(values)), values)
    if frames is not None:
        assert placed.coordinates[..., 0].max() < frames


def test_sparse_tokens_are_checked():
    with pytest.raises(ValueError, match="`features` must be floating point"):
        SparseTokens(torch.zeros(0, 3), torch.zeros(0, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`coordinates` must be int64 \[2, 5\]"):
        SparseTokens(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="must not be negative"):
        SparseTokens(torch.zeros(1, 3), torch.full((1, 5), -1))
    with pytest.raises(ValueError, match="do not fill a patch"):
        patchify([torch.zeros(3, 1, 2, 8)], (1, 4, 4))
    with pytest.raises(ValueError, match="do not fill its grid"):
        unpatchify(SparseTokens(torch.zeros(1, 48), torch.tensor([[0, 0, 1, 0, 0]])), (1, 4, 4))


# ---------------------------------------------------------------------- the quantizer


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 99))
def test_every_channel_is_rounded_to_its_levels(levels, codebooks, seed):
    quantizer = FiniteScalarQuantizer(levels, codebooks)
    vectors = 3 * torch.randn(4, quantizer.dim, generator=torch.Generator().manual_seed(seed))
    quantized = quantizer(vectors)
    for row in range(4):
        for book in range(codebooks):
            index, basis = 0, 1
            for channel, count in enumerate(levels):
                place = book * len(levels) + channel
                half, offset = (count - 1) * 1.001 / 2, 0.0 if count % 2 else 0.5
                bounded = math.tanh(float(vectors[row, place]) + math.atanh(offset / half)) * half - offset
                assert abs(float(quantized.vectors[row, place]) - round(bounded) / (count // 2)) < 1e-6
                index += (round(bounded) + count // 2) * basis
                basis *= count
            assert int(quantized.ids[row, book]) == index < quantizer.codebook_size
    torch.testing.assert_close(quantizer.lookup(quantized.ids), quantized.vectors)


@pytest.mark.parametrize("size", [size for size in FSQ_LEVELS if size <= 4096])
def test_every_id_has_a_vector_of_its_own(size):
    quantizer = FiniteScalarQuantizer(FSQ_LEVELS[size])
    vectors = quantizer.lookup(torch.arange(quantizer.codebook_size)[:, None])
    assert 0.9 * size < len(vectors) == len(vectors.unique(dim=0)) <= size and vectors.abs().max() <= 1


def test_gradients_pass_the_rounding_and_the_projections():
    quantizer = FiniteScalarQuantizer([5, 3], 2, dim=7)
    vectors = torch.randn(3, 7, requires_grad=True)
    out = quantizer(vectors)
    assert out.vectors.shape == (3, 7) and out.ids.shape == (3, 2)
    out.vectors.sum().backward()
    assert vectors.grad.abs().sum() > 0 and quantizer.project_out.weight.grad is not None
    torch.testing.assert_close(quantizer.lookup(out.ids), out.vectors)
    with pytest.raises(ValueError, match="at least 2"):
        FiniteScalarQuantizer([5, 1])
    for options in ({"chunks": 0}, {"chunks": 2, "dim": 5}):
        with pytest.raises(ValueError, match="`chunks` must be positive and divide"):
            FiniteScalarQuantizer([5, 3], **options)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_vector_in_rows_has_the_ids_of_its_rows(chunks, codebooks, seed):
    torch.manual_seed(seed)  # weights of the layers
    generator = torch.Generator().manual_seed(seed)
    levels = [4, 3]
    rows = FiniteScalarQuantizer(levels, codebooks, chunks=chunks)
    vectors = 2 * torch.randn(5, rows.dim, generator=generator)
    whole = FiniteScalarQuantizer(
        levels, chunks * codebooks
    )  # without layers, rows are no more than the order of channels
    assert rows.dim == whole.dim and rows.ids_per_vector == whole.ids_per_vector == chunks * codebooks
    assert torch.equal(rows(vectors).ids, whole(vectors).ids) and torch.equal(
        rows(vectors).vectors, whole(vectors).vectors
    )
    narrow = FiniteScalarQuantizer(
        levels, codebooks, dim=5 * chunks, chunks=chunks
    )  # with layers, all rows have the same
    vectors = (2 * torch.randn(2, 3, 5 * chunks, generator=generator)).requires_grad_()
    out, one = narrow(vectors), FiniteScalarQuantizer(levels, codebooks, dim=5)
    one.load_state_dict(narrow.state_dict())
    alone = one(vectors.unflatten(-1, (chunks, 5)))
    assert torch.equal(out.ids, alone.ids.flatten(-2)) and torch.equal(out.ids, narrow.ids(vectors))
    torch.testing.assert_close(out.vectors, alone.vectors.flatten(-2))
    torch.testing.assert_close(narrow.lookup(out.ids), out.vectors)
    out.vectors.square().sum().backward()
    assert vectors.grad.abs().sum() > 0 and narrow.project_in.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_tokenizer_cuts_latents_into_rows(discrete, tmp_path):
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    rows = tokenizer(codebook_size=64, num_codebooks=1, chunk_size=3)
    rows.load_state_dict(discrete.state_dict())
    assert (rows.sub_codes, rows.latent_channels, rows.bits_per_token) == (3, 6, 18)
    assert torch.equal(rows.encode(images).ids, discrete.encode(images).ids)
    projected = tokenizer(latent_channels=8, codebook_size=64, num_codebooks=3, chunk_size=2)
    codes = projected.encode(images)
    assert codes.ids.shape == (2, 4, 6) and projected.decode(codes).shape == images.shape
    projected.save_pretrained(tmp_path)
    again = ATokenTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(images).ids, codes.ids) and torch.equal(
        again.decode(codes), projected.decode(codes)
    )


# ---------------------------------------------------------------------- the tokenizer


def test_four_rotary_axes_have_the_frequencies_of_the_whole_head():
    head, places = 24, torch.tensor([[3, 1, 4, 15], [0, 9, 2, 6]])
    table = rotary_table(places, (head // 4,) * 4, ROTARY_THETA)[:, 0]
    for token, place in enumerate(places.tolist()):
        angles = [place[axis] * 10000 ** (-j / head) for axis in range(4) for j in range(head // 8)]
        expected = torch.tensor([complex(math.cos(angle), math.sin(angle)) for angle in angles])
        torch.testing.assert_close(table[token], expected.to(torch.complex64), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_things_of_all_sizes_and_kinds_in_one_batch_are_what_they_are_alone(continuous):
    voxels = continuous.voxel_tokens(torch.rand(5, 7), torch.randint(0, 6, (5, 3)), number=3)
    pictures = [torch.randn(3, 9, 17), torch.randn(3, 8, 4), torch.randn(3, 11, 8, 8)]
    tokens = continuous.tokens(pictures)
    # Everything begins at the same time: times count from the smallest of the batch.
    coordinates = torch.cat([tokens.coordinates, voxels.coordinates - torch.tensor([0, 1, 0, 0, 0])])
    together = SparseTokens(torch.cat([tokens.features, voxels.features]), coordinates)
    encoding = continuous.encode_tokens(together)
    decoded = continuous.decode_tokens(together.replace(continuous.sample(encoding.moments)))
    assert torch.allclose(encoding.pooled.norm(dim=-1), torch.ones(4))
    for number in range(4):
        own = coordinates[:, 0] == number
        alone = SparseTokens(together.features[own], coordinates[own])
        one = continuous.encode_tokens(alone)
        torch.testing.assert_close(one.moments, encoding.moments[own], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(one.pooled[0], encoding.pooled[number], atol=1e-5, rtol=1e-4)
        patches = continuous.decode_tokens(alone.replace(continuous.sample(one.moments)))
        torch.testing.assert_close(patches.features, decoded.features[own], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_order_of_tokens_does_not_matter(continuous):
    tokens = continuous.tokens([torch.randn(3, 6, 8, 8), torch.randn(3, 8, 12)])
    order = torch.randperm(len(tokens.features))
    shuffled = SparseTokens(tokens.features[order], tokens.coordinates[order])
    expected, found = continuous.encode_tokens(tokens), continuous.encode_tokens(shuffled)
    torch.testing.assert_close(found.moments, expected.moments[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pooled, expected.pooled, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_windows_of_a_video_do_not_see_each_other(continuous):
    video = torch.randn(1, 3, 8, 8, 8)
    other = video.clone()
    other[:, :, 4:] = torch.randn(1, 3, 4, 8, 8)
    first, second = continuous.encode(video), continuous.encode(other)
    assert first.grid == second.grid == (4, 2, 2)
    torch.testing.assert_close(first.tensor[:, :8], second.tensor[:, :8])
    assert not torch.allclose(first.tensor[:, 8:], second.tensor[:, 8:], atol=1e-2)
    restored = continuous.decode(first)
    assert restored.shape == video.shape
    torch.testing.assert_close(continuous.decode(second)[:, :, :4], restored[:, :, :4])


@torch.no_grad()
def test_images_are_videos_one_patch_thick(continuous, discrete):
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    for model, shape in ((continuous, (2, 6, 6)), (discrete, (2, 6, 3))):
        codes = model.encode(images)
        assert codes.grid == (1, 2, 3) and codes.tensor.shape == shape
        assert model.decode(codes).shape == images.shape and model.decode(codes, as_video=True).shape == (
            2,
            3,
            2,
            8,
            12,
        )
        assert torch.equal(model.decode(codes), model.decode(codes, as_video=True)[:, :, 0])
        padded = torch.stack([images, torch.zeros_like(images)], dim=2)
        assert torch.equal(model.encode(padded).tensor, codes.tensor)
        assert model.features(images).shape == (2, 6, 16)
    assert (discrete.codebook_size, discrete.sub_codes, continuous.sub_codes) == (64, 3, 1)


@torch.no_grad()
def test_samples_follow_their_generators(continuous):
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    together = continuous.encode(images, sample=True, generator=[torch.Generator().manual_seed(n) for n in range(3)])
    for row in range(3):
        alone = continuous.encode(images[row : row + 1], sample=True, generator=torch.Generator().manual_seed(row))
        torch.testing.assert_close(alone.tensor[0], together.tensor[row], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(together.tensor, continuous.encode(images).tensor, atol=1e-2)
    zeros = torch.zeros_like(together.tensor)
    assert torch.equal(continuous.encode(images, noise=zeros).tensor, continuous.encode(images).tensor)


def test_training_restores_what_was_given(continuous, discrete):
    for shape in ((2, 3, 8, 12), (2, 3, 6, 8, 8), (2, 3, 1, 8, 8)):
        pixels = torch.rand(*shape) * 2 - 1
        count = (max(shape[2] // 2, 1) if len(shape) == 5 else 1) * (shape[-2] // 4) * (shape[-1] // 4)
        restored, moments = continuous(pixels, generator=torch.Generator().manual_seed(0))
        assert restored.shape == pixels.shape and moments.shape == (2 * count, 12)
        restored, quantized = discrete(pixels)
        codes = discrete.encode(pixels)
        assert restored.shape == pixels.shape and torch.equal(quantized.ids, codes.ids)
        torch.testing.assert_close(quantized.vectors, discrete.embed(codes))
        decoded = discrete.decode(codes, as_video=len(shape) == 5)
        torch.testing.assert_close(restored, decoded[:, :, : shape[2]] if len(shape) == 5 else decoded)


def test_the_discrete_tokenizer_learns_to_restore_a_picture():
    model = tokenizer(codebook_size=64, num_codebooks=3).train()
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=3e-3)  # all that it learns has passed the rounding
    losses = []
    for _ in range(40):
        loss = (model(pixels)[0] - pixels).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.9 * losses[0]


@torch.no_grad()
def test_tokenizers_are_saved_and_loaded(continuous, discrete, tmp_path):
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    for name, model in (("continuous", continuous), ("discrete", discrete)):
        model.save_pretrained(tmp_path / name)
        again = ATokenTokenizer.from_pretrained(tmp_path / name)
        assert torch.equal(again.encode(images).tensor, model.encode(images).tensor)


def test_bad_inputs_are_named(continuous, discrete):
    for change, match in (
        ({"patch_size": [2, 4, 8]}, "`patch_size` must be"),
        ({"window_frames": 5}, "`window_frames` must be a multiple"),
        ({"codebook_size": 63}, "`codebook_size` must be 0 or one of"),
        (
            {"codebook_size": 64, "chunk_size": 4},
            "`chunk_size` must be positive and divide `latent_channels`, 6, got 4",
        ),
        ({"encoder_heads": 4}, "a multiple of 8 wide"),
    ):
        with pytest.raises(ValueError, match=match):
            tokenizer(**change)
    with pytest.raises(ValueError, match="`pixels` must be floating point"):
        continuous.encode(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="need a grid"):
        continuous.decode(Codes(latents=torch.zeros(1, 4, 6)))
    with pytest.raises(ValueError, match=r"latents \[B, N, 6\]"):
        continuous.embed(Codes(latents=torch.zeros(1, 4, 5)))
    with pytest.raises(ValueError, match=r"must lie in \[0, 63\]"):
        discrete.embed(Codes(ids=torch.full((1, 4, 3), 64)))
    with pytest.raises(ValueError, match="`noise` must be"):
        continuous.encode(torch.zeros(1, 3, 8, 8), noise=torch.zeros(1, 1, 6))
    with pytest.raises(ValueError, match="`coordinates`"):
        continuous.voxel_tokens(torch.zeros(3, 7), torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="`coordinates` must be integers"):
        continuous.voxel_tokens(torch.zeros(3, 7), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="must be 96 wide, as patches of this tokenizer are, got 5"):
        continuous.encode_tokens(SparseTokens(torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.long)))
    with pytest.raises(ValueError, match="ids are not drawn"):
        discrete.encode(torch.zeros(1, 3, 8, 8), sample=True)


def test_the_converter_says_what_a_file_does_not(tmp_path):
    file = tmp_path / "atoken-soc.pt"
    torch.save({"something": torch.zeros(2)}, file)
    with pytest.raises(CheckpointKeysError, match="lacks encoder.input_layer.weight"):
        convert("atoken", file)
    torch.save({"something": torch.zeros(2)}, tmp_path / "3d_decode_gs.pt")
    with pytest.raises(UnreadableCheckpointError, match="Gaussian decoder"):
        convert("atoken", tmp_path / "3d_decode_gs.pt")
    with pytest.raises(ValueError, match="unknown `config` options heads"):
        convert("atoken", file, config={"heads": 2})
    with pytest.raises(ValueError, match="encoder_pe_mode = 'ape'"):
        convert("atoken", file, config={"encoder_pe_mode": "ape"})
    state = {"encoder.input_layer.weight": torch.zeros(16, 96), "proj.weight": torch.zeros(12, 16)}
    for coder in ("encoder", "decoder"):
        state[f"{coder}.pos_embedder.position_embedding.weight"] = torch.zeros(16, 16)
        state[f"{coder}.blocks.0.mlp.mlp.0.weight"] = torch.zeros(24, 16)
    state["decoder.blocks.0.attn.q_rms_norm.gamma"] = torch.ones(2, 8)
    torch.save(state, file)
    with pytest.raises(ValueError, match="pass config={'patch_size'"):
        convert("atoken", file)
    with pytest.raises(ValueError, match="pass config={'encoder_heads'"):
        convert("atoken", file, config={"patch_size": [2, 4, 4]})
    with pytest.raises(CheckpointShapeError, match="do not make up"):
        convert("atoken", file, config={"patch_size": [4, 4, 4]})
    with pytest.raises(CheckpointShapeError, match="encoder_mlp_hidden = 30"):
        convert("atoken", file, config={"patch_size": [2, 4, 4], "encoder_mlp_channels": 30})
    with pytest.raises(ValueError, match="`chunk_size` must be positive and divide"):
        options = {"use_quantizer": True, "quantizer_codebook_size": 64, "quantizer_chunk_size": 4}
        convert("atoken", file, config={"patch_size": [2, 4, 4], "encoder_heads": 2, **options})


@torch.no_grad()
def test_a_file_of_a_tokenizer_with_rows_is_converted(tmp_path):
    ours = tokenizer(latent_channels=8, codebook_size=64, num_codebooks=3, chunk_size=2)
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in ours.state_dict().items():
        parts.setdefault(next(found for rule in RULES if (found := rule.source_of(name))), []).append(tensor)
    state = {name: torch.cat(tensors) if len(tensors) > 1 else tensors[0] for name, tensors in parts.items()}
    assert state["quantizer.project_in.weight"].shape == (6, 4)
    torch.save(state, tmp_path / "atoken-rows.pt")
    options = {
        "patch_size": TINY["patch_size"], "encoder_num_heads": 2, "temporal_window_size": 4, "use_quantizer": True,
        "quantizer_codebook_size": 64, "quantizer_num_codebooks": 3, "quantizer_chunk_size": 2, "quantizer_feature_dim": 8,
    }  # fmt: skip
    theirs = convert("atoken", tmp_path / "atoken-rows.pt", config=options).eval()
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    codes = ours.encode(images)
    assert theirs.sub_codes == 6 and torch.equal(theirs.encode(images).ids, codes.ids)
    assert torch.equal(theirs.decode(codes), ours.decode(codes))
    with pytest.raises(CheckpointShapeError, match=r"quantizer\.project_in\.weight"):
        convert("atoken", tmp_path / "atoken-rows.pt", config={**options, "quantizer_chunk_size": 4})
