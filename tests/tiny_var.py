"""Tiny random VAR models for tests, ours and under the authors' names."""

from __future__ import annotations

from typing import Any

import torch

from armm.convert.var import tokenizer_rules
from armm.decoding import NextScaleDecoding
from armm.next_scale_model import NextScaleModel
from pipelines.var import VARPipeline
from tokenizers_visual import MultiScaleVQTokenizer

SCALES = (1, 2, 3, 4)


def tiny_tokenizer(**options: Any) -> MultiScaleVQTokenizer:
    """Two pixels a token of the last map, 24 codes."""
    torch.manual_seed(1)
    arguments = {
        "base_channels": 8,
        "channel_multipliers": [1, 2],
        "num_res_blocks": 1,
        "latent_channels": 4,
        "codebook_size": 24,
        "scales": SCALES,
        "norm_groups": 4,
    }
    model = MultiScaleVQTokenizer(**{**arguments, **options}).eval()
    torch.nn.init.normal_(model.quantizer.codes.embedding.weight)
    return model


def tiny_model(scales: tuple[int, ...] = SCALES, **transformer: Any) -> NextScaleModel:
    """Two layers, ten classes, with weights large enough that the tokens depend on everything."""
    torch.manual_seed(2)
    trunk = {"dim": 16, "num_layers": 2, "num_heads": 2, "mlp": "gelu_tanh", "mlp_bias": True, "norm": "layer", "norm_affine": False}
    trunk |= {"norm_eps": 1e-6, "qkv_bias": True, "out_bias": True, "qk_norm": "l2", **transformer}
    model = NextScaleModel(vocab_size=24, num_classes=10, code_dim=4, scales=scales, transformer=trunk).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_pipeline(**settings: Any) -> VARPipeline:
    pipe = VARPipeline(
        tokenizer=tiny_tokenizer(),
        transformer=tiny_model(),
        decoding=NextScaleDecoding(),
        generation_config={"guidance_scale": 1.5, "top_k": 0, "top_p": 1.0, **settings},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def authors_transformer(
    dim: int = 24, layers: int = 2, heads: int = 3, scales: tuple[int, ...] = (1, 2, 3), shared: bool = False, l2: bool = True
) -> dict[str, torch.Tensor]:
    """Random tensors under the authors' names: 7 classes, 20 codes of width 5."""
    generator = torch.Generator().manual_seed(dim)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    tokens = sum(side * side for side in scales)
    levels = torch.cat([torch.full((side * side,), level) for level, side in enumerate(scales)])
    hidden = 4 * dim
    state = {
        "pos_start": tensor(1, scales[0] ** 2, dim),
        "pos_1LC": tensor(1, tokens, dim),
        "lvl_embed.weight": tensor(len(scales), dim),
        "lvl_1L": levels[None],
        "attn_bias_for_masking": torch.zeros(1, 1, tokens, tokens),
        "word_embed.weight": tensor(dim, 5),
        "word_embed.bias": tensor(dim),
        "class_emb.weight": tensor(8, dim),
        "head_nm.ada_lin.1.weight": tensor(2 * dim, dim),
        "head_nm.ada_lin.1.bias": tensor(2 * dim),
        "head.weight": tensor(20, dim),
        "head.bias": tensor(20),
    }
    if shared:
        state |= {"shared_ada_lin.1.weight": tensor(6 * dim, dim), "shared_ada_lin.1.bias": tensor(6 * dim)}
    for i in range(layers):
        block = {
            "attn.q_bias": tensor(dim),
            "attn.v_bias": tensor(dim),
            "attn.zero_k_bias": torch.zeros(dim),
            "attn.mat_qkv.weight": tensor(3 * dim, dim),
            "attn.proj.weight": tensor(dim, dim),
            "attn.proj.bias": tensor(dim),
            "ffn.fc1.weight": tensor(hidden, dim),
            "ffn.fc1.bias": tensor(hidden),
            "ffn.fc2.weight": tensor(dim, hidden),
            "ffn.fc2.bias": tensor(dim),
        }
        if l2:
            block["attn.scale_mul_1H11"] = 5 * tensor(1, heads, 1, 1)
        if shared:
            block["ada_gss"] = tensor(1, 1, 6, dim)
        else:
            block |= {"ada_lin.1.weight": tensor(6 * dim, dim), "ada_lin.1.bias": tensor(6 * dim)}
        state |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    return state


def authors_tokenizer(model: MultiScaleVQTokenizer) -> dict[str, torch.Tensor]:
    """The tensors of `model` under the authors' names."""
    refiners = len(model.quantizer.refiners)
    rules = tokenizer_rules(len(model.config.channel_multipliers), refiners)
    steps = len(model.scales)
    state = {"quantize.ema_vocab_hit_SV": torch.zeros(steps, model.codebook_size)}
    fused: dict[str, list[torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        source = next(found for rule in rules if (found := rule.source_of(name)))
        if ".qkv." in source:
            fused.setdefault(source, []).append(value)
        elif ".proj_out." in source and value.ndim == 2:
            state[source] = value[:, :, None, None]
        else:
            if model.config.shared_refiners == 0:
                source = source.replace("qresi_ls.", "")
            state[source] = value
    for source, parts in fused.items():
        merged = torch.cat(parts)
        state[source] = merged[:, :, None, None] if merged.ndim == 2 else merged
    return state
