"""Trains a `NextXModel` to draw scenes from captions: next-X prediction of any entity with Noisy Context Learning (2502.20388)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armm.decoding.next_x import NextXDecoding
from armm.model import AutoregressiveModel
from armm.next_x_model import NextXModel
from armm.training.noisy_context import noisy_context_loss
from armm.training.recipe import Recipe, take
from armm.training.task import Batch
from pipelines.next_x_text_to_image import NextXTextToImagePipeline

from .captioned_latents import CaptionedLatentsTask
from .latent_start import start_from_next_x, start_from_unified


class NextXTask(CaptionedLatentsTask):
    """Recipe mappings:

    model: `text_slots` (words of a prompt), `start` (directory of a trained transformer of the same widths and vocabulary: a unified
        model's, whose blocks and words are taken over, or a next-X model's), `decoding` (arguments of `NextXDecoding`: `entity`,
        `size`, `solver`; the export has it), `entities` (list of `entity` and `size`: each batch is of one of them, drawn evenly;
        by default only that of `decoding`), `transformer` (arguments of `ARTransformer`; `learned_positions` is filled in),
        `compile` (the trunk; needs a C++ compiler), `generation` (generation config of the export).
    data: see `CaptionedLatentsTask.read_data`.
    """

    loss_name = "velocity"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.settings = take(
            recipe.model,
            "model",
            text_slots=28,
            start=None,
            decoding={"entity": "cell", "size": 4},
            entities=None,
            transformer={},
            compile=False,
            generation={"guidance_scale": 3.0, "guidance_schedule": "constant", "num_flow_steps": 20},
        )
        self.read_data(recipe)
        settings = self.settings["decoding"]
        try:
            self.decoding = NextXDecoding(**settings)
            self.decodings = [NextXDecoding(**{**settings, **entity}) for entity in self.settings["entities"] or [{}]]
        except TypeError as error:
            raise ValueError(f"`model.decoding` and `model.entities`: {error}") from error
        kinds = [[decoding.config.entity, decoding.config.size] for decoding in self.decodings]
        if [self.decoding.config.entity, self.decoding.config.size] not in kinds:
            raise ValueError(f"`model.entities` must contain that of `model.decoding`, {settings}, got {kinds}")
        tokens = max(decoding.plan(self.grid).num_tokens for decoding in self.decodings)
        self.model = NextXModel(
            latent_channels=self.tokenizer.latent_channels,
            grid=list(self.grid),
            num_classes=0,
            vocab_size=len(self.words),
            text_length=self.text_slots,
            transformer={"learned_positions": tokens + self.text_slots, **self.settings["transformer"]},
            entities=kinds,
        )
        start = self.settings["start"]
        if start and NextXModel.load_config(start)["_class_name"] == NextXModel.__name__:
            start_from_next_x(self.model, NextXModel.from_pretrained(start), len(self.words))
        elif start:
            start_from_unified(self.model, AutoregressiveModel.from_pretrained(start), len(self.words))
        self.module = nn.ModuleDict({"model": self.model})

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        """kind, of the entities, []; times [B, E] and noise [B, N', C]."""
        kind = torch.randint(len(self.decodings), (), generator=generator)
        plan = self.decodings[int(kind)].plan(self.model.grid)
        return {
            "kind": kind,
            "times": torch.randn(count, len(plan.sizes), generator=generator).sigmoid(),
            "noise": torch.randn(count, plan.num_tokens, self.model.latent_channels, generator=generator),
        }

    def batch_loss(self, batch: Batch) -> Tensor:
        return noisy_context_loss(
            self.model,
            self.decodings[int(batch["kind"])],
            self.model.caption_condition(batch["captions"]),
            batch["latents"],
            times=batch["times"],
            noise=batch["noise"],
            trunk=self.in_training(self.model.trunk),
        )

    def pipeline(self) -> NextXTextToImagePipeline:
        """The model as it stands, as a pipeline."""
        pipe = NextXTextToImagePipeline(decoding=self.decoding, **self.components())
        pipe.set_progress_bar_config(disable=True)
        return pipe
