"""What the page's buttons do, and how mistakes are told: between the `Studio` and gradio."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import PIL.Image

from armm.serving import look
from armm.serving.studio import Drawing, Preview, Studio, painted_mask

__all__ = ["ACCELERATOR_INFO", "PLAIN", "REGIONS", "Handlers", "friendly", "message"]

PLAIN = "none"
REGIONS = ("what I painted", "left half", "right half")
ACCELERATOR_INFO = (
    "drafts several tokens that one call checks; Jacobi is exact, the others may take drafts that come close"
)


def friendly(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A handler whose mistakes of users become a message on the page instead of a traceback."""

    @functools.wraps(work)
    def handler(*arguments: Any) -> Iterator[Any]:
        import gradio as gr

        try:
            yield from work(*arguments)
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(message(error), title="That did not work", duration=8, print_exception=False) from None

    return handler


def message(error: BaseException) -> str:
    """The message of an error as a person reads it on the page, where the known words have a place of their own."""
    text = " ".join(str(error).split()).replace("`", "")
    before, found, _ = text.partition(" Known words:")
    return f"{before} The words it knows are listed below the drawing form." if found else text


def whole(value: Any) -> Any:
    """A number field's value as an int, if it is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Handlers:
    """What the page's buttons do: generators of what its fields show next."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    @staticmethod
    def _session(request: Any) -> str:
        return getattr(request, "session_hash", None) or ""

    def draw(
        self,
        prompt: str,
        seed: Any,
        count: Any,
        guidance: float,
        candidates: Any,
        decoding: str,
        acceleration: str,
        window: Any,
        request: Any,
    ) -> Iterator[tuple]:
        """-> stage, gallery, facts."""
        import gradio as gr

        hidden = gr.update(visible=False)
        steps = self.studio.draw(
            prompt,
            seed=whole(seed),
            count=whole(count),
            candidates=whole(candidates) if self.studio.judges(decoding) else None,
            guidance_scale=guidance,
            decoding=decoding,
            acceleration=None if acceleration == PLAIN else acceleration,
            window=whole(window),
            session=self._session(request),
        )
        for step in steps:
            if isinstance(step, Preview):
                yield gr.update(value=self._progress(step), visible=True), hidden, hidden
                continue
            if step.stopped:
                gr.Info("Stopped.", duration=3)
                yield gr.skip(), hidden, hidden
                return
            pictures = [(image, f"seed {whole(seed) + number}") for number, image in enumerate(step.images)]
            gallery = gr.update(
                value=pictures, visible=True, columns=1 if len(pictures) == 1 else 2, selected_index=None
            )
            yield hidden, gallery, gr.update(value=self._facts(step, decoding), visible=True)

    @staticmethod
    def _progress(step: Preview) -> str:
        of = f" of each of {len(step.images)} candidates" if len(step.images) > 1 else ""
        return look.stage(
            step.images, step.known / step.tokens, f"{step.known} of {step.tokens} tokens{of}, call {step.calls}"
        )

    def _facts(self, step: Drawing, decoding: str | None = None) -> str:
        entries = [(str(step.calls), "calls of the transformer"), (str(step.tokens), "tokens of a picture")]
        entries.append((f"{step.seconds:.2f} s", "without the previews"))
        if step.statistics is not None:
            plain = self.studio.calls(decoding or self.studio.decodings[0])
            entries += [
                (f"{plain / max(step.calls, 1):.1f} ×", f"fewer calls than {plain}"),
                (f"{step.statistics.mean_accepted_length:.2f}", "tokens certain by one call"),
                (f"{step.statistics.acceptance_rate:.0%}", "of the drafts taken"),
            ]
        heat = "" if step.statistics is None else look.heat_map(step.statistics.heat_map(1))
        return look.facts(entries) + heat

    def understand(
        self, image: PIL.Image.Image | None, question: str | None, explained: bool, method: str, request: Any
    ) -> Iterator[tuple]:
        """-> answer, overlays."""
        import gradio as gr

        question = question or ""
        hidden = gr.update(value=None, visible=False)
        said = ""
        for said in self.studio.answer(image, question, session=self._session(request)):
            yield said, hidden
        if explained and said:
            explanation = self.studio.explain(image, question, method)
            overlays = [(explanation.overlay(number, 192), word) for number, word in enumerate(explanation.words)]
            yield explanation.answer, gr.update(value=overlays, visible=True, columns=min(max(len(overlays), 3), 4))

    def repaint(
        self,
        editor: dict[str, Any] | None,
        region: str,
        prompt: str,
        seed: Any,
        guidance: float,
        keep: bool,
        request: Any,
    ) -> Iterator[tuple]:
        """-> stage, result, facts."""
        import gradio as gr

        hidden = gr.update(visible=False)
        image, mask = painted_mask(editor)
        if mask is not None and region != REGIONS[0]:
            half = mask.width // 2
            mask.paste(0, (0, 0, *mask.size))
            mask.paste(255, (0, 0, half, mask.height) if region == REGIONS[1] else (half, 0, *mask.size))
        steps = self.studio.repaint(
            image,
            mask,
            prompt,
            seed=whole(seed),
            guidance_scale=guidance,
            keep_pixels=keep,
            session=self._session(request),
        )
        for step in steps:
            if isinstance(step, Preview):
                yield gr.update(value=self._progress(step), visible=True), hidden, hidden
            elif step.stopped:
                gr.Info("Stopped.", duration=3)
                yield gr.skip(), hidden, hidden
            else:
                facts = [(str(step.calls), "calls of the transformer"), (str(step.tokens), "tokens drawn anew")]
                facts.append((f"{step.seconds:.2f} s", "without the previews"))
                yield (
                    hidden,
                    gr.update(value=step.images[0], visible=True),
                    gr.update(value=look.facts(facts), visible=True),
                )

    def fitting(self, decoding: str, chosen: str) -> tuple[Any, Any, Any]:
        """What goes with a decoding, of which the acceleration `chosen` may be -> chooser of accelerations, window, candidates."""
        import gradio as gr

        fitting = [PLAIN, *self.studio.accelerations(decoding)]
        info = ACCELERATOR_INFO if len(fitting) > 1 else "None goes with this decoding."
        chosen = chosen if chosen in fitting else PLAIN
        return (
            gr.update(choices=fitting, value=chosen, info=info),
            gr.update(visible=chosen != PLAIN),
            gr.update(visible=self.studio.judges(decoding)),
        )
