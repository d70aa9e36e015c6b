"""Entry point of the `armm` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from armm.cli import bench, convert, demo, describe, evaluate, generate, info, reconstruct, train, zoo
from armm.cli.common import Parser
from armm.version import __version__

GROUPS = (generate, describe, reconstruct, demo, train, evaluate, convert, zoo, bench, info)

DESCRIPTION = """\
Autoregressive visual models: pictures from sentences, sentences from pictures.

The weights in this package need no download; published models are fetched by their zoo name (`armm zoo`)."""

EXAMPLES = """\
examples:
  armm generate "a small red sphere to the left of a large blue cube" -o scene.png
  armm generate "a red cone behind a green cube" -o out.png --animate steps.gif
  armm describe scene.png --question "what color is the cube?"
  armm demo
  armm zoo
"""

# A user's mistake ends with 2, a failure on our side with 1.
BAD_INPUT = (ValueError, TypeError, OSError, ImportError, NotImplementedError)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; cheap, because handlers import what they need when they run."""
    parser = Parser(
        prog="armm",
        description=DESCRIPTION,
        epilog=EXAMPLES + "\nRun `armm COMMAND --help` for the options and examples of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"armm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in GROUPS:
        group.add(subparsers)
    return parser


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{error.strerror}: {str(error.filename)!r}"
    return text or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns the exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        args = build_parser().parse_args(arguments)
        return args.run(args) or 0
    except SystemExit as leaving:  # --help and --version
        return leaving.code if isinstance(leaving.code, int) else 0
    except KeyboardInterrupt:
        print("armm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BAD_INPUT as error:
        if debug:
            raise
        print(f"armm: error: {one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        print(f"armm: error: {kind}: {one_line(error)} (run again with --debug for the traceback)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
