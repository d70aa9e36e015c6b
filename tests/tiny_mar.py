"""Tiny random MAR and Hi-MAR models for tests, ours and under the authors' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_next_x import randomize, tiny_tokenizer

from armm.convert import himar, mar
from armm.decoding import MaskedLatentDecoding, PivotLatentDecoding
from armm.masked_latent_model import MaskedLatentModel
from armm.pivot_latent_model import PivotLatentModel
from pipelines.himar import HiMARPipeline
from pipelines.mar import MARPipeline

STACK: dict[str, Any] = {
    "dim": 16, "num_layers": 2, "num_heads": 2, "mlp": "gelu", "mlp_bias": True, "norm": "layer", "norm_eps": 1e-6,
    "qkv_bias": True, "out_bias": True,
}  # fmt: skip
HEAD = {"type": "mlp", "width": 12, "depth": 2}
STEPS = "3,1,0"  # of the head: where an untrained one keeps its samples small


def tiny_mar(grid: Sequence[int] = (4, 4), patch_size: int = 1, **options: Any) -> MaskedLatentModel:
    """Ten classes, three condition tokens, four channels."""
    torch.manual_seed(5)
    arguments = {"encoder": STACK, "decoder": STACK, "head": HEAD, "condition_tokens": 3, **options}
    return randomize(MaskedLatentModel(4, grid, patch_size, 10, **arguments), 0.35)


def tiny_himar() -> PivotLatentModel:
    """2x2 pivots of a picture of 4x4."""
    torch.manual_seed(6)
    dense = {"width": 8, "depth": 2, "num_heads": 2}
    model = PivotLatentModel(4, (4, 4), (2, 2), 10, 3, STACK, STACK, HEAD, dense)
    return randomize(model, 0.35)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_mar_pipeline(patch_size: int = 1, grid: Sequence[int] = (4, 4), **settings: Any) -> MARPipeline:
    settings = {"guidance_scale": 2.0, "num_inference_steps": 4, "head_steps": STEPS, **settings}
    return quiet(MARPipeline(tiny_tokenizer(), tiny_mar(grid, patch_size), MaskedLatentDecoding(), settings))


def tiny_himar_pipeline(**settings: Any) -> HiMARPipeline:
    settings = {
        "num_inference_steps": 2,
        "num_pivot_steps": 3,
        "head_steps": STEPS,
        "pivot_head_steps": STEPS,
        **settings,
    }
    return quiet(HiMARPipeline(tiny_tokenizer(), tiny_himar(), PivotLatentDecoding(), settings))


def authors_state(model: MaskedLatentModel) -> dict[str, torch.Tensor]:
    """The tensors of `model` under the authors' names."""
    deep = isinstance(model, PivotLatentModel)
    rules = himar.RULES if deep else mar.RULES
    state: dict[str, torch.Tensor] = {}
    fused: dict[str, list[torch.Tensor]] = {}
    for name, value in model.state_dict().items():
        rule, source = next((rule, found) for rule in rules if (found := rule.source_of(name)))
        if isinstance(rule.target, tuple):
            fused.setdefault(source, []).append(value)
        elif rule.operation is mar.rows:
            state[source] = value[None]
        elif rule.operation is mar.swap_halves:
            state[source] = torch.cat(value.chunk(2)[::-1])
        elif rule.operation is himar.squeeze_convolution:
            state[source] = value[:, :, None, None] if value.ndim == 2 else value
        elif "adaLN_s" in source:
            state[source] = value[:, None, None]
        else:
            state[source] = value
    for source, parts in fused.items():
        state[source] = torch.cat(parts)
    classes = state.pop("class_emb.weight")
    state |= {"class_emb.weight": classes[:-1], "fake_latent": classes[-1:]}
    if deep:
        state["cond_diffloss.net.c_pos_embed"] = torch.zeros_like(state["cond_diffloss.net.pos_embed"])
    return state
