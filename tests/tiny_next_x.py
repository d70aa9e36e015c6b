"""Tiny random xAR and FlowAR models for tests, ours and under the authors' names."""

from __future__ import annotations

from typing import Any

import torch

from armm.convert.keymap import Rule
from armm.decoding import NextScaleFlowDecoding, NextXDecoding
from armm.decoding.entities import EntityPlan
from armm.next_scale_flow_model import NextScaleFlowModel
from armm.next_x_model import NextXModel
from pipelines.flowar import FlowARPipeline
from pipelines.xar import XARPipeline
from tokenizers_visual.kl_tokenizer import KLTokenizer

TRUNK: dict[str, Any] = {
    "dim": 16, "num_layers": 2, "num_heads": 2, "mlp": "geglu", "mlp_hidden": 24, "mlp_bias": True, "norm_affine": False,
    "norm_eps": 1e-6, "qkv_bias": True, "out_bias": True, "rotary_axes": [4, 4], "modulation": "block", "input_norm": True,
    "modulation_order": ["gate1", "gate2", "scale1", "scale2", "shift1", "shift2"], "bridges": [1],
}  # fmt: skip


def tiny_tokenizer(latent_channels: int = 4) -> KLTokenizer:
    """Two pixels a token."""
    torch.manual_seed(1)
    return KLTokenizer(
        base_channels=8, channel_multipliers=[1, 2], num_res_blocks=1, latent_channels=latent_channels, norm_groups=4
    ).eval()


def randomize(model: torch.nn.Module, std: float = 0.3) -> Any:
    """Weights large enough that everything depends on everything."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_model(grid: tuple[int, int] = (4, 4), positions: int = 0, **options: Any) -> NextXModel:
    """Two layers, ten classes."""
    torch.manual_seed(2)
    trunk = {**TRUNK, "learned_positions": positions or grid[0] * grid[1], **options.pop("transformer", {})}
    return randomize(NextXModel(latent_channels=4, grid=grid, num_classes=10, transformer=trunk, **options))


def tiny_flowar(cross: bool = False) -> NextScaleFlowModel:
    """Maps of 1, 2 and 4 tokens a side, ten classes."""
    torch.manual_seed(3)
    head = {
        key: value for key, value in TRUNK.items() if key not in ("bridges", "input_norm", "qkv_bias", "modulation")
    }
    head |= {"dim": 24, "num_heads": 3}
    model = NextScaleFlowModel(4, 10, (1, 2, 4), TRUNK, {"transformer": head, "cross": cross})
    return randomize(model, 0.2)  # larger ones make the flow chaotic


def tiny_xar_pipeline(entity: str = "cell", size: int = 2, **settings: Any) -> XARPipeline:
    pipe = XARPipeline(
        tokenizer=tiny_tokenizer(),
        transformer=tiny_model(),
        decoding=NextXDecoding(entity, size),
        generation_config={"guidance_scale": 1.5, "num_flow_steps": 4, **settings},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flowar_pipeline(**settings: Any) -> FlowARPipeline:
    pipe = FlowARPipeline(
        tokenizer=tiny_tokenizer(),
        transformer=tiny_flowar(),
        decoding=NextScaleFlowDecoding(),
        generation_config={"guidance_scale": 1.5, "num_flow_steps": 4, **settings},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def authors_state(model: torch.nn.Module, rules: tuple[Rule, ...], cell: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of `model` under the authors' names, with the buffers they keep. cell: side of the cells of an xAR."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        source = next(found for rule in rules if (found := rule.source_of(name)))
        parts.setdefault(source, []).append(value)
    state = {name: torch.cat(values) for name, values in parts.items()}
    order = EntityPlan.of("cell", model.grid, cell).index if cell else slice(None)
    for name, value in state.items():
        if name.endswith("pos_embed_learned"):
            state[name] = value[order][None]
    sizes = EntityPlan.of("cell", model.grid, cell).sizes if cell else model.sizes
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    state["mask"] = torch.zeros(len(block), len(block)).masked_fill(block[:, None] < block, float("-inf"))[None, None]
    for name in [name for name in state if name.endswith("proj.weight") and "attn." in name]:
        state[name.replace("proj.weight", "rope.freqs")] = torch.ones(2)
    return state
