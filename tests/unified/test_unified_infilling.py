"""Infilling with the unified model: training rows, images, captions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from unified_helpers import CODES, SIZE, generators, load

from armm.decoding.infilling import fill_image
from armm.decoding.sampling import Sampler
from armm.training.tasks.unified import UnifiedTask
from pipelines.unified_image_to_text import UnifiedImageToTextPipeline
from pipelines.unified_inpaint import UnifiedInpaintPipeline


@pytest.fixture(scope="module")
def infilling(recipe, tmp_path_factory):
    """A briefly trained task with holes, and the folder of its export."""
    torch.manual_seed(0)
    task = UnifiedTask(
        dataclasses.replace(
            recipe,
            model={**recipe.model, "holes": 6, "answer_slots": 34},
            data={**recipe.data, "infilling_share": 0.5},
        )
    )
    task.prepare(torch.device("cpu"))
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=3e-3)
    task.losses = []
    for step in range(30):
        loss, logs = task.loss(task.batch(step, 8, 0), step, step / 30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.losses.append(logs["infilling"].item())
    task.module.eval()
    directory = tmp_path_factory.mktemp("infilling") / "export"
    task.export(directory)
    return task, directory


def test_infilling_is_learned(infilling):
    losses = infilling[0].losses
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_holed_rows_hold_the_whole_image_and_train_no_sentinel(infilling):
    task, _ = infilling
    batch = task.batch(3, 8, 0)
    words = task.words
    for tokens, cells, targets, codes in zip(
        *(batch[name] for name in ("holed", "holed_cells", "holed_targets", "drawing_codes")), strict=False
    ):
        seen = {int(cell): int(token) - len(words) for cell, token in zip(cells, tokens, strict=True) if token >= len(words)}
        assert [seen[cell] for cell in range(task.image_tokens)] == codes.tolist()
        sentinels = torch.isin(tokens, torch.tensor(words.holes))
        number = int(sentinels.sum()) // 2
        assert sentinels.sum() == 2 * number and 1 <= number <= 6
        expected = torch.where(sentinels | (tokens == words.pad), -100, tokens - len(words))
        assert torch.equal(targets, expected)


def test_infilled_regions_see_both_sides_and_keep_the_rest(infilling, picture):
    paint = load(UnifiedInpaintPipeline, infilling[1])
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[: SIZE // 2, SIZE // 2 :] = 255
    options = {"output_type": "latent", "guidance_scale": 2.0}
    known = paint.encode_image(picture)
    drawn = paint("a red cube", picture, mask, generator=generators(1), **options).images
    cells = paint.mask_to_cells(mask).flatten(1)
    assert torch.equal(drawn[~cells], known[~cells]) and (drawn >= 0).all()
    assert paint.num_timesteps == int(cells.sum()) + 1  # the second hole's sentinel is fed as well
    # What lies behind the hole in raster order matters to infilling, and not to redrawing in order.
    other = known.clone()
    other[:, -1] = (other[:, -1] + 1) % CODES
    prefix, words = paint.encode_prompt("a red cube"), paint.words
    model, condition = paint.transformer, paint.transformer.prefix_condition(prefix)
    recorded = []
    for codes in (known, other):
        filled: list[torch.Tensor] = []

        class Watching(Sampler):
            def __call__(self, logits, noise=None, filled=filled):
                filled.append(logits)
                return logits.argmax(-1)

        options = {"sentinel_ids": words.holes, "pad_id": words.pad, "vocabulary": paint.code_range}
        fill_image(model, condition, codes, cells, **options, sampler=Watching(do_sample=False))
        recorded.append(torch.stack(filled))
    assert not torch.allclose(recorded[0], recorded[1])


def test_infilling_alone_equals_infilling_in_a_batch(infilling, picture):
    paint = load(UnifiedInpaintPipeline, infilling[1])
    wide, small = np.zeros((SIZE, SIZE), dtype=np.uint8), np.zeros((SIZE, SIZE), dtype=np.uint8)
    wide[: SIZE // 2] = 255
    small[-1, -1] = 255
    options = {"output_type": "latent", "guidance_scale": 2.0}
    both = paint(["a red cube", "a blue cone"], picture, [wide, small], generator=generators(1, 2), **options).images
    for row, (prompt, mask) in enumerate((("a red cube", wide), ("a blue cone", small))):
        alone = paint(prompt, picture, mask, generator=generators(row + 1), **options).images
        assert torch.equal(alone[0], both[row])


def test_captions_with_holes_are_filled(infilling, picture):
    read = load(UnifiedImageToTextPipeline, infilling[1])
    texts = read([picture, picture], caption="a small ... cube").texts
    assert texts[0] == texts[1] and texts[0].startswith("a small") and texts[0].endswith("cube")
    for arguments, message in (
        ({"caption": "a red cube"}, "one hole"),
        ({"caption": "a ... cube", "question": "is it day?"}, "exclude"),
        ({"caption": "a ... walrus"}, "walrus"),
    ):
        with pytest.raises(ValueError, match=message):
            read(picture, **arguments)


def test_models_without_holes_say_so(inpaint, read, picture):
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[0, 0] = 255
    with pytest.raises(ValueError, match="infill"):
        inpaint("a red cube", picture, mask, infill=True)
    with pytest.raises(ValueError, match="fill holes"):
        read(picture, caption="a ... cube")
