"""armm: autoregressive visual models as a tokenizer, a shared transformer and a decoding strategy.

This file is the front door. It lists the public names and imports each one the first time it is used, so that
`import armm` costs milliseconds and pulls in neither torch nor diffusers nor transformers.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from typing import Any

from armm.version import __version__


class _BuildNotice(logging.Filter):
    """diffusers imports xformers wherever it is installed, and xformers warns at import when its extensions were built
    for another torch. armm asks xformers only when its attention backend is chosen, and says then what is missing."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "can't load C++/CUDA extensions" not in str(record.msg)


logging.getLogger("xformers").addFilter(_BuildNotice())

# Public name -> the module that defines it.
PUBLIC_NAMES: dict[str, str] = {
    # what most people need
    "pipeline": "armm.auto",
    "list_models": "armm.zoo",
    "tokenizer": "armm.auto",
    "compare_tokenizers": "armm.evaluation.tokenizers",
    # pipelines
    "ARPipeline": "pipelines.base",
    "LlamaGenPipeline": "pipelines.llamagen",
    "JanusPipeline": "pipelines.janus",
    "MingUniVisionPipeline": "pipelines.ming_univision",
    "DARPipeline": "pipelines.dar",
    "ELMPipeline": "pipelines.elm",
    "HiMARPipeline": "pipelines.himar",
    "MARPipeline": "pipelines.mar",
    "NARPipeline": "pipelines.nar",
    "PARPipeline": "pipelines.par",
    "ChameleonPipeline": "pipelines.chameleon",
    "LaVITPipeline": "pipelines.lavit",
    "LuminaMGPTPipeline": "pipelines.lumina_mgpt",
    "PUREPipeline": "pipelines.pure",
    "SEEDLLaMAPipeline": "pipelines.seed_llama",
    "VARPipeline": "pipelines.var",
    "XARPipeline": "pipelines.xar",
    "FlowARPipeline": "pipelines.flowar",
    "MARTextToImagePipeline": "pipelines.mar_text_to_image",
    "NextXTextToImagePipeline": "pipelines.next_x_text_to_image",
    "UnifiedTextToImagePipeline": "pipelines.unified_text_to_image",
    "UnifiedImageToTextPipeline": "pipelines.unified_image_to_text",
    "UnifiedInpaintPipeline": "pipelines.unified_inpaint",
    # models
    "ARTransformer": "armm.transformer",
    "PositionTable": "armm.nn.positions",
    "AutoregressiveModel": "armm.model",
    "MultimodalModel": "armm.multimodal_model",
    "PivotLatentModel": "armm.pivot_latent_model",
    "MaskedLatentModel": "armm.masked_latent_model",
    "NextScaleModel": "armm.next_scale_model",
    "NextXModel": "armm.next_x_model",
    "NextScaleFlowModel": "armm.next_scale_flow_model",
    "Condition": "armm.condition",
    "CategoricalHead": "armm.heads.categorical",
    "AdaptiveHead": "armm.heads.adaptive",
    "KVCache": "armm.nn.cache",
    "attention_backend": "armm.nn.attention",
    # decoding
    "Sampler": "armm.decoding.sampling",
    "NoiseSource": "armm.decoding.sampling",
    "Guidance": "armm.decoding.guidance",
    "ContextGuidance": "armm.decoding.guidance",
    "CautiousSampler": "armm.decoding.cautious",
    "Grammar": "armm.decoding.vocabulary",
    "ImageBlock": "armm.decoding.vocabulary",
    "InterleavedDecoding": "armm.decoding.interleaved",
    "NextLatentDecoding": "armm.decoding.next_latent",
    "NextTokenDecoding": "armm.decoding.next_token",
    "MaskedTokenDecoding": "armm.decoding.masked_tokens",
    "NeighboringDecoding": "armm.decoding.neighboring",
    "ParallelGroupsDecoding": "armm.decoding.parallel_groups",
    "TokenShuffleDecoding": "armm.decoding.token_shuffle",
    "PivotLatentDecoding": "armm.decoding.pivots",
    "MaskedLatentDecoding": "armm.decoding.masked",
    "NextScaleDecoding": "armm.decoding.next_scale",
    "StepAnnealing": "armm.decoding.annealing",
    "TokenPruning": "armm.pruning.transition",
    "VisualTokenExit": "armm.pruning.exits",
    "VisualTokenGates": "armm.pruning.exits",
    "BeamSearch": "armm.decoding.beam",
    "OPERA": "armm.decoding.opera",
    "NextXDecoding": "armm.decoding.next_x",
    "NextScaleFlowDecoding": "armm.decoding.next_scale_flow",
    "FlowSolver": "armm.decoding.solvers.flow",
    "DecodingOutput": "armm.decoding.base",
    "Speculative": "armm.decoding.speculative.acceleration",
    "JacobiSpeculative": "armm.decoding.speculative.acceleration",
    "GroupedSpeculative": "armm.decoding.speculative.acceleration",
    "RelaxedSpeculative": "armm.decoding.speculative.acceleration",
    # tokenizers
    "Codes": "tokenizers_visual.codes",
    "VisualTokenizer": "tokenizers_visual.base",
    "DARTokenizer": "tokenizers_visual.dar",
    "DepthVQTokenizer": "tokenizers_visual.depth",
    "DualTokenTokenizer": "tokenizers_visual.dualtoken",
    "PerceptionTokens": "tokenizers_visual.perception",
    "KLTokenizer": "tokenizers_visual.kl_tokenizer",
    "GaussianDecoder": "tokenizers_visual.gaussian_decoder",
    "SparseTokens": "tokenizers_visual.sparse",
    "ATokenTokenizer": "tokenizers_visual.atoken",
    "MingTokTokenizer": "tokenizers_visual.mingtok",
    "ImageCondition": "tokenizers_visual.semantic",
    "LARPTokenizer": "tokenizers_visual.larp",
    "LaVITDecoder": "tokenizers_visual.lavit_decoder",
    "LaVITTokenizer": "tokenizers_visual.lavit",
    "lavit_losses": "tokenizers_visual.lavit_training",
    "SEEDTokenizer": "tokenizers_visual.seed",
    "VQTokenizer": "tokenizers_visual.vq_tokenizer",
    "VisionEncoder": "tokenizers_visual.vision_encoder",
    "BinaryTokenizer": "tokenizers_visual.binary_tokenizer",
    "MultiScaleVQTokenizer": "tokenizers_visual.multi_scale_tokenizer",
}

# Public submodules reachable as attributes: `armm.zoo`, `armm.convert.llamagen`, ...
PUBLIC_MODULES: tuple[str, ...] = ("convert", "data", "evaluation", "explain", "pruning", "training", "weights", "zoo")

__all__ = ["__version__", *PUBLIC_NAMES, *PUBLIC_MODULES]


def __getattr__(name: str) -> Any:
    if name in PUBLIC_NAMES:
        value = getattr(importlib.import_module(PUBLIC_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in PUBLIC_MODULES:
        return importlib.import_module(f"armm.{name}")
    near = difflib.get_close_matches(name, __all__, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see dir(armm) for the public names"
    raise AttributeError(f"module 'armm' has no attribute '{name}'{hint}")


def __dir__() -> list[str]:
    return sorted(__all__)
