"""`armm bench`: runs a benchmark of the checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from armm.cli.common import add_parser

DESCRIPTION = """\
Runs a benchmark; what follows its name is handed on to it (`armm bench decode --help` shows its own options).
Benchmarks lie in the benchmarks/ folder of a checkout and are not part of an installed wheel."""

EXAMPLES = """\
  armm bench decode
  armm bench scenes
"""

BENCHMARKS = {"decode": "tokens per second of the token loop", "scenes": "scenes rendered per second"}


def add(subparsers: argparse._SubParsersAction) -> None:
    listed = "\n".join(f"  {name:10}{summary}" for name, summary in BENCHMARKS.items())
    parser = add_parser(subparsers, "bench", "run a benchmark", f"{DESCRIPTION}\n\n{listed}", EXAMPLES)
    parser.add_argument("name", choices=sorted(BENCHMARKS), metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    checkout = Path(__file__).resolve().parents[2]
    script = checkout / "benchmarks" / f"{args.name}.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"no {script.name} beside the package: benchmarks need a checkout (git clone, pip install -e .)"
        )
    return subprocess.run([sys.executable, str(script), *args.rest], cwd=checkout).returncode
