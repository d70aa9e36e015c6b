"""What a pipeline call returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput

from armm.pruning.cost import Cost
from tokenizers_visual.codes import Codes


@dataclass
class ARPipelineOutput(BaseOutput):
    """Generated images.

    Args:
        images: a list of PIL images (`output_type="pil"`), a float32 array [B, H, W, 3] in [0, 1] (`"np"`), a tensor
            [B, 3, H, W] in [0, 1] (`"pt"`) or the tokens themselves (`"latent"`): ids [B, N] or latents [B, N, C].
        codes: the visual codes behind the images, when the call asked for them with `output_codes=True`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    codes: Codes | None = None


@dataclass
class ARVideoOutput(BaseOutput):
    """Generated videos.

    Args:
        frames: a list of PIL images for each video (`output_type="pil"`), a float32 array [B, T, H, W, 3] in [0, 1]
            (`"np"`), a tensor [B, T, 3, H, W] in [0, 1] (`"pt"`) or the token ids [B, N] themselves (`"latent"`).
        codes: the visual codes behind the videos, when the call asked for them with `output_codes=True`.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor
    codes: Codes | None = None


@dataclass
class ARInterleavedOutput(BaseOutput):
    """Generated answers of text and images.

    Args:
        contents: for each answer, its texts (`str`) and images (PIL) in order; where SEED-LLaMA has no image decoder, `Codes` for images.
    """

    contents: list[list[str | PIL.Image.Image]]

    @property
    def texts(self) -> list[str]:
        """The texts of each answer in one piece."""
        return ["".join(part for part in parts if isinstance(part, str)) for parts in self.contents]

    @property
    def images(self) -> list[list[PIL.Image.Image]]:
        """The images of each answer."""
        return [[part for part in parts if not isinstance(part, str)] for parts in self.contents]


@dataclass
class ARRestorationOutput(BaseOutput):
    """Restored images with what the model said of each.

    Args:
        images: as in `ARPipelineOutput`.
        texts: the degradation that was perceived and a description, one text for each image.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    texts: list[str]


@dataclass
class ARTextOutput(BaseOutput):
    """Generated texts, one for each request.

    Args:
        texts: the texts, in the order of the requests.
        cost: operations of the call and what pruning saved of them, where it is enabled.
    """

    texts: list[str]
    cost: Cost | None = None
