"""`armm train`: runs a training recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from armm.cli.common import add_parser

DESCRIPTION = """\
Trains what a recipe (a YAML file, or the name of a shipped one) describes: checkpoints, a loss log and sample pictures
are written to the recipe's output folder as it goes. A run that was stopped continues exactly with --resume."""

EXAMPLES = """\
  armm train --list
  armm train recipes/scenes-tokenizer-64.yaml
  armm train scenes-unified-64 --set steps=200 --set model.transformer.dim=192 --output runs/small
  armm train scenes-unified-64 --output runs/small --resume
  accelerate launch -m armm.cli.main train scenes-unified-64      (several processes)
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "train", "run a training recipe", DESCRIPTION, EXAMPLES)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a YAML file or the name of a shipped recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="change a value of the recipe; inner keys with dots (optimizer.learning_rate=1e-4); may be repeated",
    )
    parser.add_argument("--output", metavar="DIR", help="write here instead of the recipe's output folder")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of the output folder")
    parser.add_argument("--list", action="store_true", help="list the shipped recipes and leave")
    parser.set_defaults(run=run)


def find_recipe(value: str) -> Path:
    """A file as given, or else a shipped recipe of that name."""
    from armm import weights

    path = Path(value)
    if path.is_file():
        return path
    if path.is_dir():
        raise IsADirectoryError(f"RECIPE: {value!r} is a folder; give a YAML file")
    if len(path.parts) == 1:
        return weights.recipe(value)
    known = weights.recipe_names()
    if path.parent.name == "recipes" and path.suffix == ".yaml" and path.stem in known:
        return weights.recipe(path.stem)
    raise FileNotFoundError(f"no recipe file {value!r}; shipped recipes: {', '.join(known) or 'none'}")


def parse_override(text: str) -> tuple[str, Any]:
    """`a.b=3` as ("a.b", 3); the value is read as YAML, but `no`, `yes`, `on`, `off` stay words."""
    key, equals, value = text.partition("=")
    if not equals or not key or not all(part.strip() == part and part for part in key.split(".")):
        raise ValueError(f"--set: {text!r} is not KEY=VALUE")
    if value.lower() in ("no", "yes", "on", "off"):
        return key, value
    import yaml

    from armm.training.recipe import read_yaml

    try:
        return key, read_yaml(value)
    except yaml.YAMLError:
        raise ValueError(f"--set: the value of {text!r} is not YAML") from None


def run(args: argparse.Namespace) -> int:
    from armm import weights

    if args.list:
        print("\n".join(weights.recipe_names()))
        return 0
    if args.recipe is None:
        raise ValueError("give a RECIPE (see `armm train --list` for the shipped ones)")
    path = find_recipe(args.recipe)
    overrides = dict(parse_override(text) for text in args.overrides)
    if args.output is not None and Path(args.output).is_file():
        raise NotADirectoryError(f"--output: {args.output!r} is a file; give a folder")

    import armm.training

    armm.training.run(path, overrides, output=args.output, resume=args.resume)
    return 0
