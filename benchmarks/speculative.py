"""Speculative decoding against plain decoding, in one run: ``python benchmarks/speculative.py [--json FILE] [--plot FILE]``.

Two models: the shipped scenes weights, where pictures can be graded (prompt following read by the recogniser, Frechet distance of its
features to fresh renders), and a LlamaGen-B-sized transformer with random weights, where only speed means anything; random weights
are no model of images, so its drafts are taken as rarely as can be, and a few pictures say all there is to say. ``--loosening`` sweeps the
knobs of grouped and relaxed verification on the scenes. Calls and seconds are of held-out prompts, drawn in turn by all ways of decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import armm
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.speculative import Speculative, TokenRecycling
from armm.evaluation.common import fresh_scenes, sample_generator
from armm.evaluation.text_to_image import heldout_prompts, text_to_image
from armm.model import AutoregressiveModel
from pipelines import LlamaGenPipeline
from tokenizers_visual import VQTokenizer

GROUPS = (0, 2, 6, 14)
DELTAS = (0.0, 0.1, 0.2, 0.4)
COUPLED: dict[str, Any] = {"init": "repeat_left", "redraw": "coupled"}


def accelerations(window: int, sweep: bool) -> dict[str, Speculative | None]:
    """What is compared, by name; None is plain next-token decoding."""
    found: dict[str, Speculative | None] = {
        "next token": None,
        "SJD, exact": armm.JacobiSpeculative(window, init="repeat_left"),
        "SJD, coupled": armm.JacobiSpeculative(window, **COUPLED),
        "SJD, same pictures": armm.JacobiSpeculative(window, init="repeat_left", rule="match"),
        "SJD, random drafts": armm.JacobiSpeculative(window),
        "token recycling, exact": armm.Speculative(TokenRecycling(min(window, 8))),
    }
    groups, deltas = (GROUPS, DELTAS) if sweep else (GROUPS[1:2], DELTAS[1:2])
    for size in groups:
        anywhere: dict[str, Any] = {"p_threshold": 0.5, "distance_threshold": float("inf")}
        found[f"GSD, groups of {size}"] = armm.GroupedSpeculative(window, size, **anywhere, **COUPLED)
    for delta in deltas:
        found[f"LANTERN, delta {delta:g}"] = armm.RelaxedSpeculative(window, delta, **COUPLED)
    return found


def scenes(device: str, dtype: torch.dtype) -> Any:
    """The shipped model, drawing one candidate: choosing among several would hide what each decoding does to a draw."""
    pipe = armm.pipeline("text-to-image", torch_dtype=dtype).to(device)
    pipe.register_generation_config({**pipe.config["generation_config"], "num_candidates": 1})
    return pipe


def llamagen(device: str, dtype: torch.dtype) -> LlamaGenPipeline:
    """LlamaGen-B at 256 pixels (111 M parameters, 16 x 16 tokens of 16384 codes) with random weights."""
    torch.manual_seed(0)
    trunk = {"dim": 768, "num_layers": 12, "num_heads": 12, "mlp_hidden": 2048, "rotary_axes": [32, 32]}
    model = AutoregressiveModel(
        vocab_size=16384, transformer=trunk, condition={"type": "class", "num_classes": 1000}, grid=(16, 16)
    )
    tokenizer = VQTokenizer(base_channels=32, encoder_multipliers=[1, 1, 1, 1, 1], decoder_multipliers=[1, 1, 1, 1, 1],
                            num_res_blocks=1, z_channels=32, codebook_size=16384, codebook_dim=8)  # fmt: skip
    pipe = LlamaGenPipeline(tokenizer.eval(), model.eval(), NextTokenDecoding()).to(device, dtype)
    pipe.fuse_projections()
    return pipe


def switch(pipe: Any, acceleration: Speculative | None) -> None:
    if acceleration is None:
        pipe.disable_acceleration()
    else:
        pipe.enable_acceleration(acceleration)


def timed(
    pipe: Any, ways: dict[str, Speculative | None], requests: list[dict[str, Any]], batch: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Median seconds and mean calls of the transformer of every way of decoding, over all `requests`, `batch` of them at a time.

    All ways draw a picture one after the other before the next one's turn comes, each time beginning with another of them, so that
    whatever else the machine does meets them alike.
    """
    counted = 0

    def count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    def draw(first: int) -> None:
        rows = requests[first : first + batch]
        generators = [sample_generator(seed, first + row) for row in range(len(rows))]
        pipe(**{name: [row[name] for row in rows] for name in rows[0]}, generator=generators, output_type="latent")
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    calls: dict[str, list[int]] = {name: [] for name in names}
    tested, taken = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    handle = pipe.transformer.trunk.register_forward_hook(count)
    try:
        for name in names:
            switch(pipe, ways[name])
            draw(0)  # to warm up
        for turn, first in enumerate(range(0, len(requests) - batch + 1, batch)):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                switch(pipe, ways[name])
                counted, start = 0, time.perf_counter()
                draw(first)
                seconds[name].append(time.perf_counter() - start)
                calls[name].append(counted)
                if ways[name] is not None:
                    tested[name] += int(pipe.acceleration.statistics.tested.sum())
                    taken[name] += int(pipe.acceleration.statistics.taken.sum())
    finally:
        handle.remove()
    return {
        name: {
            f"seconds_batch_{batch}": statistics.median(seconds[name]),
            f"calls_batch_{batch}": statistics.mean(calls[name]),
            f"acceptance_rate_batch_{batch}": taken[name] / max(tested[name], 1),
        }
        for name in names
    }


def measure(
    pipe: Any, requests: list[dict[str, Any]], options: argparse.Namespace, graded: bool
) -> dict[str, dict[str, Any]]:
    ways = accelerations(options.window, options.loosening and graded)
    rows: dict[str, dict[str, Any]] = {
        name: {"loosening": None if way is None else way.loosening, "pictures": len(requests)}
        for name, way in ways.items()
    }
    for batch in options.batches:
        if batch > len(requests):
            print(f"  batch {batch}: left out, there are {len(requests)} pictures", flush=True)
            continue
        for name, figures in timed(pipe, ways, requests, batch, options.seed).items():
            rows[name] |= figures
            print(f"  {name}: {figures}", flush=True)
    for name, acceleration in ways.items():
        if not graded or not options.prompts:
            break
        switch(pipe, acceleration)
        scores = text_to_image(pipe, prompts=options.prompts, seed=options.seed, progress=False)
        kept = (
            "prompt_accuracy",
            "prompt_accuracy_standard_error",
            "frechet_distance",
            "frechet_distance_of_renders",
        )
        rows[name] |= {key: scores[key] for key in kept}
        print(f"  {name}: {rows[name]}", flush=True)
        if acceleration is not None and options.maps is not None:
            options.maps.mkdir(parents=True, exist_ok=True)
            file = "".join(letter if letter.isalnum() else "-" for letter in name)
            acceleration.statistics.heat_map(24).save(options.maps / f"{file}.png")
    pipe.disable_acceleration()
    return rows


def table(rows: dict[str, dict[str, Any]], batches: list[int]) -> str:
    """The figures as a markdown table."""
    plain = rows["next token"]
    batches = [batch for batch in batches if f"calls_batch_{batch}" in plain]
    graded = "prompt_accuracy" in plain
    heads = ["decoding"]
    for batch in batches:
        heads += [f"calls, batch {batch}", "fewer", f"ms a picture, batch {batch}", "faster"]
    heads += ["prompts right", "Frechet distance"] if graded else []
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        cells = [name]
        for batch in batches:
            calls, seconds = row[f"calls_batch_{batch}"], row[f"seconds_batch_{batch}"]
            cells += [f"{calls:.1f}", f"{plain[f'calls_batch_{batch}'] / calls:.2f}x"]
            cells += [f"{1000 * seconds / batch:.1f}", f"{plain[f'seconds_batch_{batch}'] / seconds:.2f}x"]
        if graded:
            accuracy, error = row["prompt_accuracy"], row["prompt_accuracy_standard_error"]
            cells += [f"{100 * accuracy:.1f}% ± {100 * error:.1f}", f"{row['frechet_distance']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]], batch: int, path: Path) -> None:
    """Prompt following (or nothing, of random weights) against calls, one point a way of decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    markers = {"SJD": "o", "GSD": "s", "LANTERN": "^"}
    for name, row in rows.items():
        if "prompt_accuracy" not in row:
            continue
        x, y = row[f"calls_batch_{batch}"], 100 * row["prompt_accuracy"]
        marker = next((found for family, found in markers.items() if name.startswith(family)), "D")
        axes.errorbar(x, y, yerr=100 * row["prompt_accuracy_standard_error"], fmt=marker, capsize=3, label=name)
    figure.legend(loc="outside right upper", fontsize=9)
    axes.set_xlabel(f"calls of the transformer a picture (batch {batch})")
    axes.set_ylabel("prompts right, %")
    axes.set_xlim(left=0)
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("scenes", "llamagen-b"), default=["scenes", "llamagen-b"])
    parser.add_argument("--window", type=int, default=8, help="tokens that one call takes (default: 8)")
    parser.add_argument("--loosening", action="store_true", help="sweep the group size and delta")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts, 0 grades nothing (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and draws (default: 0)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="batch sizes to time (default: 1)")
    parser.add_argument("--pictures", type=int, default=100, help="held-out prompts to time (default: 100)")
    parser.add_argument(
        "--llamagen-pictures", type=int, default=3, help="pictures of the random weights to time (default: 3)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of all ways (default: float32)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--maps", type=Path, default=None, help="write heat maps of acceptance to this folder")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, default=None, help="write a plot to this file (needs matplotlib)")
    options = parser.parse_args()
    if min(options.window, options.pictures, options.llamagen_pictures) < 1 or options.prompts < 0:
        parser.error("--window, --pictures and --llamagen-pictures must be at least 1, --prompts at least 0")
    if options.threads:
        torch.set_num_threads(options.threads)

    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model in options.models:
        graded, dtype = model == "scenes", getattr(torch, options.dtype)
        pipe = scenes(options.device, dtype) if graded else llamagen(options.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        requests: list[dict[str, Any]] = [{"class_labels": 207 + number} for number in range(options.llamagen_pictures)]
        if graded:
            captions = heldout_prompts(fresh_scenes(options.pictures, options.seed, "heldout"))
            requests = [{"prompt": caption.text} for caption in captions]
        results[model] = measure(pipe, requests, options, graded)
    settings = f"{torch.get_num_threads()} threads, {options.device}, {options.dtype}"
    print(f"{settings}, torch {torch.__version__}, window {options.window}\n")
    for model, rows in results.items():
        pictures = rows["next token"]["pictures"]
        print(f"{model}, medians of {pictures} pictures\n\n{table(rows, options.batches)}\n")
    if options.plot is not None and "scenes" in results:
        plot(results["scenes"], options.batches[0], options.plot)
    if options.json is not None:
        record = {
            "window": options.window,
            "prompts": options.prompts,
            "dtype": options.dtype,
            "threads": torch.get_num_threads(),
            "models": results,
        }
        handle, temporary = tempfile.mkstemp(dir=options.json.resolve().parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
