"""The scenes data set: drawing, pictures, words, and judging what a picture shows."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from armm.data.scenes import (
    COLORS,
    LIGHTS,
    MATERIALS,
    RGB,
    SHAPES,
    SIZES,
    SceneDataset,
    Scenes,
    caption,
    centre_heights,
    is_heldout,
    object_map,
    project,
    questions,
    render,
    sample_scenes,
    unproject,
)
from armm.data.scenes.tracing import visible_fraction


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return sample_scenes(400, seed=7, split="all")


def one_object(shape: str, size: str = "large", rotation: float = 0.6, light: str = "day") -> Scenes:
    """A red matte solid in the middle of the frame."""
    index = torch.full((1, 3), -1)

    def first(value: int) -> torch.Tensor:
        filled = index.clone()
        filled[0, 0] = value
        return filled

    return Scenes(
        count=torch.tensor([1]),
        shape=first(SHAPES.index(shape)),
        color=first(COLORS.index("red")),
        size=first(SIZES.index(size)),
        material=first(MATERIALS.index("matte")),
        position=torch.zeros(1, 3, 2),
        rotation=torch.tensor([[rotation, 0.0, 0.0]]),
        light=torch.tensor([LIGHTS.index(light)]),
        seed=torch.tensor([0]),
    )


def equal(a: Scenes, b: Scenes) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors().values(), b.tensors().values(), strict=True))


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_sampling_depends_on_seed_and_index_only(scenes):
    assert equal(scenes, sample_scenes(400, seed=7, split="all"))
    assert equal(scenes[300:340], sample_scenes(40, seed=7, split="all", start=300))
    assert not torch.equal(scenes.shape, sample_scenes(400, seed=8, split="all").shape)
    assert len(sample_scenes(0)) == 0


def test_splits_share_no_combination(scenes):
    assert not is_heldout(sample_scenes(300, seed=1, split="train")).any()
    assert is_heldout(sample_scenes(60, seed=1, split="heldout")).all()
    assert 0.05 < is_heldout(sample_scenes(1000, seed=2, split="all")).float().mean() < 0.16


def test_split_ignores_the_order_of_objects(scenes):
    several = scenes[scenes.count == 3]
    for order in ([1, 2, 0], [2, 1, 0]):
        swapped = {
            name: getattr(several, name)[:, order]
            for name in ("shape", "color", "size", "material", "position", "rotation")
        }
        assert torch.equal(is_heldout(replace(several, **swapped)), is_heldout(several))


def test_counts_and_attributes_are_balanced():
    many = sample_scenes(3000, seed=3)
    share = many.count.bincount(minlength=4)[1:] / len(many)
    assert torch.allclose(share, torch.tensor([0.35, 0.45, 0.20]), atol=0.04)
    for values, names in ((many.shape, SHAPES), (many.color, COLORS), (many.material, MATERIALS)):
        share = values[many.present].bincount(minlength=len(names)) / many.present.sum()
        assert (share - 1 / len(names)).abs().max() < 0.35 / len(names)
    pairs = many[many.count == 2]
    offset = (pairs.position[:, 0] - pairs.position[:, 1]).abs()
    assert 0.42 < (offset[:, 0] > offset[:, 1]).float().mean() < 0.58


def test_layouts_are_readable(scenes):
    present = scenes.present
    offset = (scenes.position[:, :, None] - scenes.position[:, None]).abs()
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(3, dtype=torch.bool)
    lead, rest = offset.amax(-1)[pairs], offset.amin(-1)[pairs]
    assert (lead > 1.39 * rest).all() and (lead > rest + 0.39).all()
    assert (visible_fraction(scenes, 64)[present] > 0.6).all()
    turn = scenes.rotation[present] * 180 / torch.pi
    assert turn.min() >= 14.9 and turn.max() <= 75.1


def test_objects_lie_inside_the_frame_and_are_large(scenes):
    shown = object_map(scenes, 64)
    border = torch.cat([shown[:, 0], shown[:, -1], shown[:, :, 0], shown[:, :, -1]], dim=1)
    assert (border == -1).all()
    for index in (scenes.count == 1).nonzero()[:60, 0].tolist():
        mask = shown[index] == 0
        width = int(mask.any(0).sum())
        size = SIZES[int(scenes.size[index, 0])]
        assert 13 <= width <= 20 if size == "small" else 19 <= width <= 34


def test_scenes_can_be_indexed(scenes):
    assert len(scenes[3]) == 1 and len(scenes[-1]) == 1
    assert equal(scenes[-1], scenes[399:])
    assert equal(scenes[[1, 5]], scenes[torch.tensor([1, 5])])
    assert len(scenes[scenes.count == 2]) == int((scenes.count == 2).sum())
    with pytest.raises(IndexError, match="out of range"):
        scenes[400]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_rendering_is_the_same_alone_and_in_a_batch(scenes):
    together = render(scenes[:30], 32)
    assert together.dtype == torch.uint8 and together.shape == (30, 3, 32, 32)
    for index in (0, 17, 29):
        assert torch.equal(render(scenes[index], 32)[0], together[index])


def test_rendering_is_the_same_with_one_and_two_threads(scenes):
    threads = torch.get_num_threads()
    pictures = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            pictures.append(render(scenes[:12], 64))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*pictures)


def test_antialiasing_touches_outlines_only():
    scene = one_object("cube")
    coarse, fine = render(scene, 64, supersample=1).int(), render(scene, 64, supersample=4).int()
    changed = (coarse - fine).abs().amax(1)[0] > 24
    shown = object_map(scene, 64)[0] >= 0
    assert changed.any() and changed.float().mean() < 0.1
    assert len(fine[0, 0][shown].unique()) > len(coarse[0, 0][shown].unique())


def test_higher_resolution_shows_the_same_picture(scenes):
    small = render(scenes[:6], 32, supersample=4).float()
    large = torch.nn.functional.avg_pool2d(render(scenes[:6], 128, supersample=2).float(), 4)
    assert (small - large).abs().mean() < 3


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouettes(shape):
    mask = object_map(one_object(shape), 128)[0] == 0
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    height, width = len(rows), len(columns)
    widths = mask.sum(1)[rows].float()
    fill = float(mask.sum()) / (height * width)
    assert torch.equal(rows, torch.arange(int(rows[0]), int(rows[-1]) + 1))
    if shape == "sphere":
        assert abs(height / width - 1) < 0.08 and abs(fill - torch.pi / 4) < 0.03
    if shape == "cylinder":
        assert height > 1.25 * width and fill > 0.85
    if shape == "cone":
        assert widths[: height // 6].mean() < 0.25 * widths.max() and fill < 0.66
    if shape == "cube":
        faces = render(one_object(shape), 128, supersample=1)[0][:, mask].T.unique(dim=0)
        assert len(faces) < 60 and fill > 0.65  # three flat faces (and their contact with the ground)


def test_a_ray_to_the_middle_of_the_picture_hits_where_projection_says(scenes):
    centres = project(scenes)
    assert (centres[scenes.present] > 0.05).all() and (centres[scenes.present] < 0.95).all()
    assert (centres[~scenes.present] == -1).all()
    back = unproject(centres, centre_heights(scenes.shape, scenes.size))
    assert torch.allclose(back[scenes.present], scenes.position[scenes.present], atol=1e-4)
    single = scenes[scenes.count == 1]
    pixels = (project(single)[:, 0] * 64).long()
    assert (object_map(single, 64)[torch.arange(len(single)), pixels[:, 1], pixels[:, 0]] == 0).all()


@pytest.mark.parametrize("light", LIGHTS)
def test_colors_can_be_told_apart(light):
    scene = one_object("sphere", light=light)
    mask = object_map(scene, 64)[0] == 0
    means = []
    for color in range(len(COLORS)):
        scene.color[0, 0] = color
        means.append(render(scene, 64)[0][:, mask].float().mean(1))
    distances = torch.cdist(torch.stack(means), torch.stack(means)) + 1e3 * torch.eye(len(COLORS))
    assert distances.min() > 30
    assert set(RGB) == set(COLORS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("light", LIGHTS)
def test_shiny_objects_have_a_highlight(shape, light):
    scene = one_object(shape, size="small", light=light)
    mask = object_map(scene, 64)[0] == 0
    matte = render(scene, 64)[0].float().amin(0)[mask]
    scene.material[0, 0] = MATERIALS.index("shiny")
    shiny = render(scene, 64)[0].float().amin(0)[mask]
    # On a red object the least of the three channels is low everywhere but in the highlight.
    assert shiny.max() > matte.max() + 80 and (shiny > 150).sum() >= 3


def test_lights_and_shadows():
    grounds = [render(one_object("sphere", light=light), 64)[0, :, 2, 2].float() for light in LIGHTS]
    assert min((a - b).norm() for i, a in enumerate(grounds) for b in grounds[:i]) > 60
    picture = render(one_object("cylinder"), 64)[0].float().mean(0)
    ground = object_map(one_object("cylinder"), 64)[0] < 0
    assert (picture[ground] < picture[2, 2] - 40).float().mean() > 0.03  # a shadow
    assert (picture[ground] > picture[2, 2] - 1).float().mean() > 0.6  # and otherwise one flat tone


# --- data sets -------------------------------------------------------------------------------------------------------


def test_dataset_is_cached(tmp_path, monkeypatch):
    first = SceneDataset.prepare(20, 16, seed=4, cache_dir=tmp_path, progress=False)
    assert first.images.shape == (20, 3, 16, 16) and first.size == 16 and len(first) == 20
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr("armm.data.scenes.dataset.render", lambda *_: pytest.fail("rendered again"))
    second = SceneDataset.prepare(20, 16, seed=4, cache_dir=tmp_path, progress=False)
    assert torch.equal(first.images, second.images) and equal(first.scenes, second.scenes)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:100])  # a truncated cache is rendered again
    third = SceneDataset.prepare(20, 16, seed=4, cache_dir=tmp_path, progress=False)
    assert torch.equal(first.images, third.images)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_dataset_equals_direct_rendering():
    data = SceneDataset.prepare(530, 8, seed=2, split="all", progress=False)
    assert equal(data.scenes, sample_scenes(530, 2, "all"))
    assert torch.equal(data.images[500:], render(sample_scenes(30, 2, "all", start=500), 8))


# --- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_scenes(-1), "n must be"),
        (lambda: sample_scenes(2.5), "n must be"),
        (lambda: sample_scenes(2, split="test"), "split must be one of train, heldout, all"),
        (lambda: sample_scenes(2, start=-3), "start must be"),
        (lambda: render(sample_scenes(1), 4), "size must be"),
        (lambda: render(sample_scenes(1), 64, supersample=0), "supersample must be"),
        (lambda: render("scene"), "scenes must be a Scenes batch"),
        (lambda: object_map(sample_scenes(1), 10**6), "size must be"),
        (lambda: unproject(torch.zeros(3)), r"points must have shape \[..., 2\]"),
        (lambda: SceneDataset.prepare(0, progress=False), "n must be a positive integer"),
        (lambda: SceneDataset.prepare(2, 3, progress=False), "size must be"),
        (lambda: SceneDataset(torch.zeros(2, 3, 8, 8), sample_scenes(1)), "equally many"),
        (lambda: caption(sample_scenes(2), 2, random.Random(0)), "index must be an integer from 0 to 1"),
        (lambda: questions(sample_scenes(2), -1, random.Random(0)), "index must be an integer"),
        (lambda: caption("scene", 0, random.Random(0)), "Scenes batch"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()
