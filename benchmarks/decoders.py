"""The decodings of the scenes model, in one run: ``python benchmarks/decoders.py [--json FILE] [--plot FILE]``.

Every decoding draws the same held-out prompts once and, where the model can judge its own pictures, once with the best of several
candidates kept; decodings of continuous tokens draw once more with step annealing, and a next-X model with every entity it knows.
Calls of the transformer, steps of the head where it denoises, and seconds say what a picture costs; prompt following (read by the
recogniser) and the Frechet distance of the recogniser's features to fresh renders say what it is worth.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import armm
from armm.evaluation.text_to_image import text_to_image
from pipelines import decodings, loading
from pipelines.shipped import task_decodings, task_pipeline

PROMPT = "a small red sphere to the left of a large blue cube"
TASK = "text-to-image"


def load(folder: Path | None, decoding: str, device: str) -> Any:
    pipe = task_pipeline(TASK, decoding=decoding) if folder is None else armm.pipeline(folder, decoding=decoding)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def variants(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(name of the row, pipeline) of all that is measured."""
    folder = options.model
    known = task_decodings(TASK) if folder is None else decodings.offered(folder, loading.read_index(folder))
    for name in options.decodings or known:
        pipe = load(folder, name, options.device)
        entities = list(pipe.transformer.config.get("entities") or ())
        own = [pipe.decoding.config.get("entity"), pipe.decoding.config.get("size")]
        name = f"{name}, {own[0]}" if entities else name
        yield name, pipe
        if armm.StepAnnealing in type(pipe)._accelerations:
            upper, lower = options.annealing if isinstance(pipe.decoding, armm.NextXDecoding) else options.head_annealing
            pipe.enable_acceleration(armm.StepAnnealing(upper, lower))
            yield f"{name}, annealed {upper} to {lower}", pipe
            pipe.disable_acceleration()
        for entity, size in entities:
            if [entity, size] != own:
                pipe.decoding = armm.NextXDecoding.from_config(pipe.decoding.config, entity=entity, size=size)
                yield f"{name.partition(',')[0]}, {entity}", pipe


def judges_itself(pipe: Any) -> bool:
    return "num_candidates" in inspect.signature(type(pipe).__call__).parameters


def single_draws(pipe: Any) -> dict[str, Any]:
    """Arguments of a call that draws each picture once."""
    return {"num_candidates": 1} if judges_itself(pipe) else {}


def calls_of(pipe: Any) -> tuple[int, int | None]:
    """For a picture: calls of the transformer, and steps of a head that denoises (None where nothing is denoised)."""
    settings, decoding = pipe.generation_config, pipe.decoding
    if isinstance(decoding, armm.NextXDecoding):  # the transformer itself denoises
        calls = decoding.num_calls(pipe.grid, settings["num_flow_steps"], pipe.acceleration)
        return calls, calls
    if isinstance(decoding, armm.MaskedLatentDecoding):
        calls = settings["num_inference_steps"]
        schedule = decoding.head_schedule(calls, settings["head_steps"], pipe.acceleration)
        return calls, sum(decoding.solver.num_calls(**step) for step in schedule)
    return decoding.num_calls(pipe.transformer.grid), None


def seconds_per_batch(pipe: Any, batch: int, repeats: int) -> float:
    """Median seconds of decoding one batch (codes to pixels included), after one run to warm up."""
    times = []
    for run in range(repeats + 1):
        generators = [torch.Generator().manual_seed(1000 * run + row) for row in range(batch)]
        start = time.perf_counter()
        pipe([PROMPT] * batch, generator=generators, output_type="pt", **single_draws(pipe))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(pipe: Any, options: argparse.Namespace) -> dict[str, Any]:
    tokens = pipe.transformer.grid[0] * pipe.transformer.grid[1]
    calls, head_steps = calls_of(pipe)
    record: dict[str, Any] = {
        "strategy": type(pipe.decoding).__name__,
        "tokens": tokens,
        "calls": calls,
        "head_steps": head_steps,
        "parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters()),
    }
    for batch in options.batches:
        seconds = seconds_per_batch(pipe, batch, options.repeats)
        record[f"seconds_batch_{batch}"] = seconds
        record[f"tokens_per_second_batch_{batch}"] = batch * tokens / seconds
    settings = {"prompts": options.prompts, "seed": options.seed, "progress": False}
    scores = text_to_image(pipe, **single_draws(pipe), **settings)
    kept = ("prompt_accuracy", "prompt_accuracy_standard_error", "frechet_distance", "frechet_distance_of_renders")
    record |= {name: scores[name] for name in kept}
    if judges_itself(pipe):
        best = text_to_image(pipe, num_candidates=options.candidates, **settings)
        record["best_prompt_accuracy"] = best["prompt_accuracy"]
        record["best_prompt_accuracy_standard_error"] = best["prompt_accuracy_standard_error"]
    return record


def table(rows: dict[str, dict[str, Any]], batches: list[int], candidates: int) -> str:
    """The figures as a markdown table."""
    heads = ["decoding", "calls", "head steps", "parameters", *(f"ms a picture, batch {n}" for n in batches)]
    heads += [f"tokens/s, batch {batches[-1]}", "prompts right", f"best of {candidates}", "Frechet distance"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, row in rows.items():
        cells = [name, str(row["calls"]), str(row["head_steps"] or ""), f"{row['parameters'] / 1e6:.1f} M"]
        cells += [f"{1000 * row[f'seconds_batch_{n}'] / n:.1f}" for n in batches]
        cells += [f"{row[f'tokens_per_second_batch_{batches[-1]}']:.0f}"]
        for kind in ("prompt_accuracy", "best_prompt_accuracy"):
            cells.append(f"{100 * row[kind]:.1f}% ± {100 * row[kind + '_standard_error']:.1f}" if kind in row else "")
        cells.append(f"{row['frechet_distance']:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    floor = next(iter(rows.values()))["frechet_distance_of_renders"]
    return "\n".join([*lines, "", f"Frechet distance between two sets of real renders: {floor:.2f}."])


def plot(rows: dict[str, dict[str, Any]], batch: int, path: Path) -> None:
    """Prompt following against time, one point a decoding."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for name, row in rows.items():
        x, y = 1000 * row[f"seconds_batch_{batch}"] / batch, 100 * row["prompt_accuracy"]
        spread = 100 * row["prompt_accuracy_standard_error"]
        axes.errorbar(x, y, yerr=spread, fmt="o", capsize=3, label=f"{name} ({row['calls']} calls)")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    axes.set_xlabel(f"milliseconds a picture (batch {batch})")
    axes.set_ylabel("prompts right, %")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_ylim(0, 100)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="folder (default: the shipped models)")
    parser.add_argument("--decodings", nargs="+", metavar="NAME", help="default: all that are offered")
    parser.add_argument(
        "--annealing", type=int, nargs=2, default=[16, 4], metavar=("UPPER", "LOWER"), help="steps of annealed rows (default: 16 4)"
    )
    parser.add_argument(
        "--head-annealing",
        type=int,
        nargs=2,
        default=[50, 5],
        metavar=("UPPER", "LOWER"),
        help="the same for diffusion heads (default: 50 5, what its authors ran MAR with)",
    )
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and draws (default: 0)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes to time (default: 1 8)")
    parser.add_argument("--repeats", type=int, default=5, help="runs whose median counts (default: 5)")
    parser.add_argument("--candidates", type=int, default=4, help="of the column `best of N` (default: 4)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, default=None, help="write a plot to this file (needs matplotlib)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = {name: measure(pipe, options) for name, pipe in variants(options)}

    print(f"{options.prompts} prompts, {torch.get_num_threads()} threads, {options.device}, torch {torch.__version__}\n")
    print(table(rows, options.batches, options.candidates))
    if options.plot is not None:
        plot(rows, options.batches[-1], options.plot)
    if options.json is not None:
        record = {"prompts": options.prompts, "threads": torch.get_num_threads(), "device": options.device, "decodings": rows}
        handle, temporary = tempfile.mkstemp(dir=options.json.resolve().parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
