"""`armm reconstruct`: a picture through tokenizers and back."""

from __future__ import annotations

import argparse
from typing import Any

from armm.cli.common import MAX_SEED, add_device_arguments, add_parser, read_image, resolve_device, resolve_dtype, whole
from armm.cli.output import IMAGE_SUFFIXES, check_file, save_image, save_json, table

DESCRIPTION = """\
Encodes a picture with a tokenizer, decodes its codes, writes what came back and prints what that cost and kept.

The picture is cropped in the middle to whole tokens, or made as large as the tokenizer needs it. With several tokenizers, or with
--sheet, the output is a sheet: the original and what each tokenizer made of it, at one size."""

EXAMPLES = """\
  armm reconstruct photo.png --tokenizer llamagen-vq-ds16-c2i -o back.png
  armm reconstruct photo.png --tokenizer dar-tokenizer -o back.png --sheet
  armm reconstruct photo.png --tokenizer text-to-image var-vae my-tokenizer/ -o sheet.png --size 256 --json figures.json
"""
MAX_SIDE = 2048


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "reconstruct", "a picture through a tokenizer and back", DESCRIPTION, EXAMPLES)
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument(
        "--tokenizer", nargs="+", required=True, metavar="NAME_OR_PATH",
        help="a zoo name (of a tokenizer or of a model), a task with shipped weights, a folder, an authors' file, or a hub id",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="picture to write: .png, .jpg, .webp, ..."
    )
    parser.add_argument(
        "--size", type=whole(8, MAX_SIDE), metavar="PX", help="make the picture a square of PX pixels first"
    )
    parser.add_argument("--sheet", action="store_true", help="write the original beside it")
    parser.add_argument(
        "--seed", type=whole(0, MAX_SEED), default=0, help="of tokenizers that decode with noise (default: 0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this .json file")
    add_device_arguments(parser)
    parser.set_defaults(run=run)


def picture_size(image: Any, size: int | None, tokenizers: list[Any]) -> tuple[int, int]:
    """(height, width) at which the tokenizers are compared: the picture's own in whole tokens of the coarsest of them."""
    from armm.evaluation.tokenizers import fitting_size

    if size is not None:
        return (size, size)
    if len(tokenizers) == 1 and tokenizers[0].required_size is not None:
        return tokenizers[0].required_size  # type: ignore[no-any-return]
    shorter = max(1.0, max(image.size) / MAX_SIDE)
    height, width = round(image.height / shorter), round(image.width / shorter)
    return (
        fitting_size(max(tokenizers, key=lambda item: item.downsample), height, width)
        if len(tokenizers) == 1
        else (height, width)
    )


def run(args: argparse.Namespace) -> int:
    target = check_file("--output", args.output, IMAGE_SUFFIXES)
    figures = check_file("--json", args.json, (".json",)) if args.json is not None else None
    image = read_image(args.image)
    device = resolve_device(args.device)

    from diffusers.utils import logging

    import armm
    from armm.evaluation.tokenizers import compare_tokenizers, named_tokenizers, to_pictures

    logging.disable_progress_bar()
    try:
        dtype = resolve_dtype(args.dtype, device)
        loaded = dict(named_tokenizers({name: armm.tokenizer(name, dtype=dtype) for name in args.tokenizer}))
    finally:
        logging.enable_progress_bar()
    size = picture_size(image, args.size, list(loaded.values()))
    result = compare_tokenizers([image], loaded, size=size, seed=args.seed, device=device)
    sheet = args.sheet or len(loaded) > 1
    save_image(result.sheet() if sheet else to_pictures(result.rows[0].pixels)[0], target)
    rows = result.table()
    if figures is not None:
        save_json({"image": args.image, "height": size[0], "width": size[1], "tokenizers": rows}, figures)
    if not args.quiet:
        print(
            table(
                [name.replace("_", " ") for name in rows[0]],
                [["-" if v is None else v for v in row.values()] for row in rows],
            )
        )
        print(f"{target} ({size[1]}x{size[0]} pixels)")
    return 0
