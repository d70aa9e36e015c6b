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
from .latent_start import start_from_unified


class NextXTask(CaptionedLatentsTask):
    """Recipe mappings:

    model: `text_slots` (words of a prompt), `start` (directory of the trained transformer of a unified model of the same widths
        and vocabulary, whose blocks and words are taken over), `decoding` (arguments of `NextXDecoding`: `entity`, `size`,
        `solver`), `transformer` (arguments of `ARTransformer`; `learned_positions` is filled in), `compile` (the trunk; needs a
        C++ compiler), `generation` (generation config of the export).
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
            transformer={},
            compile=False,
            generation={"guidance_scale": 3.0, "guidance_schedule": "constant", "num_flow_steps": 20},
        )
        self.read_data(recipe)
        try:
            self.decoding = NextXDecoding(**self.settings["decoding"])
        except TypeError as error:
            raise ValueError(f"`model.decoding`: {error}") from error
        plan = self.decoding.plan(self.grid)
        self.model = NextXModel(
            latent_channels=self.tokenizer.latent_channels,
            grid=list(self.grid),
            num_classes=0,
            vocab_size=len(self.words),
            text_length=self.text_slots,
            transformer={"learned_positions": plan.num_tokens + self.text_slots, **self.settings["transformer"]},
        )
        if self.settings["start"]:
            start_from_unified(self.model, AutoregressiveModel.from_pretrained(self.settings["start"]), len(self.words))
        self.module = nn.ModuleDict({"model": self.model})

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        """times [B, E] and noise [B, N', C]."""
        plan = self.decoding.plan(self.model.grid)
        return {
            "times": torch.randn(count, len(plan.sizes), generator=generator).sigmoid(),
            "noise": torch.randn(count, plan.num_tokens, self.model.latent_channels, generator=generator),
        }

    def batch_loss(self, batch: Batch) -> Tensor:
        return noisy_context_loss(
            self.model,
            self.decoding,
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
