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
        examples = next(line for line in EXAMPLES.splitlines(keepends=True) if f" {task} " in line)
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
            sub.add_argument("--num-candidates", type=whole(1, 256), metavar="N", help="drawn for each picture that counts")
        sub.add_argument("--quiet", action="store_true", help="no progress bar")
        sub.set_defaults(run=run)


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
