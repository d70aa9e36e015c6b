"""Visual tokenizers: pixels <-> codes. Knows `armm.nn` and nothing else of armm."""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "Codes": "tokenizers_visual.codes",
    "VisualTokenizer": "tokenizers_visual.base",
    "ConvEncoder": "tokenizers_visual.autoencoder",
    "ConvDecoder": "tokenizers_visual.autoencoder",
    "BinaryQuantizer": "tokenizers_visual.binary_quantizer",
    "BinaryTokenizer": "tokenizers_visual.binary_tokenizer",
    "VectorQuantizer": "tokenizers_visual.quantizers",
    "DARTokenizer": "tokenizers_visual.dar",
    "DepthVQTokenizer": "tokenizers_visual.depth",
    "DualTokenTokenizer": "tokenizers_visual.dualtoken",
    "PerceptionTokens": "tokenizers_visual.perception",
    "KLTokenizer": "tokenizers_visual.kl_tokenizer",
    "ViT": "tokenizers_visual.vit",
    "ATokenTokenizer": "tokenizers_visual.atoken",
    "MingTokTokenizer": "tokenizers_visual.mingtok",
    "FiniteScalarQuantizer": "tokenizers_visual.quantizers",
    "GaussianDecoder": "tokenizers_visual.gaussian_decoder",
    "Gaussians": "tokenizers_visual.gaussians",
    "SparseTokens": "tokenizers_visual.sparse",
    "ImageCondition": "tokenizers_visual.semantic",
    "LARPTokenizer": "tokenizers_visual.larp",
    "LaVITDecoder": "tokenizers_visual.lavit_decoder",
    "lavit_losses": "tokenizers_visual.lavit_training",
    "LaVITTokenizer": "tokenizers_visual.lavit",
    "QueryTransformer": "tokenizers_visual.query_transformer",
    "SEEDTokenizer": "tokenizers_visual.seed",
    "SemanticTokenizer": "tokenizers_visual.semantic",
    "VQTokenizer": "tokenizers_visual.vq_tokenizer",
    "VisionEncoder": "tokenizers_visual.vision_encoder",
    "MultiScaleQuantizer": "tokenizers_visual.multi_scale",
    "MultiScaleVQTokenizer": "tokenizers_visual.multi_scale_tokenizer",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tokenizers_visual' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
