"""Trains a `SceneRecogniser` on rendered scenes of all splits, lightly blurred, shifted and grained."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from armm.data.scenes import RGB, SceneDataset, Scenes, project
from armm.evaluation.reading import tally
from armm.evaluation.recogniser import OBJECT_ATTRIBUTES, RecogniserMaps, SceneRecogniser
from armm.training.images import save_grid, to_pixels, to_uint8
from armm.training.recipe import Recipe, take
from armm.training.task import Batch, TrainingTask, fresh_copy
from tokenizers_visual.vq_tokenizer import VQTokenizer


class RecogniserTask(TrainingTask):
    """Recipe mappings:

    model: arguments of `SceneRecogniser`.
    data: scenes (how many are rendered once), size (pixels), seed, validation (scenes); `shift` (pixels), `blur` (share of
        blurred pictures), `noise` (largest standard deviation, in [-1, 1] units) and `tint` (largest change of contrast and
        of each channel); `tokenizer`, the folder of a trained tokenizer, and `reconstructions`, the share of a batch that has
        gone through it (0 without a tokenizer).
    loss: weights `objectness`, `offset`, `attributes`, `light`, `count`, and `label_smoothing`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.data = take(
            recipe.data,
            "data",
            scenes=20000,
            size=64,
            seed=0,
            validation=1024,
            shift=2,
            blur=0.4,
            noise=0.04,
            tint=0.03,
            tokenizer=None,
            reconstructions=0.5,
        )
        self.weights = take(
            recipe.loss, "loss", objectness=1.0, offset=0.5, attributes=1.0, light=0.5, count=0.5, label_smoothing=0.02
        )
        self.recogniser = SceneRecogniser(**recipe.model).to(memory_format=torch.channels_last)
        self.module = self.recogniser

    def prepare(self, device: torch.device) -> None:
        data = self.data
        cache = Path(self.recipe.output) / "cache"
        self.device = device
        seen = SceneDataset.prepare(data["scenes"], data["size"], data["seed"] + 2, split="all", cache_dir=cache)
        self.images, self.targets = seen.images, scene_targets(seen.scenes)
        unseen = SceneDataset.prepare(data["validation"], data["size"], data["seed"] + 3, split="all", cache_dir=cache)
        self.unseen_images, self.unseen_scenes = unseen.images, unseen.scenes
        self.reconstructions = None
        if data["tokenizer"] is not None:
            tokenizer = VQTokenizer.from_pretrained(data["tokenizer"], torch_dtype=torch.float32).to(device).eval()
            self.reconstructions = reconstruct(tokenizer, self.images, device)

    def batch(self, step: int, size: int, rank: int) -> Batch:
        data, generator = self.data, self.generator(step, rank)
        rows = torch.randint(len(self.images), (size,), generator=generator)
        images = self.images[rows]
        if self.reconstructions is not None:
            passed = torch.rand(size, generator=generator) < data["reconstructions"]
            images = torch.where(passed[:, None, None, None], self.reconstructions[rows], images)
        targets = {name: values[rows] for name, values in self.targets.items()}
        pixels, moved = augment(to_pixels(images), generator, data["shift"], data["blur"], data["noise"], data["tint"])
        targets["centre"] = targets["centre"] + moved[:, None]
        batch = {"pixels": pixels.contiguous(memory_format=torch.channels_last), **targets}
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def loss(self, batch: Batch, step: int, progress: float) -> tuple[Tensor, Batch]:
        terms = recogniser_terms(self.recogniser(batch["pixels"]), batch, self.weights["label_smoothing"])
        loss = sum(self.weights[_weight(name)] * value for name, value in terms.items())
        return loss, {name: value.detach() for name, value in terms.items()}

    def validate(self) -> dict[str, float]:
        chunks = torch.arange(len(self.unseen_images)).split(128)
        batches = ((to_pixels(self.unseen_images[rows].to(self.device)), self.unseen_scenes[rows]) for rows in chunks)
        return {name: round(share, 4) for name, share in tally(self.recogniser, batches).accuracy().items()}

    def sample(self, path: Path) -> None:
        """Unseen scenes, and again with a patch of the color read at each place where an object is read."""
        pixels = to_pixels(self.unseen_images[:16].to(self.device))
        marked = pixels.clone()
        for row, reading in enumerate(self.recogniser.recognise(pixels)):
            for seen in reading.objects:
                x, y = (int(seen[axis] * pixels.shape[-1]) for axis in ("x", "y"))
                color = torch.tensor(RGB[seen["color"]], device=pixels.device) / 127.5 - 1
                marked[row, :, max(y - 3, 0) : y + 3, max(x - 3, 0) : x + 3] = -1
                marked[row, :, max(y - 2, 0) : y + 2, max(x - 2, 0) : x + 2] = color[:, None, None]
        save_grid(torch.stack([pixels, marked], 1).flatten(0, 1), path, columns=8)

    def export(self, directory: Path) -> None:
        recogniser = fresh_copy(self.recogniser)
        torch.nn.Module.to(recogniser, self.export_dtype)  # all of it: nothing here must stay in float32
        recogniser.save_pretrained(directory)


def scene_targets(scenes: Scenes) -> Batch:
    """What the network is to say about scenes: centre [B, 3, 2] on the screen, attribute indices [B, 3] (-1 absent), light
    [B] and count [B]."""
    targets = {name: getattr(scenes, name) for name in OBJECT_ATTRIBUTES}
    return {"centre": project(scenes), "light": scenes.light, "count": scenes.count, **targets}


@torch.no_grad()
def reconstruct(tokenizer: VQTokenizer, images: Tensor, device: torch.device, batch_size: int = 64) -> Tensor:
    """uint8 images [N, 3, H, W] through a tokenizer and back, uint8."""
    parts = []
    for chunk in images.split(batch_size):
        with torch.autocast(device.type, torch.bfloat16):
            restored = tokenizer.decode(tokenizer.encode(to_pixels(chunk.to(device))))
        parts.append(to_uint8(restored).cpu())
    return torch.cat(parts)


def augment(
    pixels: Tensor,
    generator: torch.Generator,
    shift: int = 2,
    blur: float = 0.4,
    noise: float = 0.04,
    tint: float = 0.03,
) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] -> shifted (edges repeated), tinted, softened and grained ones, and how far each was moved, as a
    share of the picture's sides, [B, 2] (x, y)."""
    batch, _, height, width = pixels.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    move = torch.randint(-shift, shift + 1, (batch, 2), generator=generator)
    columns = (torch.arange(width) - move[:, :1]).clamp(0, width - 1)
    rows = (torch.arange(height) - move[:, 1:]).clamp(0, height - 1)
    pixels = pixels.gather(3, columns[:, None, None].expand(-1, 3, height, -1))
    pixels = pixels.gather(2, rows[:, None, :, None].expand(-1, 3, -1, width))
    gain = 1 + tint * (2 * draw(batch, 3, 1, 1) - 1)
    pixels = pixels * gain + tint * (2 * draw(batch, 1, 1, 1) - 1)
    ramp = torch.tensor([0.25, 0.5, 0.25])
    kernel = (ramp[:, None] * ramp).expand(3, 1, 3, 3)
    soft = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    strength = draw(batch, 1, 1, 1) * (draw(batch, 1, 1, 1) < blur)
    pixels = pixels + strength * (soft - pixels)
    grain = torch.randn(pixels.shape, generator=generator) * (noise * draw(batch, 1, 1, 1))
    return (pixels + grain).clamp(-1, 1), move / torch.tensor([width, height])


def recogniser_terms(maps: RecogniserMaps, targets: Batch, label_smoothing: float = 0.0, sigma: float = 0.7) -> Batch:
    """Loss terms by name.

    Objectness is the penalty-reduced focal loss of centre-point detectors (Zhou et al. 2019): the cell that holds a centre
    is positive, its neighbours count less the nearer they are. Offsets and attributes are learnt on every cell within one
    cell of a centre, weighted by nearness, so that a peak one cell off still reads the right object.
    """
    batch, rows, columns = maps.objectness.shape
    device = maps.objectness.device
    present = targets["shape"] >= 0  # [B, K]
    centre = targets["centre"] * torch.tensor([columns, rows], device=device)  # in cells
    y, x = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    middle = torch.stack([x, y], -1).flatten(0, 1) + 0.5  # [G*G, 2]
    away = centre[:, None] - middle[None, :, None]  # [B, G*G, K, 2]
    squared = away.square().sum(-1).masked_fill(~present[:, None], 1e6)
    distance, owner = squared.min(-1)  # [B, G*G]
    heat = torch.exp(-distance / (2 * sigma**2))

    holds = (away.abs() <= 0.5).all(-1) & present[:, None]
    positive = holds.any(-1)
    objects = present.sum().clamp(min=1)
    logits = maps.objectness.flatten(1)
    chance = logits.sigmoid()
    hit = F.logsigmoid(logits) * (1 - chance) ** 2 * positive
    false_alarm = F.logsigmoid(-logits) * chance**2 * (1 - heat) ** 4 * ~positive
    terms = {"objectness": -(hit + false_alarm).sum() / objects}

    weight = heat * (distance < 1.0)
    weight = weight / weight.sum().clamp(min=1e-6)
    wanted = away.gather(2, owner[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]  # [B, G*G, 2]
    error = F.smooth_l1_loss(maps.offset.flatten(2).transpose(1, 2), wanted, reduction="none", beta=0.1).sum(-1)
    terms["offset"] = (error * weight).sum()
    for name in OBJECT_ATTRIBUTES:
        truth = targets[name].gather(1, owner).clamp(min=0)
        losses = F.cross_entropy(
            maps.attributes[name].flatten(2), truth, reduction="none", label_smoothing=label_smoothing
        )
        terms[name] = (losses * weight).sum()
    terms["light"] = F.cross_entropy(maps.light, targets["light"], label_smoothing=label_smoothing)
    terms["count"] = F.cross_entropy(maps.count, targets["count"] - 1, label_smoothing=label_smoothing)
    return terms


def _weight(term: str) -> str:
    return "attributes" if term in OBJECT_ATTRIBUTES else term
