"""`armm generate`: pictures and videos from sentences or class labels."""

from __future__ import annotations

import argparse
import inspect
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from armm.cli.common import (
    MAX_SEED,
    add_device_arguments,
    add_parser,
    call_arguments,
    load_pipeline,
    real,
    resolve_device,
    whole,
)
from armm.cli.output import (
    IMAGE_SUFFIXES,
    check_file,
    check_video_file,
    image_grid,
    save_gif,
    save_image,
    save_video,
)

if TYPE_CHECKING:
    from PIL import Image

DESCRIPTION = """\
Makes pictures from sentences (PROMPT, in quotes, one picture each) or from class labels; with --video, videos, by a
model that makes videos.

Image number i is drawn with the seed SEED + i and its own random stream, so it is the same picture whether it is made
alone or together with others. Without --seed one is chosen and printed."""

EXAMPLES = """\
  armm generate "a small red sphere to the left of a large blue cube" -o scene.png
  armm generate "a large shiny cone at night" "a red cube and a blue sphere" -o out.png --num-images 4 --grid --seed 3
  armm generate "a red cone behind a green cube" -o out.png --animate steps.gif --decoding neighboring
  armm generate --model llamagen-c2i-b-256 --class-labels 207 360 -o animals.png --guidance-scale 4
  armm generate --model my-video-model --class-labels 7 --video surf.gif --fps 8
"""
DEFAULT_FPS = 8


def add(subparsers: argparse._SubParsersAction) -> None:
    summary = "pictures and videos from sentences or class labels"
    parser = add_parser(subparsers, "generate", summary, DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="what to draw, in quotes; several make several pictures"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("-o", "--output", metavar="FILE", help="picture to write: .png, .jpg, .webp, ...")
    target.add_argument("--video", metavar="FILE", help="video to write: .gif, or .mp4 with the extra armm[video]")
    parser.add_argument(
        "--fps", type=whole(1, 240), metavar="N", help=f"frames a second of --video (default: {DEFAULT_FPS})"
    )
    parser.add_argument(
        "--model", default="text-to-image", help="a zoo name, a hub id or a folder (default: the shipped model)"
    )
    parser.add_argument(
        "--decoding", metavar="NAME", help="one of the decodings that the model offers, such as neighboring"
    )
    parser.add_argument(
        "--class-labels", nargs="+", type=label, metavar="N", help="class numbers or names instead of prompts"
    )
    parser.add_argument(
        "--num-images", type=whole(1, 4096), default=1, metavar="N", help="pictures per prompt (default: 1)"
    )
    parser.add_argument(
        "--grid", action="store_true", help="put all pictures in one file instead of FILE-0, FILE-1, ..."
    )
    parser.add_argument(
        "--num-candidates", type=whole(1, 256), metavar="N", help="draw N for each picture and keep the one that fits its prompt best"
    )
    parser.add_argument("--guidance-scale", type=real(0.0), metavar="X", help="classifier-free guidance; 1 is none")
    parser.add_argument(
        "--temperature", type=real(0.0), metavar="X", help="randomness of the tokens; 0 takes the likeliest"
    )
    parser.add_argument("--top-k", type=whole(0), metavar="K", help="draw among the K likeliest tokens; 0 is all")
    parser.add_argument(
        "--top-p", type=real(0.0, 1.0, open_minimum=True), metavar="P", help="draw within probability mass P"
    )
    parser.add_argument("--seed", type=whole(0, MAX_SEED - 4096 * 4096), help="makes the result reproducible")
    parser.add_argument("--size", type=whole(8, 8192), metavar="PX", help="enlarge the shorter side to PX pixels")
    parser.add_argument("--animate", metavar="GIF", help="also write a GIF of the tokens appearing in decode order")
    parser.add_argument(
        "--animate-size", type=whole(16, 2048), default=256, metavar="PX", help="its size (default: 256)"
    )
    add_device_arguments(parser)
    parser.set_defaults(run=run)


def label(text: str) -> int | str:
    """Argument type: a class number, or a name as it stands."""
    return int(text) if text.lstrip("-").isdigit() else text


def resized(image: Image.Image, size: int | None) -> Image.Image:
    """`image` with its shorter side `size` pixels long."""
    if size is None or min(image.size) == size:
        return image
    from PIL import Image as PILImage

    factor = size / min(image.size)
    shape = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(shape, PILImage.Resampling.BICUBIC)


def output_paths(path: Path, count: int) -> list[Path]:
    """`out.png` for one picture; `out-0.png`, `out-1.png`, ... for several."""
    if count == 1:
        return [path]
    digits = len(str(count - 1))
    return [path.with_name(f"{path.stem}-{index:0{digits}d}{path.suffix}") for index in range(count)]


def request(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """What to draw as call arguments, and how many pictures that makes."""
    if args.prompt and args.class_labels:
        raise ValueError("give either PROMPTs or --class-labels, not both")
    if not args.prompt and not args.class_labels:
        raise ValueError("nothing to draw: give a PROMPT in quotes, or --class-labels (see `armm generate --help`)")
    for prompt in args.prompt:
        if not prompt.strip():
            raise ValueError("a PROMPT is empty; say what to draw")
    count = len(args.prompt or args.class_labels) * args.num_images
    if count > 4096:
        raise ValueError(f"{count} pictures in one run; at most 4096 (PROMPTs times --num-images)")
    what = {"prompt": args.prompt} if args.prompt else {"class_labels": args.class_labels}
    return {**what, "num_images_per_prompt": args.num_images if args.num_images > 1 else None}, count


def run(args: argparse.Namespace) -> int:
    what, count = request(args)
    fps = DEFAULT_FPS if args.fps is None else args.fps
    if args.video is not None:
        path = check_video_file("--video", args.video, fps)
        if args.animate is not None:
            raise ValueError("--animate shows the tokens of a picture, not of a --video")
    else:
        path = check_file("--output", args.output, IMAGE_SUFFIXES)
        if args.fps is not None:
            raise ValueError("--fps belongs to --video")
    animation = check_file("--animate", args.animate, (".gif",)) if args.animate is not None else None
    resolve_device(args.device)
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed

    import torch

    pipe = load_pipeline(args.model, args)
    if makes_videos(pipe) != (args.video is not None):
        made, option = ("videos", "--video") if makes_videos(pipe) else ("pictures", "--output")
        raise ValueError(f"{type(pipe).__name__} makes {made}: give {option}")
    options = {
        **what,
        "num_candidates": args.num_candidates,
        "guidance_scale": args.guidance_scale,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "output_codes": True if animation is not None else None,
    }
    if animation is not None and draws_previews(pipe):
        options |= {"output_codes": None, "output_previews": True}
    arguments = call_arguments(pipe, options)
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    output = pipe(**arguments, generator=generators)
    if args.video is not None:
        return write_videos(
            args, [[resized(frame, args.size) for frame in video] for video in output.frames], path, fps, seed
        )
    images = [resized(image, args.size) for image in output.images]

    paths = [path] if args.grid else output_paths(path, len(images))
    for image, target in zip([image_grid(images)] if args.grid else images, paths, strict=True):
        save_image(image, target)
    if animation is not None:
        from armm.cli.animation import appearing_tokens, previews

        if draws_previews(pipe):
            frames, durations = previews([*output.previews, output.images], args.animate_size)
        else:
            frames, durations = appearing_tokens(pipe, output.codes, args.animate_size, quiet=args.quiet)
        save_gif(frames, durations, animation)
        paths.append(animation)
    report(args, paths, seed)
    return 0


def draws_previews(pipe: Any) -> bool:
    """Whether the pipeline draws whole images that become clearer, rather than one place after the other."""
    return "output_previews" in inspect.signature(type(pipe).__call__).parameters


def makes_videos(pipe: Any) -> bool:
    """Whether the pipeline's tokenizer codes videos."""
    return any(getattr(component, "is_video", False) for component in pipe.components.values())


def write_videos(args: argparse.Namespace, videos: list[list[Image.Image]], path: Path, fps: int, seed: int) -> int:
    """Writes each video to a file, or all side by side into one with `--grid`."""
    paths = [path] if args.grid else output_paths(path, len(videos))
    if args.grid:
        videos = [[image_grid(frames) for frames in zip(*videos, strict=True)]]
    for frames, target in zip(videos, paths, strict=True):
        save_video(frames, fps, target)
    report(args, paths, seed)
    return 0


def report(args: argparse.Namespace, paths: list[Path], seed: int) -> None:
    if not args.quiet:
        print(f"{', '.join(map(str, paths))} (seed {seed})")
