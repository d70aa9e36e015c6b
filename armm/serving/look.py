"""How the page looks: theme, style sheet, and the small pieces of HTML that the handlers fill. No font comes from the network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import PIL.Image

__all__ = ["CSS", "HEADER", "facts", "heat_map", "stage", "theme", "words"]

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO_FONTS = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")

CSS = """
.gradio-container { max-width: 1180px !important; margin: 0 auto !important; }
.armm-header { display: flex; align-items: center; gap: 18px; padding: 14px 2px 4px; }
.armm-header svg { flex: none; }
.armm-header h1 { font-size: 1.55rem; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -0.01em; }
.armm-header p { margin: 2px 0 0; opacity: 0.72; font-size: 0.95rem; }
.armm-help { opacity: 0.72; font-size: 0.92rem; margin: 2px 0 6px; }
.armm-stage { display: grid; gap: 8px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); max-width: 560px; margin: 0 auto; }
.armm-stage img { width: 100%; border-radius: 8px; display: block; }
.armm-empty { display: grid; place-items: center; aspect-ratio: 4 / 3; border: 1.5px dashed var(--border-color-primary);
  border-radius: 12px; color: var(--body-text-color-subdued); font-size: 0.95rem; }
.armm-bar { height: 5px; border-radius: 3px; background: var(--border-color-primary); margin: 12px auto 6px; max-width: 560px;
  overflow: hidden; }
.armm-bar span { display: block; height: 100%; background: var(--color-accent); }
.armm-caption { text-align: center; color: var(--body-text-color-subdued); font-size: 0.88rem; font-variant-numeric: tabular-nums; }
.armm-facts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; }
.armm-facts div { padding: 9px 12px; border-radius: 10px; background: var(--block-background-fill);
  border: 1px solid var(--border-color-primary); }
.armm-facts b { display: block; font-size: 1.12rem; font-weight: 620; font-variant-numeric: tabular-nums; }
.armm-facts span { color: var(--body-text-color-subdued); font-size: 0.8rem; }
.armm-words { display: flex; flex-wrap: wrap; gap: 6px; }
.armm-words span { padding: 2px 9px; border-radius: 999px; background: var(--block-background-fill);
  border: 1px solid var(--border-color-primary); font-size: 0.85rem; }
.armm-heat { display: flex; align-items: center; gap: 14px; margin-top: 12px; color: var(--body-text-color-subdued); font-size: 0.88rem; }
.armm-heat img { width: 132px; border-radius: 8px; image-rendering: pixelated; }
#repainted img, #seen img { width: 100%; height: 100%; object-fit: contain; }
#drawn .grid-wrap, #overlays .grid-wrap { max-height: none; height: auto; }
#overlays .grid-wrap { margin-top: 30px; min-height: 0; }
#answer textarea { font-size: 1.12rem; line-height: 1.5; }
footer { display: none !important; }
"""

_CELLS = ("#4f46e5", "#0d9488", "#e11d48", "#f59e0b", "#4f46e5", None, None, None, None)


def _logo() -> str:
    cells = []
    for number, color in enumerate(_CELLS):
        fill = (
            f'fill="{color}"' if color else 'fill="none" stroke="#9ca3af" stroke-width="1.5" stroke-dasharray="3 2.4"'
        )
        cells.append(
            f'<rect x="{2 + number % 3 * 17}" y="{2 + number // 3 * 17}" width="14" height="14" rx="3" {fill}/>'
        )
    return f'<svg width="54" height="54" viewBox="0 0 52 52" aria-hidden="true">{"".join(cells)}</svg>'


HEADER = f"""<div class="armm-header">{_logo()}<div><h1>armm</h1>
<p>A small autoregressive model that draws, answers and repaints, token by token, on this machine.</p></div></div>"""


def theme() -> Any:
    """A gradio theme with the system's own fonts."""
    import gradio as gr

    base = gr.themes.Soft(
        primary_hue="indigo",
        secondary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        font=FONTS,
        font_mono=MONO_FONTS,
    )
    return base.set(
        background_fill_primary="*neutral_50",
        body_text_color_subdued="*neutral_500",
        block_title_background_fill="none",
        block_title_background_fill_dark="none",
        block_title_padding="0",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_300",
        block_label_background_fill="white",
        block_label_background_fill_dark="*neutral_800",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
    )


def _data_url(image: PIL.Image.Image, kind: str = "jpeg") -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, quality=88)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def stage(images: Sequence[PIL.Image.Image] = (), share: float | None = None, caption: str = "") -> str:
    """Pictures side by side over a bar that is filled to `share` (0 .. 1) and a caption; without pictures, a place for them."""
    if not images:
        return f'<div class="armm-empty">{html.escape(caption)}</div>'
    columns = 1 if len(images) == 1 else 2 if len(images) <= 4 else 4
    tiles = "".join(f'<img alt="picture {number}" src="{_data_url(image)}">' for number, image in enumerate(images, 1))
    bar = "" if share is None else f'<div class="armm-bar"><span style="width: {100 * share:.0f}%"></span></div>'
    return f'<div class="armm-stage" style="--columns: {columns}">{tiles}</div>{bar}<div class="armm-caption">{html.escape(caption)}</div>'


def facts(entries: Sequence[tuple[str, str]]) -> str:
    """Figures with what they mean: (value, meaning)."""
    cards = "".join(
        f"<div><b>{html.escape(value)}</b><span>{html.escape(meaning)}</span></div>" for value, meaning in entries
    )
    return f'<div class="armm-facts">{cards}</div>'


def heat_map(image: PIL.Image.Image) -> str:
    """Where the drafts of speculative decoding were taken."""
    meaning = (
        "Where drafts were taken: yellow always, dark never; grey where there was none. Plain ground is easy to guess."
    )
    return f'<div class="armm-heat"><img alt="heat map" src="{_data_url(image, "png")}"><p>{meaning}</p></div>'


def words(known: Sequence[str]) -> str:
    """The words that may be used."""
    return '<div class="armm-words">' + "".join(f"<span>{html.escape(word)}</span>" for word in known) + "</div>"
