"""How fast scenes are drawn, rendered and described: ``python benchmarks/scenes.py [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from armm.data.scenes import caption, questions, render, sample_scenes


def rate(work: Callable[[], object], amount: int, repeats: int) -> float:
    """Median of ``amount`` per second over several runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return amount / statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=256, help="scenes a run (default: 256)")
    parser.add_argument("--repeats", type=int, default=3, help="runs whose median counts (default: 3)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[64, 96, 128], help="picture sizes (default: 64 96 128)"
    )
    parser.add_argument("--device", default="cpu", help="where to render (default: cpu)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    number = options.scenes
    scenes = sample_scenes(number, seed=0)
    moved = scenes.to(options.device)
    figures: dict[str, float] = {"sample": rate(lambda: sample_scenes(number, seed=0), number, options.repeats)}
    rows = [("sample", "", figures["sample"])]
    for size in options.sizes:
        for supersample in (1, 2, 3):
            name = f"render_{size}_aa{supersample}"
            figures[name] = rate(lambda s=size, a=supersample: render(moved, s, a), number, options.repeats)
            rows.append((f"render {size}x{size}", f"{supersample}x{supersample} on outlines", figures[name]))
    rng = random.Random(0)
    for name, work in (("caption", caption), ("questions", questions)):
        figures[name] = rate(lambda f=work: [f(scenes, i, rng) for i in range(number)], number, options.repeats)
        rows.append((name, "", figures[name]))

    print(f"{number} scenes, {torch.get_num_threads()} threads, {options.device}, torch {torch.__version__}")
    for name, detail, value in rows:
        print(f"{name:<16}{detail:<20}{value:>10.0f} scenes/s")
    if options.json is not None:
        record = {"scenes": number, "threads": torch.get_num_threads(), "device": options.device, "per_second": figures}
        handle, temporary = tempfile.mkstemp(dir=options.json.resolve().parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, options.json)


if __name__ == "__main__":
    main()
