"""DyVTE: a small gate at each layer decides when all image tokens may leave (arXiv 2411.19628)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armm.condition import Condition

from .base import PruningRun, VisualPruning

if TYPE_CHECKING:
    from armm.model import AutoregressiveModel

_KEY = re.compile(r"(?:.*\.)?visual_gates_router\.(\d+)\.w([12])\.weight")


class VisualTokenGates(nn.Module):
    """A two-class classifier for each layer: states of the text [2 * D] -> (stay, leave).

    Args:
        dim: width of the trunk.
        layers: blocks of the trunk.
        hidden: width of the gates.
    """

    def __init__(self, dim: int, layers: int, hidden: int = 2048) -> None:
        super().__init__()
        self.enter = nn.ModuleList(nn.Linear(2 * dim, hidden, bias=False) for _ in range(layers))
        self.decide = nn.ModuleList(nn.Linear(hidden, 2, bias=False) for _ in range(layers))
        for layer in (*self.enter, *self.decide):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, feature: Tensor, layer: int) -> Tensor:
        """Feature [..., 2 * D] of layer number `layer` -> logits [..., 2]."""
        enter, decide = self.enter[layer], self.decide[layer]
        return decide(F.gelu(enter(feature.to(enter.weight.dtype))))

    @classmethod
    def from_tensors(cls, state: Mapping[str, Tensor]) -> VisualTokenGates:
        """Gates from tensors `visual_gates_router.{layer}.w1.weight` and `w2.weight`, as their authors name them, among others.

        Raises:
            ValueError: there are none, or some are missing.
        """
        found = {(int(match[1]), match[2]): value for key, value in state.items() if (match := _KEY.fullmatch(key))}
        layers = 1 + max((layer for layer, _ in found), default=-1)
        missing = [f"visual_gates_router.{i}.w{part}" for i in range(layers) for part in "12" if (i, part) not in found]
        if not layers or missing:
            raise ValueError(f"the checkpoint lacks gates: {', '.join(missing) or 'visual_gates_router.*'}.")
        hidden, width = found[0, "1"].shape
        gates = cls(width // 2, layers, hidden)
        for layer in range(layers):
            gates.enter[layer].weight.data.copy_(found[layer, "1"])
            gates.decide[layer].weight.data.copy_(found[layer, "2"])
        return gates.eval()


class VisualTokenExit(VisualPruning):
    """Dynamic visual-token exit (arXiv 2411.19628): all image tokens leave behind the first layer whose gate says so.

    Args:
        gates: trained for the pipeline's transformer.
    """

    name: ClassVar[str] = "visual-token exit"

    def __init__(self, gates: VisualTokenGates) -> None:
        self.gates = gates

    @classmethod
    def from_single_file(cls, path: Any) -> VisualTokenExit:
        """From a file with gates, or with a whole model and its gates (`model.visual_gates_router.*`); safetensors or torch."""
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            return cls(VisualTokenGates.from_tensors(load_file(str(path))))
        return cls(VisualTokenGates.from_tensors(torch.load(path, map_location="cpu", weights_only=True)))

    def check(self, pipe: Any) -> None:
        trunk, gates = pipe.transformer.trunk, self.gates
        width = gates.enter[0].in_features // 2
        if len(gates.enter) != len(trunk.blocks) or width != trunk.dim:
            raise ValueError(
                f"these gates are for {len(gates.enter)} blocks of width {width}, this transformer has {len(trunk.blocks)} of "
                f"{trunk.dim}."
            )

    def begin(
        self,
        model: AutoregressiveModel,
        prompt: Condition,
        images: Sequence[tuple[int, int]],
        following: Tensor,
        grid: Sequence[int] | None = None,
    ) -> ExitRun:
        return ExitRun(self.gates, model, prompt, images, following, grid)


class ExitRun(PruningRun):
    """A prompt whose image tokens may leave.

    Attributes:
        exit_layer: the layer (counted from 0) behind which they left, or None.
        features, logits: of the gates that were asked.
    """

    def __init__(
        self,
        gates: VisualTokenGates,
        model: AutoregressiveModel,
        prompt: Condition,
        images: Sequence[tuple[int, int]],
        following: Tensor,
        grid: Sequence[int] | None = None,
    ) -> None:
        super().__init__(model, prompt, images, following, grid)
        self.gates = gates.to(prompt.embeds.device)
        self.exit_layer: int | None = None
        self.features: list[Tensor] = []
        self.logits: list[Tensor] = []

    def keep(self, layer: int, x: Tensor, rotary: Tensor | None) -> Tensor | None:
        if self.exit_layer is not None or not bool(self.is_visual.any()):
            return None
        feature = text_feature(x[0, self.instruction :])
        logits = self.gates(feature, layer)
        self.features.append(feature)
        self.logits.append(logits)
        if not bool(logits[0] < logits[1]):
            return None
        self.exit_layer = layer
        return (~self.visible).nonzero()[:, 0]


def text_feature(x: Tensor) -> Tensor:
    """What a gate looks at: the mean of the text after the image [n, D] without its last token, and that token: [2 * D]."""
    last = x[-1]
    return torch.cat([x[:-1].mean(0) if len(x) > 1 else last, last])
