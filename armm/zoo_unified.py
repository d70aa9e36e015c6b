"""Published models that read and draw, and the tokenizers that belong to them: rows of the table in `armm.zoo`."""

from __future__ import annotations

from typing import Any

from armm.zoo_entry import ZooEntry


def _janus(name: str, parameters: float, paper: str, figures: dict[str, float]) -> ZooEntry:
    return ZooEntry(
        name.lower(),
        family="janus",
        task="text-and-image",
        repo=f"deepseek-ai/{name}",
        file="",
        parameters=parameters,
        licence="MIT (code); DeepSeek Model License (weights)",
        image_size=384,
        generation_config={"guidance_scale": 5.0, "temperature": 1.0, "max_new_tokens": 512},
        figures=figures,
        paper=paper,
    )


_JANUS_ENTRIES = (
    _janus("Janus-1.3B", 2090, "2410.13848", {"GenEval": 0.61, "DPG-Bench": 79.68, "POPE": 87.0, "MMBench": 69.4}),
    _janus("Janus-Pro-1B", 2090, "2501.17811", {"GenEval": 0.73, "DPG-Bench": 82.63, "POPE": 86.2, "MMBench": 75.5}),
    _janus("Janus-Pro-7B", 7420, "2501.17811", {"GenEval": 0.80, "DPG-Bench": 84.19, "POPE": 87.4, "MMBench": 79.2}),
)
_MING: dict[str, Any] = {"file": "", "licence": "MIT (code); no weight licence stated: see the hub card", "paper": "2510.06590"}
_MING_PRESET = {"guidance_scale": 3.0, "image_guidance_scale": 1.1, "temperature": 1.0, "num_inference_steps": 16}
_MING_ENTRIES = (
    ZooEntry(
        "mingtok-vision", "mingtok", "tokenizer", "inclusionAI/MingTok-Vision", parameters=698,
        figures={"rFID": 0.54, "PSNR": 30.77, "SSIM": 0.62, "LPIPS": 0.14}, **_MING,
    ),
    ZooEntry(
        "ming-univision-16b-a3b", "ming_univision", "text-and-image", "inclusionAI/Ming-UniVision-16B-A3B", parameters=19000,
        image_size=512, generation_config=_MING_PRESET, figures={"GenEval": 0.85, "DPG-Bench": 82.12, "MMBench": 78.5}, **_MING,
    ),
)  # fmt: skip

_CHAMELEON: dict[str, Any] = {
    "task": "text-and-image",
    "licence": "Chameleon Research License (non-commercial research)",
    "tokenizer": "chameleon-vqgan",
    "file": "",
}
_SIZES_7B, _SIZES_34B = 7013.0, 34293.0


def _lumina(size: str, pixels: int, parameters: float, **preset: Any) -> ZooEntry:
    return ZooEntry(
        f"lumina-mgpt-{size.lower()}",
        family="lumina_mgpt",
        repo=f"Alpha-VLLM/Lumina-mGPT-{size}",
        parameters=parameters,
        image_size=pixels,
        generation_config={
            "guidance_scale": 4.0, "temperature": 1.0, "text_top_k": 10, "image_top_k": 2000, "image_size": pixels, **preset
        },
        paper="2408.02657",
        **_CHAMELEON,
    )  # fmt: skip


def _chameleon(name: str, repo: str, parameters: float, paper: str) -> ZooEntry:
    # Meta's options.
    preset = {"guidance_scale": 3.0, "image_guidance_scale": 1.2, "temperature": 0.7, "image_temperature": 0.7}
    preset |= {"text_top_p": 0.9, "image_top_p": 0.9, "repetition_penalty": 1.2}
    return ZooEntry(
        name,
        family="chameleon",
        repo=repo,
        parameters=parameters,
        image_size=512,
        generation_config=preset,
        paper=paper,
        **_CHAMELEON,
    )


_CHAMELEON_ENTRIES = (
    # Meta's tokenizer; its repository is gated, like Meta's own.
    ZooEntry(
        "chameleon-vqgan",
        family="chameleon",
        task="tokenizer",
        repo="Alpha-VLLM/Chameleon_7B_mGPT",
        file="original_tokenizers/vqgan.ckpt",
        parameters=72,
        licence="Chameleon Research License (non-commercial research)",
        paper="2405.09818",
    ),
    # These were tuned not to draw: they read only. Anole draws.
    _chameleon("chameleon-7b", "facebook/chameleon-7b", _SIZES_7B, "2405.09818"),
    _chameleon("chameleon-30b", "facebook/chameleon-30b", _SIZES_34B, "2405.09818"),
    _chameleon("anole-7b", "leloy/Anole-7b-v0.1-hf", _SIZES_7B, "2407.06135"),
    _lumina("7B-512", 512, _SIZES_7B),
    _lumina("7B-768", 768, _SIZES_7B),
    _lumina("7B-768-Omni", 768, _SIZES_7B, guidance_scale=1.0, image_top_k=200),
    _lumina("7B-1024", 1024, _SIZES_7B),
    _lumina("34B-512", 512, _SIZES_34B),
    ZooEntry(
        "pure",
        family="pure",
        task="restoration",
        repo="nonwhy/PURE",
        file="",
        parameters=_SIZES_7B + 67,
        licence="MIT (code); the weights come from Chameleon: Chameleon Research License (non-commercial research)",
        image_size=512,
        tokenizer="llamagen-vq-ds8-c2i",
        generation_config={"guidance_scale": 0.8, "temperature": 0.9, "text_top_k": 1},
        paper="2503.11073",
    ),
)
_SEED: dict[str, Any] = {"family": "seed", "paper": "2310.01218"}


def _seed(name: str, parameters: float, **config: Any) -> ZooEntry:
    return ZooEntry(
        f"seed-llama-{name}",
        task="text-and-image",
        repo=f"AILab-CVC/seed-llama-{name}",
        file="",
        parameters=parameters,
        licence="Apache-2.0 (code); Llama 2 licence (weights)",
        image_size=768,
        tokenizer="seed-tokenizer-2",
        generation_config={"temperature": 1.0, "text_top_k": 50, "text_top_p": 0.5, "max_new_tokens": 512},
        config=config,
        **_SEED,
    )


_SEMANTIC_ENTRIES = (
    ZooEntry(
        "seed-tokenizer-2",
        task="tokenizer",
        repo="AILab-CVC/seed-tokenizer-2",
        file="",
        parameters=1121.7,
        licence="Apache-2.0",
        **_SEED,
    ),
    _seed("8b-pretrain", 6806),
    _seed("8b-sft", 6806),
    _seed("14b-pretrain", 13100, template="llama2"),
    _seed("14b-sft", 13100, template="llama2"),
    ZooEntry(
        "lavit-7b-v2",
        family="lavit",
        task="text-and-image",
        repo="rain1011/LaVIT-7B-v2",
        file="",
        parameters=6873,
        licence="LaVIT Community License (attribution; outputs must not improve other language models; use policy)",
        image_size=1024,
        generation_config={
            "guidance_scale": 4.0, "temperature": 1.0, "top_k": 50, "min_image_tokens": 20, "max_image_tokens": 200,
            "sample_tokens": True,
        },
        figures={"FID COCO": 7.1, "CIDEr COCO": 133.3, "CIDEr NoCaps": 112.0, "VQAv2": 68.3, "GQA": 47.9},
        paper="2309.04669",
    ),
)  # fmt: skip
UNIFIED_ENTRIES = (*_CHAMELEON_ENTRIES, *_JANUS_ENTRIES, *_MING_ENTRIES, *_SEMANTIC_ENTRIES)
