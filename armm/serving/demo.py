"""The page of `armm demo`: three tabs over a `Studio`, built with gradio."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image

from armm.serving import examples, look
from armm.serving.handlers import ACCELERATOR_INFO, PLAIN, REGIONS, Handlers, friendly
from armm.serving.local import OwnHostOnly
from armm.serving.requirements import require_gradio, usable_port
from armm.serving.studio import MAX_CANDIDATES, MAX_IMAGES, MAX_SEED, Studio

__all__ = ["build_page", "serve"]

METHODS = ("attention", "tam", "arc", "msea", "msea+arc")
HANDED_OVER = 256  # pixels of a drawn picture in the other tabs, where it is painted on
DRAW_HELP = (
    "Describe one to three solid objects on a plane. Tokens appear in the order in which the transformer draws them."
)
ASK_HELP = "Ask about a scene, or leave the question empty for a caption. The maps show where each word of the answer comes from."
PAINT_HELP = (
    "Paint over what shall change and describe the whole picture as it shall be. Whole cells of tokens are drawn anew."
)


def build_page(studio: Studio, folder: Path) -> Any:
    """The gradio Blocks. `folder` takes the example pictures."""
    import gradio as gr

    handlers, pictures = Handlers(studio), examples.write_pictures(folder)
    with gr.Blocks(title="armm demo", analytics_enabled=False) as page:
        gr.HTML(look.HEADER)
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                drawing = _generate_tab(gr, studio, handlers)
            with gr.Tab("Understand", id="understand"):
                asking = _understand_tab(gr, handlers, pictures)
            with gr.Tab("Inpaint", id="inpaint"):
                painting = _inpaint_tab(gr, studio, handlers, pictures)
        chosen = drawing["chosen"]

        def hand_over(gallery: Any, number: int, tab: str) -> Any:
            if not gallery:
                raise gr.Error("Draw a picture first.", title="Nothing to take", duration=5, print_exception=False)
            picture = gallery[min(number, len(gallery) - 1)][0]
            return picture.resize((HANDED_OVER, HANDED_OVER), PIL.Image.Resampling.BICUBIC), gr.Tabs(selected=tab)

        for button, tab, target in (("ask", "understand", asking["image"]), ("paint", "inpaint", painting["editor"])):
            drawing[button].click(
                lambda gallery, number, tab=tab: hand_over(gallery, number, tab),
                [drawing["gallery"], chosen],
                [target, tabs],
                api_name=False,
            )
    page.queue(default_concurrency_limit=8)
    return page


def _model_event(
    gr: Any, button: Any, work: Callable[..., Iterator[Any]], inputs: list, outputs: list, *others: Any
) -> None:
    """A click (or one of `others`) that runs the model: one at a time, while the page shows its progress itself."""

    @friendly
    def handler(*arguments: Any) -> Iterator[Any]:
        yield from work(*arguments)

    def run(request: gr.Request, *arguments: Any) -> Iterator[Any]:
        yield from handler(*arguments, request)

    run.__annotations__["request"] = gr.Request
    options = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "model", "api_name": work.__name__}
    gr.on([button.click, *others], run, inputs, outputs, **options)


def _seed_and_guidance(gr: Any, studio: Studio, prefix: str) -> tuple[Any, Any]:
    with gr.Row(equal_height=True):
        seed = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=90, elem_id=f"{prefix}-seed"
        )
        scale = float(studio.settings["guidance_scale"])
        info = "how strictly the prompt is followed; 1 is none"
        guidance = gr.Slider(1, max(6.0, scale), scale, step=0.25, label="Guidance scale", info=info, scale=2)
    return seed, guidance


def _generate_tab(gr: Any, studio: Studio, handlers: Handlers) -> dict[str, Any]:
    gr.HTML(f'<p class="armm-help">{DRAW_HELP}</p>')
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            prompt = gr.Textbox(
                examples.PROMPTS[0], label="Prompt", lines=2, max_lines=3, elem_id="prompt", autofocus=True
            )
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=3)
                stop = gr.Button("Stop", elem_id="stop", min_width=80)
                dice = gr.Button("New seed", elem_id="new-seed", min_width=130)
            seed, guidance = _seed_and_guidance(gr, studio, "draw")
            with gr.Row(equal_height=True):
                count = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Pictures", elem_id="count")
                own = min(int(studio.settings["num_candidates"]), MAX_CANDIDATES)
                info = "of each picture; the model keeps the best"
                candidates = gr.Slider(
                    1, MAX_CANDIDATES, own, step=1, label="Candidates", info=info, elem_id="candidates"
                )
            names = [(f"{name.replace('_', ' ')} ({studio.calls(name)} calls)", name) for name in studio.decodings]
            decoding = gr.Radio(names, value=studio.decodings[0], label="Decoder", elem_id="decoder")
            fitting = [PLAIN, *studio.accelerations(studio.decodings[0])]
            acceleration = gr.Radio(
                fitting, value=PLAIN, label="Accelerator", info=ACCELERATOR_INFO, elem_id="accelerator"
            )
            window = gr.Slider(2, 32, 8, step=1, label="Tokens that one call looks at", visible=False, elem_id="window")
            gr.Examples([[text] for text in examples.PROMPTS], [prompt], label="Try one of these")
        with gr.Column(scale=6, min_width=340):
            place = look.stage(caption="The picture appears here.")
            stage = gr.HTML(place, elem_id="stage")
            gallery = gr.Gallery(
                label="Pictures", visible=False, elem_id="drawn", type="pil", format="png", object_fit="contain", interactive=False,
                show_label=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
            facts = gr.HTML(visible=False, elem_id="facts")
            with gr.Row():
                ask, paint = (
                    gr.Button("Ask about it", elem_id="ask-about"),
                    gr.Button("Repaint it", elem_id="repaint-it"),
                )
    with gr.Accordion("Words the model knows", open=False):
        gr.HTML(look.words(studio.words))
    chosen = gr.State(0)

    def choose(event: gr.SelectData) -> int:
        return event.index

    choose.__annotations__["event"] = gr.SelectData
    gallery.select(choose, None, chosen, queue=False, api_name=False)
    dice.click(lambda: random.randrange(10_000), None, seed, queue=False, api_name=False)
    decoding.change(
        handlers.fitting, [decoding, acceleration], [acceleration, window, candidates], queue=False, api_name=False
    )
    acceleration.change(
        lambda name: gr.update(visible=name != PLAIN), acceleration, window, queue=False, api_name=False
    )

    def halt(request: gr.Request) -> None:
        studio.stop(request.session_hash or "")

    halt.__annotations__["request"] = gr.Request
    stop.click(halt, None, None, queue=False, api_name=False)
    inputs = [prompt, seed, count, guidance, candidates, decoding, acceleration, window]
    _model_event(gr, draw, handlers.draw, inputs, [stage, gallery, facts], prompt.submit)
    return {"gallery": gallery, "chosen": chosen, "ask": ask, "paint": paint}


def _understand_tab(gr: Any, handlers: Handlers, pictures: list[str]) -> dict[str, Any]:
    gr.HTML(f'<p class="armm-help">{ASK_HELP}</p>')
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            image = gr.Image(
                pictures[0], label="Picture", type="pil", sources=["upload", "clipboard"], height=400, elem_id="seen"
            )
            gr.Examples([[path] for path in pictures], [image], label="Pictures made by the library")
        with gr.Column(scale=6, min_width=340):
            question = gr.Textbox(
                label="Question", placeholder="empty: describe the picture", elem_id="question", max_lines=2
            )
            gr.Examples([[text] for text in examples.QUESTIONS if text], [question], label="Questions")
            answer_button = gr.Button("Answer", variant="primary", elem_id="ask")
            answer = gr.Textbox(
                label="Answer", elem_id="answer", interactive=False, lines=1, max_lines=4, buttons=["copy"]
            )
            overlays = gr.Gallery(
                label="Where each word comes from", visible=False, elem_id="overlays", format="png",
                object_fit="contain", interactive=False, fit_columns=False, buttons=["download", "fullscreen"],
            )  # fmt: skip
            with gr.Row(equal_height=True):
                explained = gr.Checkbox(True, label="Explain the answer", elem_id="explain", min_width=120)
                info = "attention of the last layers; Token Activation Maps and their variants"
                method = gr.Dropdown(list(METHODS), value=METHODS[0], label="Method", info=info, scale=2)
    _model_event(
        gr,
        answer_button,
        handlers.understand,
        [image, question, explained, method],
        [answer, overlays],
        question.submit,
    )
    return {"image": image}


def _inpaint_tab(gr: Any, studio: Studio, handlers: Handlers, pictures: list[str]) -> dict[str, Any]:
    gr.HTML(f'<p class="armm-help">{PAINT_HELP}</p>')
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            editor = gr.ImageEditor(
                pictures[1], label="Picture and mask", type="pil", image_mode="RGBA", sources=["upload", "clipboard"],
                layers=False, transforms=(), brush=gr.Brush(default_size=40, colors=["#6366f1"], color_mode="fixed"),
                eraser=gr.Eraser(default_size=40), canvas_size=(256, 256), height=470, elem_id="editor", buttons=[],
            )  # fmt: skip
            gr.Examples([[path] for path in pictures], [editor], label="Pictures made by the library")
        with gr.Column(scale=6, min_width=340):
            prompt = gr.Textbox(examples.REPAINTINGS[0], label="Prompt", lines=2, max_lines=3, elem_id="paint-prompt")
            region = gr.Radio(list(REGIONS), value=REGIONS[0], label="Draw anew", elem_id="region")
            button = gr.Button("Repaint", variant="primary", elem_id="repaint")
            stage = gr.HTML(look.stage(caption="The result appears here."), elem_id="paint-stage")
            result = gr.Image(
                label="Result", visible=False, elem_id="repainted", format="png", height=400, interactive=False,
                buttons=["download"],
            )  # fmt: skip
            facts = gr.HTML(visible=False, elem_id="paint-facts")
            seed, guidance = _seed_and_guidance(gr, studio, "paint")
            keep = gr.Checkbox(True, label="Keep the pixels of the rest as they are")
            gr.Examples([[text] for text in examples.REPAINTINGS], [prompt], label="Try one of these")
    inputs = [editor, region, prompt, seed, guidance, keep]
    _model_event(gr, button, handlers.repaint, inputs, [stage, result, facts], prompt.submit)
    return {"editor": editor}


@contextlib.contextmanager
def serve(studio: Studio, host: str = "127.0.0.1", port: int = 7860) -> Iterator[str]:
    """Serves the page while the block runs and gives its address. Files that come up are removed at the end.

    Args:
        host: address to listen on; the default is reachable from this machine only.
        port: 0 takes a free one.

    Raises:
        ImportError: gradio is missing. ValueError: the address or the port cannot be used.
    """
    require_gradio()
    port = usable_port(host, port)
    with tempfile.TemporaryDirectory(prefix="armm-demo-") as folder, _environment(folder):
        from starlette.middleware import Middleware

        page = build_page(studio, Path(folder))
        try:
            _, address, _ = page.launch(
                server_name=host,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                run_history=False,
                footer_links=[],
                enable_monitoring=False,
                mcp_server=False,
                app_kwargs={"middleware": [Middleware(OwnHostOnly)]},
                theme=look.theme(),
                css=look.CSS,
            )
            yield address
        finally:
            page.close(verbose=False)


@contextlib.contextmanager
def _environment(folder: str) -> Iterator[None]:
    """What gradio reads from the environment: where files that come up go, and that nothing is reported to anyone."""
    wanted = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
