"""Tokens per second of armm's next-token loop against two others, same weights, one run.

Against (a) transformers' `generate` of an equal Llama (Qwen3 where queries and keys are normalised) with its static and its
dynamic cache, and (b) the plain minimal loop in minimal_loop.py. Greedy decoding with guidance (rows [cond; null]), so all
must produce the same ids, which is checked. Each repetition runs all implementations in turn; the table shows medians.

    python benchmarks/decode.py --json decode.json
    python benchmarks/decode.py --device cuda --dtype bf16 --sizes llamagen-b
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from minimal_loop import MinimalConfig, MinimalTransformer

from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel

GUIDANCE_SCALE = 2.0
SIZES = {
    "llamagen-b": {
        "transformer": {"dim": 768, "num_layers": 12, "num_heads": 12, "mlp_hidden": 2048},
        "vocab_size": 16384,
        "grid": (16, 16),
        "text_slots": 0,
    },
    "scenes": {
        "transformer": {"dim": 256, "num_layers": 6, "num_heads": 4, "mlp_hidden": 704, "qk_norm": "rms"},
        "vocab_size": 640,
        "grid": (8, 8),
        "text_slots": 24,
    },
}


def build(size: dict, device: torch.device, dtype: torch.dtype) -> AutoregressiveModel:
    """Our model with 1-D positions, so that it equals a Llama exactly."""
    torch.manual_seed(0)
    transformer = dict(size["transformer"])
    head_dim = transformer["dim"] // transformer["num_heads"]
    model = AutoregressiveModel(
        vocab_size=size["vocab_size"],
        transformer={**transformer, "rotary_axes": [head_dim]},
        grid=size["grid"],
        text_slots=size["text_slots"],
        answer_slots=1,
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.06)
    return model.to(device, dtype).eval()


def to_minimal(model: AutoregressiveModel, size: dict) -> MinimalTransformer:
    """The same weights in the minimal loop."""
    transformer = size["transformer"]
    names = ("dim", "num_layers", "num_heads", "mlp_hidden")
    qk_norm = bool(transformer.get("qk_norm"))
    config = MinimalConfig(**{name: transformer[name] for name in names}, vocab_size=size["vocab_size"], qk_norm=qk_norm)
    minimal = MinimalTransformer(config)
    state = {
        "tok_embeddings.weight": model.token_embedding.weight,
        "norm.weight": model.trunk.norm.weight,
        "output.weight": model.head.projection.weight,
    }
    for i, block in enumerate(model.trunk.blocks):
        att, mlp, layer = block.attention, block.mlp, f"layers.{i}."
        state[layer + "wqkv.weight"] = torch.cat([att.to_q.weight, att.to_k.weight, att.to_v.weight])
        state[layer + "wo.weight"] = att.to_out.weight
        state[layer + "w1.weight"], state[layer + "w3.weight"] = mlp.gate.weight, mlp.up.weight
        state[layer + "w2.weight"] = mlp.down.weight
        state[layer + "attention_norm.weight"], state[layer + "ffn_norm.weight"] = (
            block.attention_norm.weight,
            block.mlp_norm.weight,
        )
        if qk_norm:
            state[layer + "q_norm.weight"] = att.query_norm.weight
            state[layer + "k_norm.weight"] = att.key_norm.weight
    minimal.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return minimal.to(model.device, model.dtype).eval()


def to_transformers(model: AutoregressiveModel, size: dict) -> torch.nn.Module:
    """The same weights as a transformers Llama (half-split rotary: query and key rows are reordered within each head)."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    transformer = size["transformer"]
    heads = transformer["num_heads"]
    head_dim = transformer["dim"] // heads
    arguments = {
        "vocab_size": size["vocab_size"],
        "hidden_size": transformer["dim"],
        "intermediate_size": transformer["mlp_hidden"],
        "num_hidden_layers": transformer["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "sdpa",
    }
    qk_norm = bool(transformer.get("qk_norm"))
    other = Qwen3ForCausalLM(Qwen3Config(**arguments)) if qk_norm else LlamaForCausalLM(LlamaConfig(**arguments))
    order = torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])

    def halves(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(heads, head_dim, -1)[:, order].reshape(weight.shape)

    state = {
        "model.embed_tokens.weight": model.token_embedding.weight,
        "model.norm.weight": model.trunk.norm.weight,
        "lm_head.weight": model.head.projection.weight,
    }
    for i, block in enumerate(model.trunk.blocks):
        att, mlp, layer = block.attention, block.mlp, f"model.layers.{i}."
        state[layer + "self_attn.q_proj.weight"] = halves(att.to_q.weight)
        state[layer + "self_attn.k_proj.weight"] = halves(att.to_k.weight)
        state[layer + "self_attn.v_proj.weight"] = att.to_v.weight
        state[layer + "self_attn.o_proj.weight"] = att.to_out.weight
        state[layer + "mlp.gate_proj.weight"], state[layer + "mlp.up_proj.weight"] = mlp.gate.weight, mlp.up.weight
        state[layer + "mlp.down_proj.weight"] = mlp.down.weight
        state[layer + "input_layernorm.weight"] = block.attention_norm.weight
        state[layer + "post_attention_layernorm.weight"] = block.mlp_norm.weight
        if qk_norm:
            state[layer + "self_attn.q_norm.weight"] = att.query_norm.weight[order]
            state[layer + "self_attn.k_norm.weight"] = att.key_norm.weight[order]
    if qk_norm:
        for layer in other.model.layers:
            layer.self_attn.q_norm.variance_epsilon = layer.self_attn.k_norm.variance_epsilon = 1e-6
    other.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return other.to(model.device, model.dtype).eval()


def transformers_runner(model: torch.nn.Module, prefix: torch.Tensor, tokens: int, cache: str) -> Callable[[], torch.Tensor]:
    from transformers import LogitsProcessor, LogitsProcessorList

    class Guided(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            cond, null = scores.chunk(2)
            mixed = null + (cond - null) * GUIDANCE_SCALE
            return torch.cat([mixed, mixed])

    processors = LogitsProcessorList([Guided()])
    mask = torch.ones_like(prefix)

    def run() -> torch.Tensor:
        out = model.generate(
            prefix,
            attention_mask=mask,
            max_new_tokens=tokens,
            do_sample=False,
            logits_processor=processors,
            cache_implementation=cache,
            disable_compile=prefix.device.type == "cpu",
        )
        return out[: len(prefix) // 2, prefix.shape[1] :]

    return run


def implementations(size: dict, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], torch.Tensor]]:
    model = build(size, device, dtype)
    grid = size["grid"]
    tokens, length = grid[0] * grid[1], size["text_slots"] + 1
    generator = torch.Generator().manual_seed(1)
    prefix = torch.randint(size["vocab_size"], (2 * batch, length), generator=generator).to(device)
    minimal = to_minimal(model, size)
    other = to_transformers(model, size)
    index = torch.arange(length + tokens, device=device)
    rotary = model.positions_for(index).rotary.reshape(length + tokens, -1)
    decoding, sampler = NextTokenDecoding(), Sampler(do_sample=False)
    guidance = Guidance(GUIDANCE_SCALE)
    model.fuse_projections()

    @torch.no_grad()
    def ours() -> torch.Tensor:
        cond, null = (model.prefix_condition(rows) for rows in prefix.chunk(2))
        return decoding(model, cond, null, grid, sampler=sampler, guidance=guidance).ids

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return minimal.generate(minimal.tok_embeddings(prefix), rotary, tokens, GUIDANCE_SCALE, None)

    return {
        "armm": ours,
        "minimal loop": plain,
        "transformers, static cache": transformers_runner(other, prefix, tokens, "static"),
        "transformers, dynamic cache": transformers_runner(other, prefix, tokens, "dynamic"),
    }


def measure(name: str, batch: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict]:
    size = SIZES[name]
    runners = implementations(size, batch, device, dtype)
    tokens = size["grid"][0] * size["grid"][1]
    seconds: dict[str, list[float]] = {label: [] for label in runners}
    ids = {}
    for repeat in range(repeats + 1):  # the first round warms up and gives the ids
        for label, run in runners.items():
            _synchronize(device)
            start = time.perf_counter()
            result = run()
            _synchronize(device)
            if repeat:
                seconds[label].append(time.perf_counter() - start)
            else:
                ids[label] = result.cpu()
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    return [
        {
            "size": name,
            "batch": batch,
            "implementation": label,
            "seconds": round(medians[label], 4),
            "milliseconds_per_step": round(1000 * medians[label] / tokens, 3),
            "tokens_per_second": round(batch * tokens / medians[label], 1),
            "armm_time_over_this": round(medians["armm"] / medians[label], 3),
            "same_ids": round((ids[label] == ids["armm"]).float().mean().item(), 4),
        }
        for label in runners
    ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images at once; guidance doubles the rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    rows = []
    print(f"| size | batch | implementation | ms/step | tokens/s | armm's time / this | same ids |\n|{'---|' * 7}")
    for name in arguments.sizes:
        for batch in arguments.batch:
            for row in measure(name, batch, device, dtype, arguments.repeats):
                rows.append(row)
                print(
                    f"| {row['size']} | {row['batch']} | {row['implementation']} | {row['milliseconds_per_step']:.2f} | "
                    f"{row['tokens_per_second']:.0f} | {row['armm_time_over_this']:.2f} | {row['same_ids']:.1%} |",
                    flush=True,
                )
    if arguments.json:
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        report = {
            "hardware": hardware,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "dtype": arguments.dtype,
            "rows": rows,
        }
        temporary = arguments.json.with_name(f".{arguments.json.name}.tmp")
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(temporary, arguments.json)


if __name__ == "__main__":
    main()
