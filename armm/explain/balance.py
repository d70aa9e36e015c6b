"""How attention is shared between text and image: modality dominance and attention efficiency (arXiv 2508.10552)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import PIL.ImageDraw
import torch
from torch import Tensor

EPSILON = 1e-10


@dataclass
class Balance:
    """One number for each layer.

    Args:
        text_tokens, image_tokens: of the prompt, |T| and |O|.
        text_share: attention of the written words on the prompt's text, A_T, of that on the whole prompt; the image has the rest.
        dominance: MDI, (A_T / |T|) / (A_O / |O|): above 1 a text token is looked at more than an image token.
        text_efficiency, image_efficiency: AEI, the share of attention over the share of tokens.
    """

    text_tokens: list[int]
    image_tokens: list[int]
    text_share: list[float]
    dominance: list[float]
    text_efficiency: list[float]
    image_efficiency: list[float]

    def groups(self) -> dict[str, dict[str, float]]:
        """The means over the first two, the middle two and the last two layers."""
        layers = len(self.dominance)
        middle = max(layers // 2 - 1, 0)
        spans = {"early": range(min(2, layers)), "middle": range(middle, min(middle + 2, layers))}
        spans["late"] = range(max(layers - 2, 0), layers)
        values = {"dominance": self.dominance, "text_efficiency": self.text_efficiency, "text_share": self.text_share}
        return {
            group: {name: sum(value[i] for i in span) / len(span) for name, value in values.items()}
            for group, span in spans.items()
        }

    def picture(self, width: int = 480, height: int = 200) -> PIL.Image.Image:
        """Bars of the dominance of each layer on a logarithmic scale; the line in the middle is balance."""
        image = PIL.Image.new("RGB", (width, height), "white")
        draw = PIL.ImageDraw.Draw(image)
        logs = torch.tensor(self.dominance).clamp(min=1e-4).log2()
        reach = max(float(logs.abs().max()), 1.0)
        step, middle = width / max(len(logs), 1), height / 2
        for layer, value in enumerate(logs.tolist()):
            top = middle - value / reach * (height / 2 - 24)
            color = (214, 96, 77) if value > 0 else (67, 147, 195)
            box = (layer * step + 0.15 * step, min(top, middle), (layer + 0.85) * step, max(top, middle))
            draw.rectangle(box, fill=color)
            draw.text((layer * step + 0.15 * step, height - 12), f"{layer + 1}", fill="black")
        draw.line((0, middle, width, middle), fill="black")
        draw.text((4, 4), f"MDI by layer: text above, image below (2^{reach:.1f} at the edge)", fill="black")
        return image


def attention_balance(rows: Sequence[Tensor], text: Sequence[Tensor], image: Sequence[Tensor]) -> Balance:
    """The balance of each layer.

    Args:
        rows: for each layer, attention [H, Q, K] of the written words on everything.
        text, image: for each layer, which of the keys are the prompt's text, and its image tokens: bool [K]. Other keys (what was
            written before) do not count.
    """
    result = Balance([], [], [], [], [], [])
    for weights, words, cells in zip(rows, text, image, strict=True):
        total = weights.double().mean(0).sum(0)
        on_text, on_image = float(total[words].sum()), float(total[cells].sum())
        both = on_text + on_image + EPSILON
        share, other = on_text / both, on_image / both
        number, others = int(words.sum()), int(cells.sum())
        result.text_tokens.append(number)
        result.image_tokens.append(others)
        result.text_share.append(share)
        result.dominance.append((share / max(number, 1)) / (other / max(others, 1) + EPSILON))
        part = number / max(number + others, 1)
        result.text_efficiency.append(share / (part + EPSILON))
        result.image_efficiency.append(other / (1 - part + EPSILON))
    return result
