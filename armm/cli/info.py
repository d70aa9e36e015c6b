"""`armm info`: what this installation has."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

from armm import weights
from armm.cli.common import add_parser
from armm.cli.output import table
from armm.version import __version__

DESCRIPTION = "Prints versions, devices, threads, attention backends and the shipped weights: what a bug report needs."

EXAMPLES = """\
  armm info
  armm info --json
"""

PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "timm",
    "accelerate",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "xformers",
    "numpy",
    "pillow",
)


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "info", "versions, devices, shipped weights", DESCRIPTION, EXAMPLES)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def folder_size(name: str) -> int:
    return sum(file.stat().st_size for file in weights.path(name).rglob("*") if file.is_file())


def usable_backends() -> list[str]:
    """Attention backends that can run here, found by running each once on the best device."""
    import torch

    from armm.nn.attention import BACKENDS, attention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.zeros(1, 1, 8, 16, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
    usable = []
    for name in BACKENDS:
        try:
            attention(rows, rows, rows, backend=name)
        except (ValueError, RuntimeError, NotImplementedError):
            continue
        usable.append(name)
    return usable


def collect() -> dict[str, Any]:
    """Everything the command prints, as one mapping."""
    import torch

    devices = ["cpu"]
    if torch.cuda.is_available():
        devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "armm": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "devices": devices,
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "attention_backends": usable_backends(),
        "shipped_weights": {name: folder_size(name) for name in weights.names()},
        "shipped_recipes": weights.recipe_names(),
    }


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    rows = [("armm", facts["armm"]), ("python", facts["python"]), ("platform", facts["platform"])]
    rows += list(facts["packages"].items())
    rows.append(("devices", ", ".join(facts["devices"])))
    rows.append(("cpu cores, torch threads", f"{facts['cpu_cores']}, {facts['threads']}"))
    rows.append(("attention backends", ", ".join(facts["attention_backends"])))
    rows += [(f"weights/{name}", f"{size / 1e6:.1f} MB") for name, size in facts["shipped_weights"].items()]
    rows.append(("recipes", ", ".join(facts["shipped_recipes"]) or "none"))
    print(table(("what", "here"), rows))
    return 0
