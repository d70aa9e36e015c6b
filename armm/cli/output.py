"""Files that a command writes: checked before any work, written under a temporary name, renamed when whole."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".gif")
MP4_PACKAGES = ("imageio", "imageio_ffmpeg")
GIF_MAX_FPS = 50  # players slow shorter frames down


def _check_folder(option: str, path: Path) -> None:
    folder = path.parent
    if not folder.exists():
        raise FileNotFoundError(f"{option}: the folder {str(folder)!r} does not exist; create it first")
    if not folder.is_dir():
        raise NotADirectoryError(f"{option}: {str(folder)!r} is not a folder")
    try:
        handle, name = tempfile.mkstemp(prefix=".armm-", dir=folder)
    except OSError as error:
        raise PermissionError(f"{option}: cannot write in {str(folder)!r}: {error.strerror}") from None
    os.close(handle)
    os.unlink(name)


def check_file(option: str, value: str, suffixes: Sequence[str]) -> Path:
    """The path of a file to be written; refuses a wrong extension, a folder, and a place that cannot be written."""
    path = Path(value)
    if not value or path.is_dir():
        raise IsADirectoryError(f"{option}: {value!r} is a folder; give a file name ending in {', '.join(suffixes)}")
    if path.suffix.lower() not in suffixes:
        given = f"the extension {path.suffix!r}" if path.suffix else "no extension"
        raise ValueError(f"{option}: {value!r} has {given}; use one of {', '.join(suffixes)}")
    _check_folder(option, path)
    return path


def check_new_folder(option: str, value: str) -> Path:
    """The path of a folder to be made; refuses one that holds anything already."""
    path = Path(value)
    if path.is_file():
        raise FileExistsError(f"{option}: {value!r} is a file; give a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{option}: the folder {value!r} is not empty; give a new folder")
    _check_folder(option, path.absolute())
    return path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` with its extension; renamed to `path` when the block ends without an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to `path` when the block ends without an error."""
    path = path.absolute()
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name[:40]}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_image(image: Image.Image, path: Path) -> None:
    """Writes one picture in the format of `path`'s extension."""
    with atomic_file(path) as temporary:
        image.save(temporary)


def save_gif(frames: Sequence[Image.Image], durations: Sequence[int], path: Path) -> None:
    """Writes a looping GIF; `durations` are milliseconds, one per frame."""
    with atomic_file(path) as temporary:
        frames[0].save(
            temporary, save_all=True, append_images=list(frames[1:]), duration=list(durations), loop=0, optimize=False
        )


def check_video_file(option: str, value: str, fps: int) -> Path:
    """The path of a video to be written; also refuses what cannot be written here, or not at `fps` frames a second."""
    path = check_file(option, value, VIDEO_SUFFIXES)
    if path.suffix.lower() == ".gif":
        if fps > GIF_MAX_FPS:
            raise ValueError(f"--fps: a GIF shows at most {GIF_MAX_FPS} frames a second, got {fps}; write an .mp4")
    elif not all(importlib.util.find_spec(name) for name in MP4_PACKAGES):
        raise ValueError(
            f"{option}: writing .mp4 needs imageio and imageio-ffmpeg; install them with `pip install 'armm[video]'`, or give a "
            "file name ending in .gif"
        )
    return path


def gif_durations(count: int, fps: int) -> list[int]:
    """Milliseconds of each of `count` frames: whole hundredths of a second, as a GIF has them, without drifting from `fps`."""
    ends = [round(100 * index / fps) for index in range(count + 1)]
    return [10 * (end - start) for start, end in zip(ends, ends[1:], strict=False)]


def save_video(frames: Sequence[Image.Image], fps: int, path: Path) -> None:
    """Writes a GIF or an MP4, by `path`'s extension, at `fps` frames a second."""
    if path.suffix.lower() == ".gif":
        save_gif(frames, gif_durations(len(frames), fps), path)
        return
    from diffusers.utils import export_to_video

    with atomic_file(path) as temporary:
        export_to_video(list(frames), str(temporary), fps=fps, macro_block_size=2)


def save_json(value: Any, path: Path) -> None:
    """Writes `value` as indented JSON with a newline at the end."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def image_grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 2) -> Image.Image:
    """One picture of many, row by row, on a white ground."""
    from PIL import Image as PILImage

    columns = columns or max(1, round(len(images) ** 0.5 + 0.49))
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sheet = PILImage.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        sheet.paste(image, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return sheet


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain-text table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)
