"""Evaluation: the recogniser that judges generated scenes, the metrics, and one function for each `armm evaluate` task."""

from __future__ import annotations

from .image_to_text import image_to_text
from .metrics import frechet_distance, psnr, ssim
from .recogniser import SceneReading, SceneRecogniser
from .reconstruction import reconstruction
from .text_to_image import text_to_image

__all__ = [
    "SceneReading",
    "SceneRecogniser",
    "frechet_distance",
    "image_to_text",
    "psnr",
    "reconstruction",
    "ssim",
    "text_to_image",
]
