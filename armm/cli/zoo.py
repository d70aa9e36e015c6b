"""`armm zoo`: the table of published checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json

from armm.cli.common import add_parser
from armm.cli.output import table

DESCRIPTION = """\
Lists the published checkpoints that `armm.pipeline(NAME)` and `armm generate --model NAME` download and convert."""

EXAMPLES = """\
  armm zoo
  armm zoo "llamagen-c2i*"
  armm zoo --json
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "zoo", "list the published checkpoints", DESCRIPTION, EXAMPLES)
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="names to list, with * and ?")
    parser.add_argument("--json", action="store_true", help="print every field as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from armm import zoo

    names = zoo.list_models(args.pattern)
    if not names:
        raise ValueError(f"no published checkpoint is named like {args.pattern!r}; `armm zoo` lists all")
    entries = [zoo.get(name) for name in names]
    if args.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=2))
        return 0
    rows = [
        (e.name, e.task, f"{e.parameters:g}M", e.image_size or "any", f"{e.repo}/{e.file}".rstrip("/")) for e in entries
    ]
    print(table(("name", "task", "size", "pixels", "published file"), rows))
    return 0
