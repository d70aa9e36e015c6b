"""Pipelines: one file per family or task, on diffusers' conventions."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ARPipeline": "pipelines.base",
    "ARPipelineOutput": "pipelines.outputs",
    "ARTextOutput": "pipelines.outputs",
    "ELMPipeline": "pipelines.elm",
    "ARVideoOutput": "pipelines.outputs",
    "LlamaGenPipeline": "pipelines.llamagen",
    "HiMARPipeline": "pipelines.himar",
    "MARPipeline": "pipelines.mar",
    "NARPipeline": "pipelines.nar",
    "PARPipeline": "pipelines.par",
    "VARPipeline": "pipelines.var",
    "XARPipeline": "pipelines.xar",
    "FlowARPipeline": "pipelines.flowar",
    "NextXTextToImagePipeline": "pipelines.next_x_text_to_image",
    "UnifiedTextToImagePipeline": "pipelines.unified_text_to_image",
    "UnifiedImageToTextPipeline": "pipelines.unified_image_to_text",
    "UnifiedInpaintPipeline": "pipelines.unified_inpaint",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pipelines' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
