"""Captions and continuous latents of scenes, made once and kept on disk.

S scenes, K captions of each of at most T words, N tokens of C channels a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armm.data.scenes import SceneDataset
from armm.training.images import to_pixels
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .unified_data import _digest, _save, prepare_texts

__all__ = ["CaptionedLatents", "prepare_latents", "prepare_split"]


@dataclass
class CaptionedLatents:
    """captions: int16 [S, K, T], padded on the right. mean, spread: float16 [S, N, C], the posterior of each picture's latents in
    the tokenizer's scale. weights: [S], how often a scene is drawn from."""

    captions: Tensor
    mean: Tensor
    spread: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def latents(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        """float32 [B, N, C] drawn from the posteriors, or their means without a generator."""
        mean = self.mean[rows].float()
        if generator is None:
            return mean
        return mean + self.spread[rows].float() * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def prepare_latents(images: Tensor, tokenizer: KLTokenizer, device: torch.device, cache: Path) -> tuple[Tensor, Tensor]:
    """Means and standard deviations float16 [S, N, C] of uint8 images [S, 3, H, W], kept in `cache`."""
    weights = _digest(tokenizer.scaling_factor, *tokenizer.state_dict().values())
    path = cache / f"latents-{_digest(images[:: max(1, len(images) // 64)])}-{len(images)}-{weights}.pt"
    if path.is_file():
        found = torch.load(path, weights_only=True)
        return found["mean"], found["spread"]
    tokenizer = tokenizer.to(device).eval()
    means: list[Tensor] = []
    spreads: list[Tensor] = []
    for chunk in images.split(128):
        posterior = tokenizer.posterior(to_pixels(chunk.to(device)))
        for kept, value in ((means, posterior.mean), (spreads, posterior.std)):
            kept.append((value.flatten(2).transpose(1, 2) * tokenizer.scaling_factor).to("cpu", torch.float16))
    mean, spread = torch.cat(means), torch.cat(spreads)
    _save({"mean": mean, "spread": spread}, path)
    return mean, spread


def prepare_split(
    split: str,
    count: int,
    seed: int,
    data: dict[str, Any],
    text_slots: int,
    tokenizer: KLTokenizer,
    vocabulary: list[str],
    device: torch.device,
    cache: Path,
) -> CaptionedLatents:
    """One split of the scenes. data: size, captions and count_weights of a recipe."""
    dataset = SceneDataset.prepare(count, data["size"], seed, split=split, cache_dir=cache)
    texts = {"text_slots": text_slots, "captions_per_scene": data["captions"], "questions_per_scene": 1}
    captions = prepare_texts(dataset.scenes, texts, vocabulary, cache)["captions"]
    mean, spread = prepare_latents(dataset.images, tokenizer, device, cache)
    weights = torch.tensor(data["count_weights"])[dataset.scenes.count.long() - 1]
    return CaptionedLatents(captions, mean, spread, weights)
