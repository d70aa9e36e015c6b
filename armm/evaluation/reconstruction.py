"""What a tokenizer keeps of a picture: PSNR, SSIM, and whether the recogniser still reads the scene."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from tokenizers_visual.base import VisualTokenizer
from tokenizers_visual.loading import load_tokenizer as of_folder

from .common import (
    check_count,
    figures,
    fresh_scenes,
    load_pipeline,
    load_recogniser,
    picture_size,
    rendered,
    sample_generator,
)
from .metrics import psnr, ssim
from .reading import Tally, compare
from .recogniser import SceneRecogniser


def reconstruction(
    model: Any = None,
    images: int = 1000,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    recogniser: SceneRecogniser | str | Path | None = None,
    size: int | None = None,
) -> dict[str, Any]:
    """Encodes and decodes real renders of held-out scenes.

    Args:
        model: a folder of a pipeline or of a tokenizer, a pipeline, a tokenizer, or None for the shipped one.
        images: how many.
        seed: of the scenes.
        batch_size: pictures at once.
        progress: show a progress bar.
        recogniser: the judge of `read_back`; a folder, a `SceneRecogniser`, or None for the shipped one.
        size: side of the pictures in pixels; None is what a pipeline's model was made for, or 64.

    Returns:
        Means over pictures of `psnr` (dB) and `ssim`, and `read_back`: the share of reconstructions of which the recogniser
        reads every object, attribute and relation rightly (`read_back_by_attribute` apart; `read_back_of_originals` is the
        same of the pictures themselves, the ceiling).
    """
    check_count("images", images)
    check_count("batch_size", batch_size)
    judge = load_recogniser(recogniser)
    tokenizer, own_size = load_tokenizer(model)
    size = own_size if size is None else size
    device = next(tokenizer.parameters()).device
    scenes = fresh_scenes(images, seed + 2, "heldout")
    started = time.perf_counter()
    ratios, similarities = [], []
    restored_tally, original_tally = Tally(), Tally()
    with tqdm(total=images, desc="reconstructing", unit="image", disable=not progress) as bar, torch.no_grad():
        for pixels, part in rendered(scenes, size, batch_size):
            codes = tokenizer.encode(pixels.to(device, next(tokenizer.parameters()).dtype))
            generators = [
                sample_generator(seed, int(bar.n) + i) for i in range(len(pixels))
            ]  # of decoders that begin with noise
            restored = tokenizer.decode(codes, generator=generators).float()  # type: ignore[arg-type]
            restored = restored.cpu().clamp(-1, 1)
            ratios.append(psnr(restored, pixels))
            similarities.append(ssim(restored, pixels))
            restored_tally.add(compare(judge.detect(restored).to("cpu"), part))
            original_tally.add(compare(judge.detect(pixels).to("cpu"), part))
            bar.update(len(part))
    read = restored_tally.accuracy()
    return figures(
        {
            "psnr": float(torch.cat(ratios).mean()),
            "ssim": float(torch.cat(similarities).mean()),
            "read_back": read.pop("whole"),
            "read_back_by_attribute": read,
            "read_back_of_originals": original_tally.accuracy()["whole"],
            "images": images,
            "seed": seed,
            "seconds": round(time.perf_counter() - started, 1),
        }
    )


def load_tokenizer(model: Any = None) -> tuple[VisualTokenizer, int]:
    """A visual tokenizer (the one given, a pipeline's, or that of a folder of either) and the size of its pictures."""
    if isinstance(model, VisualTokenizer):
        return model.eval(), 64
    if isinstance(model, (str, Path)) and (Path(model) / "config.json").is_file():
        return of_folder(model, torch.float32), 64
    pipe = load_pipeline("text-to-image", model)
    return pipe.tokenizer.eval(), picture_size(pipe)
