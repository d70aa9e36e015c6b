"""`armm convert`: a published file as a folder that `from_pretrained` reads."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from armm.cli.common import DTYPES, add_parser
from armm.cli.output import atomic_folder, check_new_folder

DESCRIPTION = """\
Reads a checkpoint as its authors published it and writes a folder for `from_pretrained`: safetensors and JSON.
Code inside a checkpoint is never run; missing and unknown tensors are errors that name them."""

EXAMPLES = """\
  armm convert llamagen c2i_B_256.pt --tokenizer vq_ds16_c2i.pt -o llamagen-c2i-b-256
  armm convert llamagen vq_ds16_c2i.pt -o llamagen-vq-16
  armm convert larp LARP-L-long-tokenizer/ -o larp-tokenizer
  armm convert llamagen t2i_XL_stage1_256.pt --tokenizer vq_ds16_t2i.pt -o llamagen-t2i --config '{"norm_eps": 1e-5}'
"""


def add(subparsers: argparse._SubParsersAction) -> None:
    parser = add_parser(subparsers, "convert", "a published checkpoint as a folder of ours", DESCRIPTION, EXAMPLES)
    parser.add_argument("family", metavar="FAMILY", help="the published family, such as llamagen")
    parser.add_argument(
        "file", metavar="FILE", help="the authors' checkpoint: .pt, .pth, .bin, .safetensors, or a folder"
    )
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="new folder to write")
    parser.add_argument("--tokenizer", metavar="FILE", help="the authors' image tokenizer: makes a pipeline")
    parser.add_argument(
        "--config", metavar="JSON", help="JSON text or a .json file with what the checkpoint cannot say"
    )
    parser.add_argument("--use-ema", action="store_true", help="take the moving average that some files hold")
    parser.add_argument("--dtype", choices=DTYPES, help="numbers to store (default: as in the checkpoint)")
    parser.set_defaults(run=run)


def read_config(value: str | None) -> dict[str, Any] | None:
    """JSON text, or the content of a `.json` file."""
    if value is None:
        return None
    text = value
    if value.endswith(".json"):
        if not Path(value).is_file():
            raise FileNotFoundError(f"--config: no file {value!r}")
        text = Path(value).read_text(encoding="utf-8")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config: {value!r} is neither JSON ({error}) nor a .json file") from None
    if not isinstance(config, dict):
        raise ValueError(f'--config: must be a JSON object like {{"key": 1}}, got {text.strip()!r}')
    return config


def run(args: argparse.Namespace) -> int:
    for option, value in (("FILE", args.file), ("--tokenizer", args.tokenizer)):
        if value is not None and not Path(value).exists():
            raise FileNotFoundError(f"{option}: no file {value!r}")
    config = read_config(args.config)
    target = check_new_folder("--output", args.output)

    import torch

    from armm.auto import FAMILY_PIPELINES
    from armm.convert import family_module

    family = family_module(args.family)
    if args.tokenizer is not None and args.family not in FAMILY_PIPELINES:
        raise ValueError(f"--tokenizer: {args.family} is a family of tokenizers; convert its FILE alone")
    options = {"config": config, "dtype": getattr(torch, args.dtype) if args.dtype else None}
    if args.use_ema:  # else as the family's published figures have it
        options["use_ema"] = True
    if args.tokenizer is None:
        converted = family.convert(args.file, **options)
    else:
        module, class_name = FAMILY_PIPELINES[args.family]
        pipeline_class = getattr(importlib.import_module(module), class_name)
        converted = pipeline_class.from_single_file(args.file, tokenizer=args.tokenizer, **options)
    with atomic_folder(target) as folder:
        converted.save_pretrained(folder)
    print(f"{type(converted).__name__} written to {target}")
    return 0
