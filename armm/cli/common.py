"""What the sub-commands share: a parser that answers in one line, argument types, devices, images, pipelines."""

from __future__ import annotations

import argparse
import inspect
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch
    from PIL import Image

DTYPES = ("float32", "bfloat16", "float16")
MAX_SEED = 2**63 - 1


class UsageError(ValueError):
    """A command line that cannot be understood."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing a usage text and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def add_parser(
    subparsers: argparse._SubParsersAction, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A sub-parser with a description, examples after the options, and the options every command has."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return parser


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="numbers to compute in (default: float32 on a CPU, else bfloat16)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no remarks")


def whole(minimum: int, maximum: int | None = None) -> Any:
    """Argument type: a whole number from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum or (maximum is not None and value > maximum):
            limit = f">= {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    return parse


def real(minimum: float, maximum: float = math.inf, *, open_minimum: bool = False) -> Any:
    """Argument type: a finite number from `minimum` (left out if `open_minimum`) to `maximum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        low = value > minimum if open_minimum else value >= minimum
        if not math.isfinite(value) or not low or value > maximum:
            sign = ">" if open_minimum else ">="
            limit = f" and <= {maximum:g}" if math.isfinite(maximum) else ""
            raise argparse.ArgumentTypeError(f"must be a finite number {sign} {minimum:g}{limit}, got {text}")
        return value

    return parse


def resolve_device(name: str) -> torch.device:
    """`auto` is the best device there is; a device that torch does not have is an error."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name!r} is not a device; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device: {name!r} is not there ({count} CUDA devices seen by torch); use --device cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device: 'mps' is not available here; use --device cpu")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device: {name!r} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    import torch

    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_pipeline(model: str, args: argparse.Namespace) -> Any:
    """The pipeline of a task, zoo name, hub id or folder, on the device and in the dtype that `args` names."""
    from diffusers.utils import logging

    import armm

    device = resolve_device(args.device)
    options = {"decoding": args.decoding} if getattr(args, "decoding", None) else {}
    logging.disable_progress_bar()  # loading takes a moment; what the bars of a call show is worth seeing
    try:
        pipe = armm.pipeline(model, dtype=resolve_dtype(args.dtype, device), **options).to(device)
    finally:
        logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=args.quiet, leave=False)
    return pipe


def shown(name: str) -> str:
    """A call argument as the command line spells it."""
    return "a PROMPT" if name == "prompt" else "--" + name.replace("_", "-")


def call_arguments(pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments in `given` that are not None; one the pipeline does not take is an error that says so."""
    known = inspect.signature(type(pipe).__call__).parameters
    wanted = {name: value for name, value in given.items() if value is not None}
    for name in wanted:
        if name not in known:
            subjects = [shown(key) for key in ("prompt", "class_labels") if key in known and key not in wanted]
            hint = f"; it takes {' or '.join(subjects)}" if subjects else ""
            raise ValueError(f"{type(pipe).__name__} does not take {shown(name)}{hint}")
    return wanted


def read_image(path: str) -> Image.Image:
    """A picture file as RGB on white; anything else is an error that names the file."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no image file {path!r}")
    if file.is_dir():
        raise IsADirectoryError(f"{path!r} is a folder, not an image file")
    try:
        with Image.open(file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path!r} is not a readable image: {error}") from None
