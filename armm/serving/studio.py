"""What the page of `armm demo` does, without the page: pictures, answers, explanations and repainted pictures, step by step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from armm import weights
from armm.decoding.speculative import (
    GroupedSpeculative,
    JacobiSpeculative,
    RelaxedSpeculative,
    Speculative,
    SpeculativeStatistics,
)
from armm.explain import Explanation
from armm.serving.live import Pace, Show, live
from pipelines import UnifiedImageToTextPipeline, UnifiedInpaintPipeline, UnifiedTextToImagePipeline, decodings, loading
from pipelines.preview import known_so_far, partial_images, progress
from pipelines.shipped import task_decodings, task_pipeline

__all__ = ["ACCELERATIONS", "Drawing", "Preview", "Studio", "painted_mask"]

ACCELERATIONS: dict[str, Callable[..., Speculative]] = {
    "JacobiSpeculative": JacobiSpeculative,
    "GroupedSpeculative": GroupedSpeculative,
    "RelaxedSpeculative": RelaxedSpeculative,
}
MAX_SEED = 2**31 - 1
MAX_IMAGES = 4
MAX_CANDIDATES = 8
PREVIEW_SIZE = 192
MAX_SHOWN = 16  # candidates in a preview


@dataclass
class Preview:
    """A drawing that is not finished: its pictures so far (of the first candidates), calls of the transformer, tokens known and in all."""

    images: list[PIL.Image.Image]
    calls: int
    known: int
    tokens: int


@dataclass
class Drawing:
    """A finished drawing.

    calls: of the transformer. tokens: of one picture. seconds: without the previews. statistics: of speculative decoding. stopped:
    by the user, before the end.
    """

    images: list[PIL.Image.Image]
    calls: int
    tokens: int
    seconds: float
    statistics: SpeculativeStatistics | None = None
    stopped: bool = False


@dataclass
class _Watch:
    """Follows a drawing: a `callback_on_step_end` that shows previews at its own pace and stops when it is told to."""

    show: Show
    stop: threading.Event
    preview: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # -> tokens, where they are known
    tokenizer: Any
    grid: tuple[int, int]
    calls_in_all: int = 0  # without acceleration
    pace: Pace = field(default_factory=Pace)
    calls: int = 0
    stopped: bool = False

    def __call__(self, pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        self.calls += max(self.calls_in_all // pipe.num_timesteps, 1)  # a step may be many of a solver
        if self.stop.is_set():
            pipe._interrupt = self.stopped = True
            return {}
        if self.pace.due:
            with self.pace:
                tokens, known = (part[:MAX_SHOWN] for part in self.preview(tensors["latents"]))
                images = partial_images(self.tokenizer, tokens, self.grid, PREVIEW_SIZE, known)
                self.show(Preview(images, self.calls, int(known.sum(1).min()), known.shape[1]))
        return {}


class Studio:
    """A checkpoint that draws, reads and repaints. One piece of work runs at a time; the others wait.

    Args:
        folder: a directory of a unified model, such as `weights/scenes` or the `export/` of a training run; None is the shipped one,
            which draws with all decodings of the shipped weights.
        device, dtype: to run on, and to compute in.

    Raises:
        ValueError: the directory holds another kind of model.
    """

    def __init__(self, folder: str | Path | None = None, device: Any = "cpu", dtype: torch.dtype | None = None) -> None:
        self.folder = weights.path("scenes") if folder is None else Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {str(self.folder)!r}: give a directory written by `save_pretrained`")
        self.device, self.dtype = torch.device(device), dtype or torch.float32
        self._shipped = folder is None
        self.decodings = (
            task_decodings("text-to-image")
            if folder is None
            else decodings.offered(self.folder, loading.read_index(self.folder))
        )
        self._drawers: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}
        own = self.drawer(self.decodings[0])
        parts = {
            **own.components,
            "vocabulary": own.config.vocabulary,
            "generation_config": own.config.generation_config,
        }
        self.reader, self.painter = UnifiedImageToTextPipeline(**parts), UnifiedInpaintPipeline(**parts)
        for pipe in (self.reader, self.painter):
            pipe.set_progress_bar_config(disable=True)

    def drawer(self, decoding: str) -> Any:
        """The pipeline that draws with `decoding`, loaded when it is first asked for."""
        if decoding not in self._drawers:
            options: dict[str, Any] = {"decoding": decoding, "dtype": self.dtype}
            if self._shipped:
                pipe = task_pipeline("text-to-image", **options)
            else:
                pipe = UnifiedTextToImagePipeline.from_pretrained(self.folder, **options)
            pipe.set_progress_bar_config(disable=True)
            self._drawers[decoding] = pipe.to(self.device)
        return self._drawers[decoding]

    # ------------------------------------------------------------------ facts for the page

    @property
    def words(self) -> list[str]:
        """What may stand in a prompt or a question."""
        return self.reader.words.words

    @property
    def settings(self) -> dict[str, Any]:
        """The checkpoint's own settings of a drawing."""
        return self.drawer(self.decodings[0]).generation_config

    def calls(self, decoding: str) -> int:
        """Calls of the transformer that a picture takes without acceleration."""
        pipe = self.drawer(decoding)
        settings, grid = pipe.generation_config, pipe.transformer.grid
        if "num_flow_steps" in settings:
            return pipe.decoding.num_calls(grid, settings["num_flow_steps"])
        return settings["num_inference_steps"] if "num_inference_steps" in settings else pipe.decoding.num_calls(grid)

    def judges(self, decoding: str) -> bool:
        """Whether the model that draws with a decoding can choose among candidates."""
        return "num_candidates" in self.drawer(decoding).generation_settings

    def accelerations(self, decoding: str) -> list[str]:
        """Names of the accelerations that go with a decoding."""
        fitting, pipe = [], self.drawer(decoding)
        for name, kind in ACCELERATIONS.items():
            acceleration = kind()
            if not isinstance(acceleration, pipe._accelerations):
                continue
            try:
                acceleration.check(pipe)
            except ValueError:
                continue
            fitting.append(name)
        return fitting

    # ------------------------------------------------------------------ work

    def stop(self, session: str = "") -> None:
        """Ends the drawing of a session that is going on, if there is one."""
        if (event := self._stops.get(session)) is not None:
            event.set()

    def _live(self, work: Callable[[Show, threading.Event], Any], session: str) -> Iterator[Any]:
        stop = self._stops[session] = threading.Event()

        def alone(show: Show, stop: threading.Event) -> Any:
            with self._lock, torch.no_grad():
                return work(show, stop)

        try:
            yield from live(alone, stop)
        finally:
            if self._stops.get(session) is stop:
                del self._stops[session]

    def draw(
        self,
        prompt: str,
        *,
        seed: int = 0,
        count: int = 1,
        candidates: int | None = None,
        guidance_scale: float | None = None,
        decoding: str | None = None,
        acceleration: str | None = None,
        window: int = 8,
        session: str = "",
    ) -> Iterator[Preview | Drawing]:
        """Pictures of a sentence: previews while the tokens come, then the `Drawing`.

        Args:
            seed: picture number i has the seed `seed` + i, as with `armm generate`.
            count, candidates: pictures, and how many are drawn for each of them; None is the checkpoint's own number. Only where the
                decoding `judges`.
            decoding: one of `decodings`. acceleration: one of `accelerations(decoding)`, or None.
            window: of the acceleration, tokens that one call looks at.
            session: whose drawing it is, for `stop`.
        """
        loading.check_choice(decoding := decoding or self.decodings[0], self.decodings, "`decoding`")
        if acceleration is not None:
            loading.check_choice(acceleration, list(ACCELERATIONS), "`acceleration`")
        _check_whole("seed", seed, 0, MAX_SEED)
        _check_whole("count", count, 1, MAX_IMAGES)

        def work(show: Show, stop: threading.Event) -> Drawing:
            pipe = self.drawer(decoding)
            grid = pipe.transformer.grid
            tokens = grid[0] * grid[1]
            judged = {"num_candidates": candidates} if self.judges(decoding) else {}
            if not judged and candidates not in (None, 1):
                raise ValueError(f"no model chooses among candidates that are drawn with {decoding}: draw 1.")
            watch = _Watch(show, stop, partial(progress, count=tokens), pipe.tokenizer, grid, self.calls(decoding))
            speculative = None
            if acceleration is not None:
                speculative = ACCELERATIONS[acceleration](window=window, init="repeat_left")
                pipe.enable_acceleration(speculative)
            try:
                start = time.perf_counter()
                output = pipe(
                    prompt,
                    num_images_per_prompt=count,
                    guidance_scale=guidance_scale,
                    generator=[torch.Generator().manual_seed(seed + index) for index in range(count)],
                    callback_on_step_end=watch,
                    **judged,
                )
                seconds = time.perf_counter() - start - watch.pace.spent
            finally:
                pipe.disable_acceleration()
            statistics = None if speculative is None else speculative.statistics
            return Drawing(output.images, watch.calls, tokens, seconds, statistics, watch.stopped)

        return self._live(work, session)

    def answer(self, image: PIL.Image.Image | None, question: str = "", *, session: str = "") -> Iterator[str]:
        """The answer to a question about a picture, or without one a caption, as far as it is written; at last the whole text."""
        image = _given(image)

        def work(show: Show, stop: threading.Event) -> str:
            said = ""
            [reading] = self.reader.readings(image, question if question.strip() else None)
            for piece in self.reader.stream(reading):
                said += piece
                if stop.is_set():
                    break
                show(said)
            return said

        return self._live(work, session)

    def explain(self, image: PIL.Image.Image | None, question: str = "", method: str = "attention") -> Explanation:
        """Where in the picture each word of the answer comes from, see `UnderstandingPipeline.explain`."""
        image = _given(image)
        with self._lock:
            return self.reader.explain(image, question if question.strip() else None, method=method)

    def repaint(
        self,
        image: PIL.Image.Image | None,
        mask: PIL.Image.Image | None,
        prompt: str,
        *,
        seed: int = 0,
        guidance_scale: float | None = None,
        keep_pixels: bool = True,
        session: str = "",
    ) -> Iterator[Preview | Drawing]:
        """A picture drawn anew after `prompt` where `mask` is white: previews, then the `Drawing`."""
        image = _given(image)
        if mask is None or mask.getbbox() is None:
            raise ValueError("nothing is marked: paint over what is to be drawn anew.")
        _check_whole("seed", seed, 0, MAX_SEED)

        def work(show: Show, stop: threading.Event) -> Drawing:
            pipe = self.painter
            grid = pipe.transformer.grid
            redrawn = pipe.mask_to_cells(mask).flatten(1).to(self.device)
            known = pipe.encode_image(image)

            def preview(latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                ids = torch.where(redrawn, known_so_far(latents, known.shape[1]), known)
                return ids, ids >= 0

            watch = _Watch(show, stop, preview, pipe.tokenizer, grid)
            start = time.perf_counter()
            output = pipe(
                prompt,
                image,
                mask,
                keep_pixels=keep_pixels,
                guidance_scale=guidance_scale,
                generator=[torch.Generator().manual_seed(seed)],
                callback_on_step_end=watch,
            )
            seconds = time.perf_counter() - start - watch.pace.spent
            return Drawing(output.images, watch.calls, int(redrawn.sum()), seconds, None, watch.stopped)

        return self._live(work, session)


def painted_mask(editor: dict[str, Any] | None) -> tuple[PIL.Image.Image | None, PIL.Image.Image | None]:
    """(picture, mask) of what an image editor gives: `background`, and `layers` that are opaque where something was painted. The mask
    is white there and as large as the picture; both are None where there is no picture."""
    background = (editor or {}).get("background")
    if background is None:
        return None, None
    mask = PIL.Image.new("L", background.size, 0)
    for layer in (editor or {}).get("layers") or ():
        opaque = layer.getchannel("A").point(lambda value: 255 if value > 32 else 0).resize(mask.size)
        mask.paste(255, mask=opaque)
    picture = background.convert("RGBA")
    picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB"), mask


def _given(image: PIL.Image.Image | None) -> PIL.Image.Image:
    if image is None:
        raise ValueError("there is no picture: upload one, or choose an example.")
    return image


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"the {name} must be a whole number from {low} to {high}, got {value!r}.")
