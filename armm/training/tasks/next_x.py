"""Trains a `NextXModel` to draw scenes from captions: next-X prediction of any entity with Noisy Context Learning (2502.20388)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from armm.decoding.base import Trunk
from armm.decoding.next_x import NextXDecoding
from armm.next_x_model import NextXModel
from armm.training.noisy_context import noisy_context_loss
from armm.training.recipe import Recipe, take
from armm.training.task import Batch, TrainingTask, cast_weights, fresh_copy
from pipelines.next_x_text_to_image import NextXTextToImagePipeline
from pipelines.text import WordTokenizer
from tokenizers_visual.kl_tokenizer import KLTokenizer

from .latent_data import CaptionedLatents, prepare_split
from .unified_data import scene_vocabulary
from .unified_rows import save_captioned_grid


class NextXTask(TrainingTask):
    """Recipe mappings:

    model: `text_slots` (words of a prompt), `decoding` (arguments of `NextXDecoding`: `entity`, `size`, `solver`), `transformer`
        (arguments of `ARTransformer`; `learned_positions` is filled in), `compile` (the trunk; needs a C++ compiler), `generation`
        (generation config of the export).
    data: `tokenizer` (directory of a trained `KLTokenizer`), scenes, size, seed, validation (scenes), `cache` (directory of what is
        made once; by default beside the output directory), captions (written per scene), `null_share` (of the rows, without their
        caption), `count_weights` (how often a scene of one, two, three objects is drawn from, relative to its share), `sample`
        (latents are drawn from the tokenizer's posterior; false takes its mean).
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.settings = take(
            recipe.model,
            "model",
            text_slots=28,
            decoding={"entity": "cell", "size": 4},
            transformer={},
            compile=False,
            generation={"guidance_scale": 3.0, "guidance_schedule": "constant", "num_flow_steps": 20},
        )
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
        side = self.data["size"] // self.tokenizer.downsample
        try:
            self.decoding = NextXDecoding(**self.settings["decoding"])
        except TypeError as error:
            raise ValueError(f"`model.decoding`: {error}") from error
        plan = self.decoding.plan((side, side))
        self.model = NextXModel(
            latent_channels=self.tokenizer.latent_channels,
            grid=[side, side],
            num_classes=0,
            vocab_size=len(self.words),
            text_length=self.text_slots,
            transformer={"learned_positions": plan.num_tokens + self.text_slots, **self.settings["transformer"]},
        )
        self.module = nn.ModuleDict({"model": self.model})
        self._compiled: Trunk | None = None

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [p for p in self.model.trunk.blocks.parameters() if p.ndim == 2]

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
        """captions [B, T], a share of them null; latents [B, N, C]; and the times [B, E] and noise [B, N', C] of the loss."""
        pick = torch.randint(data.captions.shape[1], (len(rows),), generator=generator)
        dropped = torch.rand(len(rows), 1, generator=generator) < null_share
        null = torch.full((1, self.text_slots), self.words.pad)
        null[:, 0] = self.words.null
        plan = self.decoding.plan(self.model.grid)
        return {
            "captions": torch.where(dropped, null, data.captions[rows, pick].long()),
            "latents": data.latents(rows, generator if sample else None),
            "times": torch.randn(len(rows), len(plan.sizes), generator=generator).sigmoid(),
            "noise": torch.randn(len(rows), plan.num_tokens, self.model.latent_channels, generator=generator),
        }

    def loss(self, batch: Batch, step: int, progress: float) -> tuple[Tensor, Batch]:
        loss = self._velocity_loss(batch)
        return loss, {"velocity": loss.detach()}

    def _velocity_loss(self, batch: Batch) -> Tensor:
        return noisy_context_loss(
            self.model,
            self.decoding,
            self.model.caption_condition(batch["captions"]),
            batch["latents"],
            times=batch["times"],
            noise=batch["noise"],
            trunk=self._trunk(),
        )

    def _trunk(self) -> Trunk:
        trunk = self.model.trunk
        if not (self.settings["compile"] and self.module.training):
            return trunk
        if self._compiled is None:
            self._compiled = torch.compile(trunk.forward, dynamic=False)
        return self._compiled

    def validate(self) -> dict[str, float]:
        sums = {"velocity": 0.0, "null": 0.0}
        for rows in torch.arange(len(self.unseen)).split(64):
            for name, share in (("velocity", 0.0), ("null", 1.0)):
                generator = torch.Generator().manual_seed(int(rows[0]))  # both at the same times, with the same noise
                batch = self.rows(self.unseen, rows, generator, share, False)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
                    loss = self._velocity_loss({key: value.to(self.device) for key, value in batch.items()})
                sums[name] += loss.item() * len(rows)
        figures = {name: round(value / len(self.unseen), 5) for name, value in sums.items()}
        return figures | {"prompt_gain": round(figures["null"] - figures["velocity"], 5)}

    def pipeline(self) -> NextXTextToImagePipeline:
        """The model as it stands, as a pipeline."""
        pipe = NextXTextToImagePipeline(
            tokenizer=self.tokenizer,
            transformer=self.model,
            decoding=self.decoding,
            vocabulary=self.vocabulary,
            generation_config=dict(self.settings["generation"]),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, path: Path) -> None:
        generators = [torch.Generator().manual_seed(index) for index in range(len(self.unseen_prompts))]
        images = self.pipeline()(self.unseen_prompts, generator=generators).images
        save_captioned_grid(images, self.unseen_prompts, path)

    def export(self, directory: Path) -> None:
        pipe = self.pipeline()
        pipe.register_modules(
            transformer=cast_weights(fresh_copy(self.model), self.export_dtype),
            tokenizer=cast_weights(fresh_copy(self.tokenizer), torch.float16),
        )
        pipe.save_pretrained(directory)
