"""`armm evaluate`: measures the shipped models on scenes whose truth is known."""

from __future__ import annotations

import argparse
from typing import Any

from armm.cli.common import MAX_SEED, add_parser, whole
from armm.cli.output import check_file, save_json, table

DESCRIPTION = """\
Measures a model on freshly rendered scenes it has never seen. Prints a table; --json FILE writes every figure."""

EXAMPLES = """\
  armm evaluate text-to-image --prompts 500 --json prompts.json
  armm evaluate image-to-text --questions 1000 --json answers.json
  armm evaluate image-to-text --questions 200 --prune 2,3:0.5,0.25 --explain tam
  armm evaluate reconstruction --images 1000 --json reconstruction.json
"""

# Sub-command -> (what is counted, its default, what it measures).
TASKS = {
    "text-to-image": ("prompts", 500, "do generated pictures show what held-out prompts say, judged by the recogniser"),
    "image-to-text": ("questions", 1000, "are questions about fresh pictures answered right, by type"),
    "reconstruction": ("images", 1000, "what the tokenizer keeps of a picture: PSNR and SSIM"),
}


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "evaluate", "measure a model on scenes", DESCRIPTION, EXAMPLES)
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task, (counted, default, summary) in TASKS.items():
        examples = "".join(line for line in EXAMPLES.splitlines(keepends=True) if f" {task} " in line)
        sub = add_parser(tasks, task, summary, f"Measures: {summary}.", examples)
        sub.add_argument(
            f"--{counted}",
            type=whole(1),
            default=default,
            metavar="N",
            dest="count",
            help=f"how many (default: {default})",
        )
        sub.add_argument("--json", metavar="FILE", help="write the figures to this .json file")
        sub.add_argument("--model", help="a folder (default: the shipped weights)")
        sub.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="seed of the scenes and draws (default: 0)")
        sub.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="pictures at once (default: 32)")
        if task == "text-to-image":
            sub.add_argument("--decoding", metavar="NAME", help="one of the decodings that the folder offers")
            sub.add_argument(
                "--num-candidates", type=whole(1, 256), metavar="N", help="drawn for each picture that counts"
            )
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        if task == "image-to-text":
            add_reading_arguments(sub)
        sub.set_defaults(run=run)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """How answers are written, and what is measured besides."""
    parser.add_argument(
        "--prune",
        type=pruning,
        metavar="AFTER:KEEP",
        help="drop image tokens: after these blocks (1,3), keep these shares of them (0.5,0.25), as 1,3:0.5,0.25; or 'default'",
    )
    parser.add_argument("--gates", metavar="FILE", help="let gates from this file decide when image tokens leave")
    parser.add_argument("--beams", type=whole(1), metavar="N", help="search with N beams")
    parser.add_argument("--opera", action="store_true", help="search with OPERA's penalty and retrospection")
    parser.add_argument(
        "--explain",
        choices=("tam", "arc", "msea", "msea+arc", "attention"),
        help="also measure where explanations point, by this method",
    )


def pruning(text: str) -> tuple[list[int], list[float]] | tuple[()]:
    """Argument type: blocks and shares, or () for the defaults."""
    if text == "default":
        return ()
    after, _, keep = text.partition(":")
    try:
        return [int(part) for part in after.split(",")], [float(part) for part in keep.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not AFTER:KEEP, such as 1,3:0.5,0.25 (blocks, then shares), nor 'default'"
        ) from None


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `armm.evaluation.image_to_text` besides the common ones."""
    import armm

    if args.prune is not None and args.gates is not None:
        raise ValueError("--prune and --gates exclude each other: give one.")
    if (args.prune is not None or args.gates is not None) and (args.beams or args.opera):
        raise ValueError("--beams and --opera do not go with pruning: leave one of them out.")
    options: dict[str, Any] = {"explain": args.explain}
    if args.prune is not None:
        options["pruning"] = armm.TokenPruning(*args.prune)
    elif args.gates is not None:
        options["pruning"] = armm.VisualTokenExit.from_single_file(args.gates)
    if args.opera:
        options["search"] = armm.OPERA(num_beams=args.beams or 5)
    elif args.beams:
        options["search"] = armm.BeamSearch(num_beams=args.beams)
    return options


def rows_of(result: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A result as (name, figure) rows; inner mappings as name/key."""
    rows = []
    for key, value in result.items():
        if isinstance(value, dict):
            rows += rows_of(value, f"{prefix}{key}/")
        else:
            rows.append((prefix + key, f"{value:.4f}" if isinstance(value, float) else str(value)))
    return rows


def run(args: argparse.Namespace) -> int:
    target = check_file("--json", args.json, (".json",)) if args.json is not None else None
    counted = TASKS[args.task][0]

    import armm.evaluation

    measure = getattr(armm.evaluation, args.task.replace("-", "_"))
    options = {name: getattr(args, name, None) for name in ("decoding", "num_candidates")}
    options |= reading_options(args) if args.task == "image-to-text" else {}
    result = measure(
        model=args.model,
        **{counted: args.count},
        seed=args.seed,
        batch_size=args.batch_size,
        progress=not args.quiet,
        **{name: value for name, value in options.items() if value is not None},
    )
    print(table(("figure", "value"), rows_of(result)))
    if target is not None:
        save_json(result, target)
    return 0
