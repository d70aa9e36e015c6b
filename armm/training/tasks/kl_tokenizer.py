"""Trains a `KLTokenizer` on rendered scenes: reconstruction from samples of its posterior, and its distance to a standard normal."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from armm.data.scenes import SceneDataset, object_map
from armm.nn.int8_weights import pack_file
from armm.training.images import save_grid, to_pixels
from armm.training.recipe import Recipe, take
from armm.training.task import Batch, TrainingTask, cast_weights, fresh_copy
from tokenizers_visual.kl_tokenizer import KLTokenizer
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .kl_start import kl_from_vq
from .vq_tokenizer import gradient_loss


class KLTokenizerTask(TrainingTask):
    """Recipe mappings:

    model: arguments of `KLTokenizer`; or `start`: the directory of a trained one, or of a `VQTokenizer`, to continue from.
        `scaling_factor` is measured at the end, so that latents have unit variance.
    data: scenes (how many are rendered once), size (pixels), seed, validation (scenes).
    loss: weights `l1`, `l2`, `gradient` (L1 of image gradients at three scales), `kl` (mean over the latents' channels and
        places); `object`: extra weight of the pixels on and around objects.
    """

    export_dtypes = (*TrainingTask.export_dtypes, "int8")

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.data = take(recipe.data, "data", scenes=20000, size=64, seed=0, validation=256)
        self.weights = take(recipe.loss, "loss", l1=1.0, l2=2.0, gradient=0.5, kl=1e-4, object=0.0)
        if "start" in recipe.model:
            take(recipe.model, "model", start=None)
            tokenizer = _trained(recipe.model["start"])
        else:
            try:
                tokenizer = KLTokenizer(**recipe.model)
            except TypeError as error:
                raise ValueError(f"`model`: {error}") from error
        self.tokenizer = tokenizer.to(memory_format=torch.channels_last)
        self.module = nn.ModuleDict({"tokenizer": self.tokenizer})

    def prepare(self, device: torch.device) -> None:
        data = self.data
        cache = Path(self.recipe.output).parent / "cache"  # shared by the recipes of one folder
        self.device = device
        dataset = SceneDataset.prepare(data["scenes"], data["size"], data["seed"], split="train", cache_dir=cache)
        self.images = dataset.images
        if self.weights["object"] > 0:
            parts = range(0, len(dataset), 512)
            self.objects = torch.cat([object_map(dataset.scenes[i : i + 512], data["size"]) >= 0 for i in parts])
        self.unseen = SceneDataset.prepare(
            data["validation"], data["size"], data["seed"] + 1, split="heldout", cache_dir=cache
        ).images

    def batch(self, step: int, size: int, rank: int) -> Batch:
        generator = self.generator(step, rank)
        rows = torch.randint(len(self.images), (size,), generator=generator)
        pixels = to_pixels(self.images[rows].to(self.device, non_blocking=True))
        side = self.data["size"] // self.tokenizer.downsample
        noise = torch.randn(size, self.tokenizer.latent_channels, side, side, generator=generator)
        batch = {"pixels": pixels.contiguous(memory_format=torch.channels_last), "noise": noise.to(self.device)}
        if self.weights["object"] > 0:
            on_object = self.objects[rows].unsqueeze(1).to(self.device, torch.float32)
            batch["objects"] = F.max_pool2d(on_object, 5, stride=1, padding=2)  # the rim and two pixels around it
        return batch

    def loss(self, batch: Batch, step: int, progress: float) -> tuple[torch.Tensor, Batch]:
        pixels, weights = batch["pixels"], self.weights
        posterior = self.tokenizer.posterior(pixels)
        latents = posterior.mean + posterior.std * batch["noise"]
        difference = self.tokenizer.decode_features(latents).float() - pixels
        squared = difference.square()
        emphasis = torch.ones_like(pixels[:, :1])
        if weights["object"] > 0:
            emphasis = emphasis + weights["object"] * batch["objects"]
            emphasis = emphasis / emphasis.mean()
        l1 = (difference.abs() * emphasis).mean()
        kl = posterior.kl().float().mean() / latents[0].numel()
        loss = weights["l1"] * l1 + weights["l2"] * (squared * emphasis).mean()
        loss = loss + weights["gradient"] * gradient_loss(difference * emphasis) + weights["kl"] * kl
        logs = {"l1": l1.detach(), "psnr": -10.0 * torch.log10(squared.detach().mean() / 4.0), "kl": kl.detach()}
        return loss, logs

    def validate(self) -> dict[str, float]:
        errors, latents = [], []
        for chunk in self.unseen.split(64):
            pixels = to_pixels(chunk.to(self.device))
            codes = self.tokenizer.encode(pixels)
            errors.append((self.tokenizer.decode(codes).float().clamp(-1, 1) - pixels).square().flatten(1).mean(1))
            latents.append(codes.latents.float())
        psnr = -10.0 * torch.log10(torch.cat(errors) / 4.0)
        return {"psnr": round(psnr.mean().item(), 3), "latent_std": round(torch.cat(latents).std().item(), 4)}

    def sample(self, path: Path) -> None:
        pixels = to_pixels(self.unseen[:16].to(self.device))
        restored = self.tokenizer.decode(self.tokenizer.encode(pixels)).float()
        save_grid(torch.stack([pixels, restored], 1).flatten(0, 1), path, columns=8)

    @torch.no_grad()
    def export(self, directory: Path) -> None:
        posteriors = [self.tokenizer.posterior(to_pixels(chunk.to(self.device))) for chunk in self.unseen.split(64)]
        variance = (
            torch.cat([p.mean.float() for p in posteriors]).var()
            + torch.cat([p.var.float() for p in posteriors]).mean()
        )
        tokenizer = fresh_copy(self.tokenizer)
        tokenizer.register_to_config(scaling_factor=round(float(variance.rsqrt()), 4))
        cast_weights(tokenizer, self.export_dtype).save_pretrained(directory)
        if self.recipe.export_dtype == "int8":
            pack_file(directory / SAFETENSORS_WEIGHTS_NAME)


def _trained(directory: str) -> KLTokenizer:
    if KLTokenizer.load_config(directory)["_class_name"] == "VQTokenizer":
        return kl_from_vq(VQTokenizer.from_pretrained(directory, dtype=torch.float32))
    return KLTokenizer.from_pretrained(directory, dtype=torch.float32)
