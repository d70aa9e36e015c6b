"""`armm describe`: a sentence about a picture, and answers to questions about it."""

from __future__ import annotations

import argparse
import json

from armm.cli.common import MAX_SEED, add_device_arguments, add_parser, load_pipeline, read_image, resolve_device, whole

DESCRIPTION = """\
Says what a picture shows, or answers questions about it.

The shipped model knows the scenes it was trained on: one to three solid objects on a plane."""

EXAMPLES = """\
  armm describe scene.png
  armm describe scene.png -q "what color is the cube?" -q "how many objects are there?"
  armm describe scene.png --json
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "describe", "what a picture shows, answers about it", DESCRIPTION, EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("-q", "--question", action="append", default=[], metavar="Q", help="ask this; may be repeated")
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
    image = read_image(args.image)
    resolve_device(args.device)

    import torch

    pipe = load_pipeline(args.model, args)

    generator = torch.Generator().manual_seed(args.seed)
    texts = pipe(image, question=args.question or None, generator=generator).texts
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
