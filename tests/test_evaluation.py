"""The metrics against closed forms and naive code, the recogniser, and evaluations of models whose faults are known."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from armm import evaluation
from armm.data.scenes import COLORS, LIGHTS, SHAPES, project, render, sample_scenes
from armm.data.scenes.language import QUESTION_TYPES, questions
from armm.evaluation import common, frechet_distance, psnr, ssim
from armm.evaluation.image_to_text import fresh_questions, score_answers
from armm.evaluation.metrics import frechet_distance_of_gaussians, gaussian_statistics, share_with_error
from armm.evaluation.reading import ATTRIBUTES, Tally, compare, match, perfect_detections, plane_positions
from armm.evaluation.recogniser import OBJECT_ATTRIBUTES, RecogniserMaps, SceneReading, SceneRecogniser, decode, fit
from armm.evaluation.text_to_image import heldout_prompts, judge_prompts
from armm.training import Recipe, build_task, run
from armm.training.recipe import OptimizerRecipe
from armm.training.tasks.recogniser import augment, recogniser_terms, scene_targets
from tokenizers_visual.vq_tokenizer import VQTokenizer

TINY = {"channels": [8, 8, 8, 16], "stem_width": 4, "neck_width": 8}


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(24, seed=3, split="all")


@pytest.fixture(scope="module")
def pixels(scenes):
    return common.to_pixels(render(scenes, 64, supersample=1))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return SceneRecogniser(**TINY).eval()


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 3, 8, 8)
    image = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.02)])
    assert psnr(image, reference).tolist() == pytest.approx([20.0, 40.0], abs=1e-5)
    assert psnr(reference, reference).isinf().all()


def naive_ssim(x, y, data_range, window=11, sigma=1.5):
    weights = [math.exp(-((k - window // 2) ** 2) / (2 * sigma**2)) for k in range(window)]
    kernel = torch.tensor(weights, dtype=torch.float64)
    kernel = kernel[:, None] * kernel / kernel.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel in range(x.shape[0]):
        for top in range(x.shape[1] - window + 1):
            for left in range(x.shape[2] - window + 1):
                a = x[channel, top : top + window, left : left + window].double()
                b = y[channel, top : top + window, left : left + window].double()
                ma, mb = (kernel * a).sum(), (kernel * b).sum()
                va, vb = (kernel * (a - ma) ** 2).sum(), (kernel * (b - mb) ** 2).sum()
                covariance = (kernel * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + c1) * (2 * covariance + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(torch.stack(values).mean())


def test_ssim_equals_the_definition_and_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 16, 14, generator=generator) * 2 - 1
    y = (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
    ours = ssim(x, y)
    assert ours.tolist() == pytest.approx([naive_ssim(a, b, 2.0) for a, b in zip(x, y, strict=True)], abs=1e-9)
    assert ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    assert 0 < ours.max() < 1
    # torchmetrics maps a padded picture; ours are the places where the window needs no padding.
    _, padded = structural_similarity_index_measure(x.double(), y.double(), data_range=2.0, return_full_image=True)
    theirs = padded[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert ours.tolist() == pytest.approx(theirs.tolist(), abs=1e-9)


def test_metrics_refuse_what_they_cannot_compare():
    with pytest.raises(ValueError, match="of one shape"):
        psnr(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="N >= 2"):
        gaussian_statistics(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="widths differ: 3 and 4"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.25])
    shift = torch.tensor([1.0, -2.0, 0.5])
    expected = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = frechet_distance_of_gaussians(torch.zeros(3), a.diag(), shift, b.diag())
    assert found == pytest.approx(expected, rel=1e-12)
    # Rotating both changes nothing; neither does a singular covariance.
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    turned = [rotation @ c.double().diag() @ rotation.T for c in (a, b)]
    found = frechet_distance_of_gaussians(torch.zeros(3), turned[0], rotation @ shift.double(), turned[1])
    assert found == pytest.approx(expected, rel=1e-9)
    flat = torch.tensor([1.0, 0.0, 0.0]).diag()
    assert frechet_distance_of_gaussians(torch.zeros(3), flat, torch.zeros(3), 4 * flat) == pytest.approx(1.0, rel=1e-9)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    y = (
        torch.randn(50, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
        + 0.3
    )
    (ma, ca), (mb, cb) = gaussian_statistics(x), gaussian_statistics(y)
    values = torch.linalg.eigvals(ca @ cb)
    expected = (ma - mb).square().sum() + ca.trace() + cb.trace() - 2 * values.sqrt().real.sum()
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert torch.allclose(ca, torch.cov(x.T))


def test_share_with_error():
    assert share_with_error(90, 100) == (0.9, pytest.approx(0.03))
    assert math.isnan(share_with_error(0, 0)[0])


# --- readings against the truth --------------------------------------------------------------------------------------


def test_a_perfect_reading_is_right_in_everything(scenes):
    tally = Tally()
    tally.add(compare(perfect_detections(scenes), scenes))
    assert set(tally.accuracy()) == {*ATTRIBUTES, "whole"}
    assert all(share == 1.0 for share in tally.accuracy().values())
    assert tally.total["shape"] == int(scenes.count.sum())


@pytest.mark.parametrize("name", OBJECT_ATTRIBUTES)
def test_one_flipped_attribute_lowers_exactly_that_attribute(scenes, name):
    detections = perfect_detections(scenes)
    if name in ("shape", "size"):  # what decides where an object seems to stand: of a lone object only
        row = int((scenes.count == 1).nonzero()[0])
    else:
        row = int((scenes.count == 3).nonzero()[0])
    detections.attributes[name][row, 0] = 1 - detections.attributes[name][row, 0].clamp(max=1)
    tally = Tally()
    tally.add(compare(detections, scenes))
    shares = tally.accuracy()
    assert shares.pop(name) == pytest.approx(1 - 1 / int(scenes.count.sum()))
    assert shares.pop("whole") == pytest.approx(1 - 1 / len(scenes))
    assert all(share == 1.0 for share in shares.values())


def test_flipped_light_and_count(scenes):
    detections = perfect_detections(scenes)
    detections.light[0] = (detections.light[0] + 1) % 3
    row = int((scenes.count == 3).nonzero()[0])
    detections.count[row] = 2
    marks = compare(detections, scenes)
    assert marks["light"][0].tolist() == [0] + [1] * 23
    assert int(marks["count"][0][row]) == 0 and int(marks["count"][0].sum()) == 23
    # The third object was not seen: it is wrong in every attribute and in its two relations.
    for name in OBJECT_ATTRIBUTES:
        assert int(marks[name][1][row] - marks[name][0][row]) == 1
    assert int(marks["relation"][1][row] - marks["relation"][0][row]) == 2


def test_matching_does_not_depend_on_the_order_of_the_detections(scenes):
    detections = perfect_detections(scenes)
    row = int((scenes.count == 3).nonzero()[0])
    order = torch.tensor([2, 0, 1])
    detections.xy[row] = detections.xy[row][order]
    for name in OBJECT_ATTRIBUTES:
        detections.attributes[name][row] = detections.attributes[name][row][order]
    assert match(detections, scenes)[row].tolist() == [1, 2, 0]
    tally = Tally()
    tally.add(compare(detections, scenes))
    assert tally.accuracy()["whole"] == 1.0
    detections.xy[row] += 0.5
    assert match(detections, scenes)[row].tolist() == [-1, -1, -1]


def test_screen_centres_lead_back_to_the_plane(scenes):
    places = plane_positions(project(scenes), scenes.shape, scenes.size)
    assert torch.allclose(places[scenes.present], scenes.position[scenes.present], atol=1e-3)


# --- the recogniser --------------------------------------------------------------------------------------------------


def painted_maps(scenes, grid=16):
    """The outputs of a network that knows: high objectness in the cell of each centre, the right classes, offsets."""
    targets = scene_targets(scenes)
    batch = len(scenes)
    maps = RecogniserMaps(
        objectness=torch.full((batch, grid, grid), -12.0),
        offset=torch.zeros(batch, 2, grid, grid),
        attributes={
            name: torch.zeros(batch, n, grid, grid) for name, n in zip(OBJECT_ATTRIBUTES, (4, 8, 2, 2), strict=True)
        },
        light=12 * torch.nn.functional.one_hot(scenes.light, 3).float(),
        count=12 * torch.nn.functional.one_hot(scenes.count - 1, 3).float(),
        features=torch.zeros(batch, 4),
    )
    for b in range(batch):
        centres = targets["centre"][b, : int(scenes.count[b])] * grid
        for y in range(grid):
            for x in range(grid):
                away = centres - torch.tensor([x + 0.5, y + 0.5])
                k = int(away.norm(dim=-1).argmin())
                if away[k].norm() >= 1.0:
                    continue
                # As in training, the neighbours of the cell that holds a centre know the object too.
                maps.objectness[b, y, x] = 12.0 if bool((away[k].abs() <= 0.5).all()) else -2.0
                maps.offset[b, :, y, x] = away[k]
                for name in OBJECT_ATTRIBUTES:
                    maps.attributes[name][b, targets[name][b, k], y, x] = 12.0
    return maps


def test_decoding_finds_what_perfect_maps_say(scenes):
    maps = painted_maps(scenes)
    detections = decode(maps, max_objects=3)
    tally = Tally()
    tally.add(compare(detections, scenes))
    assert tally.accuracy()["whole"] == 1.0
    forced = decode(maps, 3, count=torch.full((len(scenes),), 2))
    assert (forced.count == 2).all()


def test_decoding_keeps_two_objects_in_neighbouring_cells_apart():
    maps = painted_maps(sample_scenes(1, seed=0, split="all"))
    maps.objectness.fill_(-12.0)
    for x, away in ((7, -0.5), (8, 0.5)):  # the centres are two cells apart, the peaks one
        maps.objectness[0, 5, x] = 6.0
        maps.offset[0, 0, 5, x] = away
        maps.offset[0, 1, 5, x] = 0.0
    found = decode(maps, 2, count=torch.tensor([2]))
    assert sorted((found.xy[0, :, 0] * 16).tolist()) == pytest.approx([7.0, 9.0])


def test_the_loss_of_perfect_maps_is_nearly_nothing(scenes):
    targets = scene_targets(scenes)
    right = recogniser_terms(painted_maps(scenes), targets)
    assert set(right) == {"objectness", "offset", *OBJECT_ATTRIBUTES, "light", "count"}
    assert max(float(value) for value in right.values()) < 0.06, right
    wrong = painted_maps(scenes)
    wrong.attributes["color"] = wrong.attributes["color"].roll(1, dims=1)
    terms = recogniser_terms(wrong, targets)
    assert terms["color"] > 5
    assert all(terms[name] == right[name] for name in right if name != "color")


def test_the_recogniser_survives_saving_and_reads_any_size(tiny, pixels, tmp_path):
    tiny.save_pretrained(tmp_path)
    again = SceneRecogniser.from_pretrained(tmp_path).eval()
    assert again.words == tiny.words and again.words["color"] == COLORS and again.words["shape"] == SHAPES
    assert torch.equal(again(pixels[:4]).objectness, tiny(pixels[:4]).objectness)
    assert tiny.features(pixels[:4]).shape == (4, tiny.feature_dim)
    large = torch.nn.functional.interpolate(pixels[:2], scale_factor=2, mode="nearest")
    assert (fit(large, 64) - pixels[:2]).abs().mean() < 0.1 and fit(pixels, 64) is pixels
    readings = tiny.recognise(large)
    assert len(readings) == 2
    for reading in readings:
        assert 1 <= reading.count <= 3 and reading.light in ("day", "dusk", "night")
        for entry in reading.objects:
            assert entry["shape"] in SHAPES and 0 <= entry["score"] <= 1
        assert set(reading.scores) == {"light", "count", *OBJECT_ATTRIBUTES}
    half = SceneRecogniser(**TINY).to(torch.float16)
    half.save_pretrained(tmp_path / "half")
    assert common.load_recogniser(tmp_path / "half").dtype == torch.float32


def test_the_shipped_size_fits_its_budget():
    assert sum(p.numel() for p in SceneRecogniser().parameters()) <= 2_500_000


def test_the_recogniser_refuses_bad_input(tiny):
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        tiny(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="eval"):
        SceneRecogniser(**TINY).train().recognise(torch.zeros(1, 3, 64, 64))


# --- training --------------------------------------------------------------------------------------------------------


def test_augmentation_moves_pictures_and_centres_together():
    pixels = torch.full((16, 3, 32, 32), -1.0)
    pixels[:, :, 15, 15] = 1.0
    moved, shift = augment(pixels, torch.Generator().manual_seed(0), shift=2, blur=0.0, noise=0.0, tint=0.0)
    peaks = moved[:, 0].flatten(1).argmax(1)
    found = torch.stack([peaks % 32, peaks // 32], 1)
    assert torch.equal(found, 15 + (shift * 32).round().long())
    assert shift.abs().max() > 0
    again, _ = augment(pixels, torch.Generator().manual_seed(0))
    once_more, _ = augment(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(again, once_more) and again.abs().max() <= 1
    assert not torch.equal(again, moved)


def test_the_recogniser_learns_from_its_recipe(tmp_path):
    recipe = Recipe(
        task="recogniser",
        output=str(tmp_path / "run"),
        steps=30,
        batch_size=16,
        precision="no",
        export_dtype="fp16",
        log_every=1,
        validate_every=0,
        sample_every=0,
        optimizer=OptimizerRecipe(learning_rate=3e-3, warmup_steps=3),
        model=TINY,
        data={"scenes": 48, "validation": 8},
    )
    export = run(recipe, progress=False)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert {"shape", "light", "whole"} <= set(log[-1]["validation"])
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    assert common.load_recogniser(export).config.neck_width == TINY["neck_width"]
    with pytest.raises(ValueError, match="did you mean noise"):
        build_task(Recipe(task="recogniser", output=str(tmp_path / "other"), steps=1, data={"nois": 1}))


# --- evaluations -----------------------------------------------------------------------------------------------------


def true_reading(scenes, index):
    return SceneReading(scenes.objects(index), LIGHTS[int(scenes.light[index])])


def test_prompts_are_held_out_and_judged_fact_by_fact():
    scenes = sample_scenes(40, seed=1, split="heldout")
    captions = heldout_prompts(scenes)
    assert [c.text for c in captions] == [c.text for c in heldout_prompts(scenes)]
    for index, caption in enumerate(captions):
        kinds = {fact.kind for fact in caption.facts}
        assert {"shape", "color", "size", "count"} <= kinds
        assert ({"material", "light"} if int(scenes.count[index]) == 1 else {"relation"}) <= kinds
    readings = [true_reading(scenes, index) for index in range(len(scenes))]
    score = judge_prompts(captions, readings)
    assert all(score.whole) and set(score.attribute_accuracy().values()) == {1.0}

    row = int((scenes.count == 1).nonzero()[0])
    readings[row].objects[0]["color"] = "red" if readings[row].objects[0]["color"] != "red" else "blue"
    score = judge_prompts(captions, readings)
    assert [k for k, good in enumerate(score.whole) if not good] == [row]
    accuracy = score.attribute_accuracy()
    assert accuracy.pop("color") == pytest.approx(1 - 1 / int(scenes.count.sum()))
    assert set(accuracy.values()) == {1.0}


class KnowingRecogniser(SceneRecogniser):
    """Reads the scenes from a list instead of the pictures; keeps the network for the features."""

    def expect(self, *batches):
        self.coming = list(batches)
        return self

    def recognise(self, images):
        scenes = self.coming.pop(0)
        return [true_reading(scenes, index) for index in range(len(images))]

    def detect(self, images, count=None):
        return perfect_detections(self.coming.pop(0))


class RenderingPipeline:
    """A text-to-image model without fault: it renders the scene that each prompt was made from."""

    def __init__(self, scenes):
        self.scenes = scenes
        self.seen = []

    def __call__(self, prompt, generator, output_type):
        assert output_type == "pt" and len(prompt) == len(generator)
        part = self.scenes[len(self.seen) : len(self.seen) + len(prompt)]
        self.seen += prompt
        return SimpleNamespace(images=render(part, 64).float() / 255)


def test_text_to_image_evaluation_of_a_faultless_model(monkeypatch):
    monkeypatch.setitem(evaluation.text_to_image.__globals__, "REAL_RENDERS", 6)
    scenes = common.fresh_scenes(12, 5, "heldout")
    real = common.fresh_scenes(6, 5, "all")
    torch.manual_seed(0)
    judge = KnowingRecogniser(**TINY).expect(scenes[:8], scenes[8:], real)
    pipe = RenderingPipeline(scenes)
    result = evaluation.text_to_image(pipe, prompts=12, seed=5, batch_size=8, progress=False, recogniser=judge)
    assert result["prompt_accuracy"] == 1.0 and result["prompt_accuracy_standard_error"] == 0.0
    assert set(result["attribute_accuracy"].values()) == {1.0}
    assert set(result["recogniser_accuracy"]) == set(ATTRIBUTES)
    assert set(result["recogniser_accuracy"].values()) == {1.0}
    assert result["frechet_distance"] < 1e-4 < result["frechet_distance_of_renders"]
    assert result["prompts"] == 12 and result["seed"] == 5 and result["seconds"] >= 0
    assert pipe.seen == [caption.text for caption in heldout_prompts(scenes)]


def test_questions_take_turns_and_answers_are_scored_by_type():
    scenes, asked = fresh_questions(19, seed=0)
    assert len(scenes) == len(asked) == 19
    assert [item.type for item in asked] == [QUESTION_TYPES[k % 8] for k in range(19)]
    for index, item in enumerate(asked):
        offered = questions(scenes, index, random.Random(int(scenes.seed[index])))
        assert item in offered
    perfect = score_answers(asked, [item.answer.upper() + "." for item in asked])
    assert perfect["answer_accuracy"] == 1.0 and set(perfect["answer_accuracy_by_type"]) == set(QUESTION_TYPES)
    answers = [item.answer for item in asked]
    answers[1] = "violet"
    flawed = score_answers(asked, answers)
    assert flawed["answer_accuracy"] == pytest.approx(18 / 19)
    assert flawed["answer_accuracy_by_type"].pop(asked[1].type) == pytest.approx(2 / 3)
    assert set(flawed["answer_accuracy_by_type"].values()) == {1.0}


class Oracle:
    """An image-to-text model that knows the answers, except to questions about color."""

    image_size = 32

    def __init__(self, asked):
        self.answers = {item.question: item for item in asked}

    def ask(self, images, question, generator):
        assert images[0].size == (32, 32) and len(images) == len(question) == len(generator)
        known = [self.answers[text] for text in question]
        answers = ["red-ish" if item.type == "color" else item.answer for item in known]
        return SimpleNamespace(texts=answers, cost=None)


def test_image_to_text_evaluation():
    _, asked = fresh_questions(8, seed=0)
    result = evaluation.image_to_text(Oracle(asked), questions=8, seed=0, batch_size=3, progress=False)
    assert result["answer_accuracy"] == 0.875 and result["answer_accuracy_by_type"]["color"] == 0.0
    assert result["questions"] == 8 and sum(result["answer_accuracy_by_type"].values()) == 7


def test_reconstruction_evaluation(tmp_path):
    torch.manual_seed(0)
    sizes = {"base_channels": 8, "z_channels": 8, "codebook_size": 16, "codebook_dim": 4, "norm_groups": 4}
    tokenizer = VQTokenizer(**sizes, encoder_multipliers=[1, 1], decoder_multipliers=[1, 1], num_res_blocks=1)
    tokenizer.save_pretrained(tmp_path)
    judge = SceneRecogniser(**TINY)
    result = evaluation.reconstruction(tokenizer, images=5, batch_size=2, progress=False, recogniser=judge)
    assert set(result) >= {"psnr", "ssim", "read_back", "images", "seed", "seconds"}
    again = evaluation.reconstruction(str(tmp_path), images=5, batch_size=5, progress=False, recogniser=judge)
    assert again["psnr"] == pytest.approx(result["psnr"], abs=1e-3) and -1 < result["ssim"] < 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: evaluation.text_to_image(object(), prompts=0),
        lambda: evaluation.image_to_text(object(), questions=1.5),
        lambda: evaluation.reconstruction(object(), images=-3),
    ],
)
def test_bad_counts_are_refused(call):
    with pytest.raises(ValueError, match="must be a positive integer"):
        call()


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        common.load_pipeline("text-to-image", str(tmp_path / "nowhere"))
