"""Speculative decoding against plain decoding, in one run: ``python benchmarks/speculative.py [--json FILE] [--plot FILE]``.

Two models: the shipped scenes weights, where pictures can be graded (prompt following read by the recogniser, Frechet distance of its
features to fresh renders), and a LlamaGen-B-sized transformer with random weights, where only speed means anything; random weights
are no model of images, so its drafts are taken as rarely as can be. ``--loosening`` sweeps the knobs of grouped and relaxed verification.
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
from armm.evaluation.text_to_image import text_to_image
from armm.model import AutoregressiveModel
from pipelines import LlamaGenPipeline
from tokenizers_visual import VQTokenizer

PROMPT = "a small red sphere to the left of a large blue cube"
GROUPS = (0, 6, 14, 28)
DELTAS = (0.0, 0.1, 0.2, 0.4)


def accelerations(window: int, sweep: bool) -> dict[str, Speculative | None]:
    """What is compared, by name; None is plain next-token decoding."""
    found: dict[str, Speculative | None] = {
        "next token": None,
        "SJD, exact": armm.JacobiSpeculative(window, init="repeat_left"),
        "SJD, same pictures": armm.JacobiSpeculative(window, init="repeat_left", rule="match"),
        "SJD, random drafts": armm.JacobiSpeculative(window),
        "token recycling, exact": armm.Speculative(TokenRecycling(min(window, 8))),
    }
    groups, deltas = (GROUPS, DELTAS) if sweep else (GROUPS[2:3], DELTAS[1:2])
    for size in groups:
        grouped = armm.GroupedSpeculative(
            window, size, p_threshold=0.5, distance_threshold=float("inf"), init="repeat_left"
        )
        found[f"GSD, groups of {size}"] = grouped
    for delta in deltas:
        found[f"LANTERN, delta {delta:g}"] = armm.RelaxedSpeculative(window, delta, init="repeat_left")
    return found


def scenes(device: str) -> Any:
    """The shipped model, drawing one candidate: choosing among several would hide what each decoding does to a draw."""
    pipe = armm.pipeline("text-to-image").to(device)
    pipe.register_generation_config({**pipe.config["generation_config"], "num_candidates": 1})
    return pipe


def llamagen(device: str) -> LlamaGenPipeline:
    """LlamaGen-B at 256 pixels (111 M parameters, 16 x 16 tokens of 16384 codes) with random weights."""
    torch.manual_seed(0)
    trunk = {"dim": 768, "num_layers": 12, "num_heads": 12, "mlp_hidden": 2048, "rotary_axes": [32, 32]}
    model = AutoregressiveModel(
        vocab_size=16384, transformer=trunk, condition={"type": "class", "num_classes": 1000}, grid=(16, 16)
    )
    tokenizer = VQTokenizer(base_channels=32, encoder_multipliers=[1, 1, 1, 1, 1], decoder_multipliers=[1, 1, 1, 1, 1],
                            num_res_blocks=1, z_channels=32, codebook_size=16384, codebook_dim=8)  # fmt: skip
    pipe = LlamaGenPipeline(tokenizer.eval(), model.eval(), NextTokenDecoding()).to(device)
    pipe.fuse_projections()
    return pipe


def timed(pipe: Any, request: dict[str, Any], batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a call and mean calls of the transformer for it, after one call to warm up."""
    seconds, calls = [], []
    counted = 0

    def count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    handle = pipe.transformer.trunk.register_forward_hook(count)
    try:
        for run in range(repeats + 1):
            counted = 0
            generators = [torch.Generator().manual_seed(1000 * run + row) for row in range(batch)]
            start = time.perf_counter()
            pipe(
                **{name: [value] * batch for name, value in request.items()}, generator=generators, output_type="latent"
            )
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            calls.append(counted)
    finally:
        handle.remove()
    return statistics.median(seconds[1:]), statistics.mean(calls[1:])


def measure(pipe: Any, request: dict[str, Any], options: argparse.Namespace, graded: bool) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for name, acceleration in accelerations(options.window, options.loosening).items():
        if acceleration is None:
            pipe.disable_acceleration()
        else:
            pipe.enable_acceleration(acceleration)
        row: dict[str, Any] = {"loosening": None if acceleration is None else acceleration.loosening}
        for batch in options.batches:
            row[f"seconds_batch_{batch}"], row[f"calls_batch_{batch}"] = timed(pipe, request, batch, options.repeats)
        if acceleration is not None and acceleration.statistics is not None:
            row |= acceleration.statistics.summary()
        if graded and options.prompts:
            scores = text_to_image(pipe, prompts=options.prompts, seed=options.seed, progress=False)
            kept = (
                "prompt_accuracy",
                "prompt_accuracy_standard_error",
                "frechet_distance",
                "frechet_distance_of_renders",
            )
            row |= {key: scores[key] for key in kept}
            if acceleration is not None:
                if options.maps is not None:
                    options.maps.mkdir(parents=True, exist_ok=True)
                    file = "".join(letter if letter.isalnum() else "-" for letter in name)
                    acceleration.statistics.heat_map(24).save(options.maps / f"{file}.png")
        rows[name] = row
        print(f"  {name}: {row}", flush=True)
    pipe.disable_acceleration()
    return rows


def table(rows: dict[str, dict[str, Any]], batches: list[int]) -> str:
    """The figures as a markdown table."""
    plain = rows["next token"]
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
    parser.add_argument("--repeats", type=int, default=10, help="runs whose median counts (default: 10)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--maps", type=Path, default=None, help="write heat maps of acceptance to this folder")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, default=None, help="write a plot to this file (needs matplotlib)")
    options = parser.parse_args()
    if options.window < 1 or options.prompts < 0 or options.repeats < 1:
        parser.error("--window and --repeats must be at least 1, --prompts at least 0")
    if options.threads:
        torch.set_num_threads(options.threads)

    results: dict[str, dict[str, dict[str, Any]]] = {}
    for model in options.models:
        pipe = scenes(options.device) if model == "scenes" else llamagen(options.device)
        pipe.set_progress_bar_config(disable=True)
        request: dict[str, Any] = {"prompt": PROMPT} if model == "scenes" else {"class_labels": 207}
        results[model] = measure(pipe, request, options, graded=model == "scenes")
    print(f"{torch.get_num_threads()} threads, {options.device}, torch {torch.__version__}, window {options.window}\n")
    for model, rows in results.items():
        print(f"{model}\n\n{table(rows, options.batches)}\n")
    if options.plot is not None and "scenes" in results:
        plot(results["scenes"], options.batches[0], options.plot)
    if options.json is not None:
        record = {
            "window": options.window,
            "prompts": options.prompts,
            "threads": torch.get_num_threads(),
            "models": results,
        }
        handle, temporary = tempfile.mkstemp(dir=options.json.resolve().parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
