"""Trains a `VQTokenizer` on rendered scenes: reconstruction, gradient and optional adversarial terms, no downloaded network."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from armm.data.scenes import SceneDataset, object_map
from armm.training.images import save_grid, to_pixels
from armm.training.recipe import Recipe, take
from armm.training.task import Batch, TrainingTask, cast_weights, fresh_copy
from tokenizers_visual.quantizers import MovingAverageCodebook
from tokenizers_visual.vq_tokenizer import VQTokenizer

from .discriminator import PatchDiscriminator, hinge_discriminator_loss


class VQTokenizerTask(TrainingTask):
    """Recipe mappings:

    model: arguments of `VQTokenizer`; or `start`: the directory of a trained one to continue from.
    data: scenes (how many are rendered once), size (pixels), seed, validation (scenes).
    loss: weights `l1`, `l2`, `gradient` (L1 of image gradients at three scales, a perceptual-style term that keeps edges),
        `commitment`, `adversarial` (hinge PatchGAN, Esser et al., from fraction `adversarial_start` on); `object`: extra weight
        of the pixels on and around objects from fraction `object_start` on, so that flat ground does not crowd out shapes;
        `flat`: pulls the features of all patches of one constant color to one code, so that flat ground costs one code and
        carries no noise that a transformer would have to learn;
        `codebook_decay`, and `restart_until`: the fraction of the run in which dead codes are restarted.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.data = take(recipe.data, "data", scenes=20000, size=64, seed=0, validation=256)
        self.weights = take(
            recipe.loss,
            "loss",
            l1=1.0,
            l2=2.0,
            gradient=0.5,
            commitment=0.25,
            adversarial=0.0,
            adversarial_start=0.5,
            object=0.0,
            object_start=0.0,
            flat=0.0,
            codebook_decay=0.98,
            restart_until=0.6,
        )
        if "start" in recipe.model:
            take(recipe.model, "model", start=None)
            tokenizer = VQTokenizer.from_pretrained(recipe.model["start"], dtype=torch.float32)
        else:
            tokenizer = VQTokenizer(**recipe.model)
        self.tokenizer = tokenizer.to(memory_format=torch.channels_last)
        self.codebook = MovingAverageCodebook(self.tokenizer.quantizer, decay=self.weights["codebook_decay"])
        if "start" in recipe.model:
            self.codebook.adopt(self.tokenizer.quantizer)
        self.module = nn.ModuleDict({"tokenizer": self.tokenizer, "codebook": self.codebook})
        if self.weights["adversarial"] > 0:
            self.adversary = PatchDiscriminator()
        self._vectors = torch.empty(0)
        self._ids = torch.empty(0, dtype=torch.int64)
        self._reconstruction = torch.empty(0)
        self._restarted = 0

    def prepare(self, device: torch.device) -> None:
        data = self.data
        cache = Path(self.recipe.output).parent / "cache"  # shared by the recipes of one folder
        self.device = device
        dataset = SceneDataset.prepare(data["scenes"], data["size"], data["seed"], split="train", cache_dir=cache)
        self.images = dataset.images
        if self.weights["object"] > 0:
            parts = range(0, len(dataset), 512)
            maps = [object_map(dataset.scenes[i : i + 512], data["size"]) >= 0 for i in parts]
            self.objects = torch.cat(maps)
        self.unseen = SceneDataset.prepare(
            data["validation"], data["size"], data["seed"] + 1, split="heldout", cache_dir=cache
        ).images

    def batch(self, step: int, size: int, rank: int) -> Batch:
        rows = torch.randint(len(self.images), (size,), generator=self.generator(step, rank))
        pixels = to_pixels(self.images[rows].to(self.device, non_blocking=True))
        batch = {"pixels": pixels.contiguous(memory_format=torch.channels_last)}
        if self.weights["object"] > 0:
            on_object = self.objects[rows].unsqueeze(1).to(self.device, torch.float32)
            batch["objects"] = F.max_pool2d(on_object, 5, stride=1, padding=2)  # the rim and two pixels around it
        return batch

    def loss(self, batch: Batch, step: int, progress: float) -> tuple[torch.Tensor, Batch]:
        pixels, weights = batch["pixels"], self.weights
        tokenizer = self.tokenizer
        features = tokenizer.features(pixels)
        grid = (1, features.shape[-2], features.shape[-1])
        vectors = features.flatten(2).transpose(1, 2)
        if not self.codebook.started:
            flat = tokenizer.quantizer.normalize(vectors.detach()).flatten(0, 1)
            self.codebook.initialise(tokenizer.quantizer, flat, self.generator(step, 0, stream=1))
        quantized = tokenizer.quantizer(vectors)
        reconstruction = tokenizer.decode_vectors(quantized.vectors, grid).float()
        self._vectors = tokenizer.quantizer.normalize(vectors.detach()).flatten(0, 1)
        self._ids = quantized.ids.flatten()
        self._reconstruction = reconstruction.detach()
        difference = reconstruction - pixels
        l2 = difference.square().mean()
        emphasis = torch.ones_like(pixels[:, :1])
        if weights["object"] > 0 and progress >= weights["object_start"]:
            emphasis = emphasis + weights["object"] * batch["objects"]
            emphasis = emphasis / emphasis.mean()
        l1 = (difference.abs() * emphasis).mean()
        gradient = gradient_loss(difference * emphasis)
        squared = (difference.square() * emphasis).mean()
        loss = weights["l1"] * l1 + weights["l2"] * squared + weights["gradient"] * gradient
        loss = loss + weights["commitment"] * quantized.commitment_loss
        flat = pixels.new_zeros(())
        if weights["flat"] > 0:
            normalized = tokenizer.quantizer.normalize(vectors)
            flat = flat_loss(normalized, pixels, tokenizer.downsample)
            loss = loss + weights["flat"] * flat
        usage = torch.bincount(self._ids, minlength=tokenizer.codebook_size).float()
        share = usage / usage.sum()
        logs = {
            "l1": l1.detach(),
            "psnr": -10.0 * torch.log10(l2.detach() / 4.0),
            "commitment": quantized.commitment_loss.detach(),
            "flat": flat.detach(),
            "perplexity": (-(share * (share + 1e-10).log()).sum()).exp(),
            "used": (self.codebook.usage > 0.03 * self.codebook.usage.mean()).sum(),
        }
        if self.adversary is not None and progress >= weights["adversarial_start"]:
            generator_loss = -self.adversary(reconstruction).mean()
            loss = loss + weights["adversarial"] * generator_loss
            logs["generator"] = generator_loss.detach()
        return loss, logs

    def adversary_loss(self, batch: Batch, step: int) -> torch.Tensor | None:
        if self.adversary is None or step < self.weights["adversarial_start"] * self.recipe.steps:
            return None
        return hinge_discriminator_loss(self.adversary(batch["pixels"]), self.adversary(self._reconstruction))

    def after_step(self, step: int, progress: float) -> None:
        restart = progress < self.weights["restart_until"] and step % 20 == 19
        self.codebook.update(self.tokenizer.quantizer, self._vectors, self._ids, restart=restart)

    def validate(self) -> dict[str, float]:
        errors, ids = [], []
        for chunk in self.unseen.split(64):
            pixels = to_pixels(chunk.to(self.device))
            codes = self.tokenizer.encode(pixels)
            restored = self.tokenizer.decode(codes).float().clamp(-1, 1)
            errors.append((restored - pixels).square().flatten(1).mean(1))
            ids.append(codes.ids)
        psnr = -10.0 * torch.log10(torch.cat(errors) / 4.0)
        all_ids = torch.cat(ids)
        flat, _ = flat_patches(to_pixels(self.unseen.to(self.device)), self.tokenizer.downsample)
        return {
            "psnr": round(psnr.mean().item(), 3),
            "codes_used": all_ids.unique().numel(),
            "flat_codes_used": all_ids[flat].unique().numel(),
        }

    def sample(self, path: Path) -> None:
        pixels = to_pixels(self.unseen[:16].to(self.device))
        restored = self.tokenizer.decode(self.tokenizer.encode(pixels)).float()
        pairs = torch.stack([pixels, restored], 1).flatten(0, 1)
        save_grid(pairs, path, columns=8)

    def export(self, directory: Path) -> None:
        tokenizer = fresh_copy(self.tokenizer)
        cast_weights(tokenizer, self.export_dtype).save_pretrained(directory)


def gradient_loss(difference: torch.Tensor, scales: int = 3) -> torch.Tensor:
    """L1 of horizontal and vertical differences of an error image `[B, 3, H, W]`, averaged over `scales` halvings."""
    total = difference.new_zeros(())
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return total / scales


def flat_patches(pixels: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches `size` x `size` of pixels `[B, 3, H, W]` have one constant color: bool `[B, N]` in raster order, and the mean
    colors `[B, N, 3]` in steps of 1/255."""
    patches = F.unfold(pixels, size, stride=size).unflatten(1, (pixels.shape[1], size * size))  # [B, 3, size^2, N]
    flat = (patches.amax(2) - patches.amin(2)).amax(1) < 1.5 / 127.5
    return flat, patches.mean(2).mul(127.5).round().transpose(1, 2)


def flat_loss(vectors: torch.Tensor, pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Mean squared distance of the features `[B, N, C]` of constant patches to the mean feature of their color in the batch."""
    flat, colors = flat_patches(pixels, size)
    chosen = vectors[flat]
    if len(chosen) == 0:
        return vectors.new_zeros(())
    groups, member = colors[flat].unique(dim=0, return_inverse=True)
    centres = chosen.new_zeros(len(groups), chosen.shape[1]).index_reduce_(0, member, chosen.detach(), "mean", include_self=False)
    return (chosen - centres[member]).square().sum(-1).mean()
