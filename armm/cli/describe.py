"""`armm describe`: a sentence about a picture, and answers to questions about it."""

from __future__ import annotations

import argparse
import json

from armm.cli.common import MAX_SEED, add_device_arguments, add_parser, load_pipeline, read_image, resolve_device, whole
from armm.cli.output import IMAGE_SUFFIXES, check_file, save_image

DESCRIPTION = """\
Says what a picture shows, or answers questions about it.

The shipped model knows the scenes it was trained on: one to three solid objects on a plane."""

EXAMPLES = """\
  armm describe scene.png
  armm describe scene.png -q "what color is the cube?" -q "how many objects are there?"
  armm describe scene.png --json
  armm describe scene.png -q "what color is the cube?" --explain why.png
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "describe", "what a picture shows, answers about it", DESCRIPTION, EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("-q", "--question", action="append", default=[], metavar="Q", help="ask this; may be repeated")
    parser.add_argument("--explain", metavar="FILE", help="write a picture of where each word of the answer comes from")
    parser.add_argument(
        "--method", choices=("tam", "arc", "msea", "msea+arc", "attention"), help="of --explain (default: tam)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--model", default="image-to-text", help="a zoo name, a hub id or a folder (default: the shipped model)"
    )
    parser.add_argument("--seed", type=whole(0, MAX_SEED), default=0, help="seed of captions that sample (default: 0)")
    add_device_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for question in args.question:
        if not question.strip():
            raise ValueError("--question: empty; ask something")
    target = check_file("--explain", args.explain, IMAGE_SUFFIXES) if args.explain else None
    if target is not None and len(args.question) > 1:
        raise ValueError("--explain: explains one answer; give one question")
    if target is None and args.method is not None:
        raise ValueError("--method belongs to --explain: give --explain FILE too")
    image = read_image(args.image)
    resolve_device(args.device)

    import torch

    pipe = load_pipeline(args.model, args)

    generator = torch.Generator().manual_seed(args.seed)
    if not hasattr(pipe, "ask"):
        raise ValueError(
            f"--model: {type(pipe).__name__} does not read pictures; leave it out, or name a model that does"
        )
    if target is not None and not hasattr(pipe, "explain"):
        raise ValueError(f"--explain: {type(pipe).__name__} does not explain its answers; leave it out")
    if target is not None:
        explanation = pipe.explain(image, args.question[0] if args.question else None, method=args.method or "tam")
        save_image(explanation.image(), target)
        texts = [explanation.answer]
    else:
        texts = pipe.ask(image, args.question or None, generator=generator).texts
    answers = list(zip(args.question, texts, strict=True)) if args.question else []
    caption = None if answers else texts[0]
    if args.json:
        result = {"image": args.image}
        if caption is not None:
            result["caption"] = caption
        else:
            result["answers"] = [{"question": question, "answer": answer} for question, answer in answers]
        print(json.dumps(result, indent=2, ensure_ascii=False))
    elif caption is not None:
        print(caption)
    elif len(answers) == 1:
        print(answers[0][1])
    else:
        for question, answer in answers:
            print(f"{question} {answer}")
    return 0
