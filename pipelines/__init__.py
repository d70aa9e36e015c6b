"""Pipelines: one file per family or task, on diffusers' conventions."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "ARPipeline": "pipelines.base",
    "ARPipelineOutput": "pipelines.outputs",
    "ARInterleavedOutput": "pipelines.outputs",
    "ARRestorationOutput": "pipelines.outputs",
    "ARTextOutput": "pipelines.outputs",
    "ChameleonPipeline": "pipelines.chameleon",
    "DARPipeline": "pipelines.dar",
    "DARPipelineOutput": "pipelines.dar",
    "ELMPipeline": "pipelines.elm",
    "ARVideoOutput": "pipelines.outputs",
    "JanusPipeline": "pipelines.janus",
    "MingUniVisionPipeline": "pipelines.ming_univision",
    "LlamaGenPipeline": "pipelines.llamagen",
    "HiMARPipeline": "pipelines.himar",
    "LaVITPipeline": "pipelines.lavit",
    "LuminaMGPTPipeline": "pipelines.lumina_mgpt",
    "MARPipeline": "pipelines.mar",
    "NARPipeline": "pipelines.nar",
    "PARPipeline": "pipelines.par",
    "PUREPipeline": "pipelines.pure",
    "SEEDLLaMAPipeline": "pipelines.seed_llama",
    "StableDiffusionPainter": "pipelines.painting",
    "UnCLIPPainter": "pipelines.painting",
    "VARPipeline": "pipelines.var",
    "XLPainter": "pipelines.painting",
    "XARPipeline": "pipelines.xar",
    "FlowARPipeline": "pipelines.flowar",
    "MARTextToImagePipeline": "pipelines.mar_text_to_image",
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
