"""Trains a `MaskedLatentModel` to draw scenes from captions: masked autoregression with a diffusion loss (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armm.decoding.masked import MaskedLatentDecoding
from armm.decoding.solvers.losses import diffusion_losses
from armm.masked_latent_model import MaskedLatentModel
from armm.model import AutoregressiveModel
from armm.training.recipe import Recipe, take
from armm.training.task import Batch
from pipelines.mar_text_to_image import MARTextToImagePipeline

from .captioned_latents import CaptionedLatentsTask
from .latent_start import start_masked_latents_from_unified

# The share of the tokens that is masked: a normal truncated to [0.7, 1] (MAR, section 4.1).
_MEAN_SHARE, _SPREAD, _LEAST = 1.0, 0.25, 0.7


class MaskedLatentTask(CaptionedLatentsTask):
    """Recipe mappings:

    model: `text_slots` (words of a prompt), `start` (directory of the trained transformer of a unified model of the same widths and
        vocabulary, with as many blocks as `encoder` and `decoder` together, whose blocks and words are taken over), `encoder` and
        `decoder` (arguments of `ARTransformer`; `learned_positions` is filled in), `head` (of `MaskedLatentModel`), `patch_size`,
        `decoding` (arguments of `MaskedLatentDecoding`), `repeat` (noise levels that the head is trained with for each hidden
        state), `compile` (decoder and head; needs a C++ compiler), `generation` (generation config of the export).
    data: see `CaptionedLatentsTask.read_data`.
    """

    loss_name = "diffusion"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.settings = take(
            recipe.model,
            "model",
            text_slots=32,
            start=None,
            encoder={},
            decoder={},
            head={"type": "mlp"},
            patch_size=1,
            decoding={},
            repeat=4,
            compile=False,
            generation={
                "guidance_scale": 3.0,
                "guidance_schedule": "linear",
                "num_inference_steps": 16,
                "head_steps": 50,
            },
        )
        self.read_data(recipe)
        try:
            self.decoding = MaskedLatentDecoding(**self.settings["decoding"])
        except TypeError as error:
            raise ValueError(f"`model.decoding`: {error}") from error
        self.model = MaskedLatentModel(
            latent_channels=self.tokenizer.latent_channels,
            grid=list(self.grid),
            patch_size=int(self.settings["patch_size"]),
            num_classes=0,
            condition_tokens=self.text_slots,
            encoder=self.settings["encoder"],
            decoder=self.settings["decoder"],
            head=self.settings["head"],
            vocab_size=len(self.words),
        )
        if self.settings["start"]:
            other = AutoregressiveModel.from_pretrained(self.settings["start"])
            start_masked_latents_from_unified(self.model, other, len(self.words))
        self.module = nn.ModuleDict({"model": self.model})

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [p for stack in self.model.stacks for p in stack.blocks.parameters() if p.ndim == 2]

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        """kept [B, K]; masked [B, N], bool; timesteps [B, R * N] and noise [B, R * N, C'], R levels for each token."""
        tokens, repeat = self.model.num_tokens, int(self.settings["repeat"])
        share = torch.nn.init.trunc_normal_(torch.empty(1), _MEAN_SHARE, _SPREAD, _LEAST, 1.0, generator=generator)
        number = min(tokens, max(1, int((share * tokens).ceil())))
        order = torch.rand(count, tokens, generator=generator).argsort(1)
        kept = order[:, : tokens - number].sort(1).values
        return {
            "kept": kept,
            "masked": torch.ones(count, tokens, dtype=torch.bool).scatter(1, kept, False),
            "timesteps": torch.randint(self.decoding.solver.num_train_timesteps, (count, repeat * tokens), generator=generator),
            "noise": torch.randn(count, repeat * tokens, self.model.token_channels, generator=generator),
        }

    def batch_loss(self, batch: Batch) -> Tensor:
        """The mean over masked tokens. The head runs over all of them, so that its shapes, compiled once, are always the same."""
        model, repeat, kept = self.model, int(self.settings["repeat"]), batch["kept"]
        tokens = model.patchify(batch["latents"])
        encoded = model.encode(tokens, kept, model.caption_condition(batch["captions"]))
        hidden = model.decode(encoded, kept, self.in_training(model.decoder))
        head, run = model.head, self.in_training(model.head)
        condition = head.condition(hidden).repeat(1, repeat, 1)

        def predict(x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
            return head.split(run(x, timesteps, condition))

        target = tokens.repeat(1, repeat, 1)
        losses = diffusion_losses(self.decoding.solver, predict, target, batch["timesteps"], batch["noise"])
        return losses.total[batch["masked"].repeat(1, repeat)].mean()

    def pipeline(self) -> Any:
        """The model as it stands, as a pipeline."""
        pipe = MARTextToImagePipeline(decoding=self.decoding, **self.components())
        pipe.set_progress_bar_config(disable=True)
        return pipe
