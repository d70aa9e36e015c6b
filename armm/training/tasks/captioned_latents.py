"""What the tasks share that train a transformer to draw captions out of continuous tokens."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armm.training.recipe import Recipe, take
from armm.training.task import Batch
from pipelines.text import WordTokenizer
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .captioned import CaptionedImagesTask
from .latent_data import CaptionedLatents, prepare_split
from .unified_data import scene_vocabulary


class CaptionedLatentsTask(CaptionedImagesTask):
    """Base of these tasks: the tokenizer, the words and the data.

    Class attributes:
        loss_name: of the loss, in logs.
    """

    loss_name: str

    def read_data(self, recipe: Recipe) -> None:
        """`data` of the recipe: `tokenizer` (directory of a trained `KLTokenizer`), scenes, size, seed, validation (scenes), `cache`
        (directory of what is made once; by default beside the output directory), captions (written per scene), `null_share` (of the
        rows, without their caption), `count_weights` (how often a scene of one, two, three objects is drawn from, relative to its
        share), `sample` (latents are drawn from the tokenizer's posterior; false takes its mean)."""
        self.data = take(
            recipe.data,
            "data",
            tokenizer=None,
            scenes=60000,
            size=64,
            seed=0,
            validation=256,
            cache=None,
            captions=6,
            null_share=0.1,
            count_weights=[1.0, 1.0, 1.0],
            sample=True,
        )
        take(recipe.loss, "loss")
        if not self.data["tokenizer"]:
            raise ValueError(
                "`data.tokenizer` must name the directory of a trained KL tokenizer (`armm train` one first)."
            )
        self.tokenizer = KLTokenizer.from_pretrained(self.data["tokenizer"]).requires_grad_(False)
        self.vocabulary = scene_vocabulary()
        self.words = WordTokenizer(self.vocabulary)
        self.text_slots = int(self.settings["text_slots"])
        self.grid = (self.data["size"] // self.tokenizer.downsample,) * 2

    def prepare(self, device: torch.device) -> None:
        data = self.data
        self.device = device
        cache = Path(data["cache"] or Path(self.recipe.output).parent / "cache")
        self.tokenizer.to(device)
        common = (data, self.text_slots, self.tokenizer, self.vocabulary, device, cache)
        self.train_data = prepare_split("train", data["scenes"], data["seed"], *common)
        self.unseen = prepare_split("heldout", data["validation"], data["seed"] + 1, *common)
        self.unseen_prompts = [self.words.decode(row.tolist()) for row in self.unseen.captions[:16, 0]]

    def batch(self, step: int, size: int, rank: int) -> Batch:
        generator = self.generator(step, rank)
        rows = torch.multinomial(self.train_data.weights, size, replacement=True, generator=generator)
        batch = self.rows(self.train_data, rows, generator, self.data["null_share"], self.data["sample"])
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def rows(
        self, data: CaptionedLatents, rows: Tensor, generator: torch.Generator, null_share: float, sample: bool
    ) -> Batch:
        """captions [B, T], a share of them null; latents [B, N, C]; and what the loss draws."""
        pick = torch.randint(data.captions.shape[1], (len(rows),), generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < null_share
        null = torch.full((1, self.text_slots), self.words.pad)
        null[:, 0] = self.words.null
        return {
            "captions": torch.where(dropped, null, data.captions[rows, pick].long()),
            "latents": data.latents(rows, generator if sample else None),
            **self.draws(len(rows), generator),
        }

    @abstractmethod
    def draws(self, count: int, generator: torch.Generator) -> Batch:
        """The random part of the loss of `count` rows."""

    @abstractmethod
    def batch_loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""

    def loss(self, batch: Batch, step: int, progress: float) -> tuple[Tensor, Batch]:
        loss = self.batch_loss(batch)
        return loss, {self.loss_name: loss.detach()}

    def validate(self) -> dict[str, float]:
        sums = {self.loss_name: 0.0, "null": 0.0}
        for rows in torch.arange(len(self.unseen)).split(64):
            for name, share in ((self.loss_name, 0.0), ("null", 1.0)):
                generator = torch.Generator().manual_seed(int(rows[0]))  # both at the same times, with the same noise
                batch = self.rows(self.unseen, rows, generator, share, False)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                    loss = self.batch_loss({key: value.to(self.device) for key, value in batch.items()})
                sums[name] += loss.item() * len(rows)
        figures = {name: round(value / len(self.unseen), 5) for name, value in sums.items()}
        return figures | {"prompt_gain": round(figures["null"] - figures[self.loss_name], 5)}

    def components(self) -> dict[str, Any]:
        """What the pipelines of these models are made of, but for the decoding."""
        return {
            "tokenizer": self.tokenizer,
            "transformer": self.model,
            "vocabulary": self.vocabulary,
            "generation_config": dict(self.settings["generation"]),
        }
