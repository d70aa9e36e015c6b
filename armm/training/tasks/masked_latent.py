"""Trains a `MaskedLatentModel` to draw scenes from captions: masked autoregression with a diffusion loss (MAR, arXiv 2406.11838)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armm.decoding.masked import MaskedLatentDecoding
from armm.decoding.solvers.losses import diffusion_losses
from armm.masked_latent_model import MaskedLatentModel
from armm.training.recipe import Recipe, take
from armm.training.task import Batch
from pipelines.mar_text_to_image import MARTextToImagePipeline

from .captioned_latents import CaptionedLatentsTask

# The share of the tokens that is masked: a normal truncated to [0.7, 1] (MAR, section 4.1).
_MEAN_SHARE, _SPREAD, _LEAST = 1.0, 0.25, 0.7


class MaskedLatentTask(CaptionedLatentsTask):
    """Recipe mappings:

    model: `text_slots` (words of a prompt), `encoder` and `decoder` (arguments of `ARTransformer`; `learned_positions` is filled in),
        `head` (of `MaskedLatentModel`), `patch_size`, `decoding` (arguments of `MaskedLatentDecoding`), `repeat` (noise levels that
        the head is trained with for each hidden state), `compile` (no stack of this model is compiled), `generation` (generation config
        of the export).
    data: see `CaptionedLatentsTask.read_data`.
    """

    loss_name = "diffusion"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.settings = take(
            recipe.model,
            "model",
            text_slots=32,
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
        if self.settings["compile"]:
            raise ValueError("`model.compile` must be false: the shapes of this model change with every batch.")
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
        self.module = nn.ModuleDict({"model": self.model})

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [p for stack in self.model.stacks for p in stack.blocks.parameters() if p.ndim == 2]

    def draws(self, count: int, generator: torch.Generator) -> Batch:
        """kept and masked [B, K] and [B, N - K], positions; timesteps [B, R * (N - K)] and noise [B, R * (N - K), C'], R levels each."""
        tokens, repeat = self.model.num_tokens, int(self.settings["repeat"])
        share = torch.nn.init.trunc_normal_(torch.empty(1), _MEAN_SHARE, _SPREAD, _LEAST, 1.0, generator=generator)
        masked = min(tokens, max(1, int((share * tokens).ceil())))
        order = torch.rand(count, tokens, generator=generator).argsort(1)
        places = repeat * masked
        return {
            "kept": order[:, : tokens - masked].sort(1).values,
            "masked": order[:, tokens - masked :],
            "timesteps": torch.randint(self.decoding.solver.num_train_timesteps, (count, places), generator=generator),
            "noise": torch.randn(count, places, self.model.token_channels, generator=generator),
        }

    def batch_loss(self, batch: Batch) -> Tensor:
        model, repeat = self.model, int(self.settings["repeat"])
        tokens = model.patchify(batch["latents"])
        hidden = model(tokens, batch["kept"], model.caption_condition(batch["captions"]))

        def chosen(values: Tensor) -> Tensor:
            index = batch["masked"][..., None].expand(-1, -1, values.shape[2])
            return values.gather(1, index).repeat(1, repeat, 1)

        head = model.head
        condition = head.condition(chosen(hidden))

        def predict(x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
            return head.split(head(x, timesteps, condition))

        solver = self.decoding.solver
        return diffusion_losses(solver, predict, chosen(tokens), batch["timesteps"], batch["noise"]).total.mean()

    def pipeline(self) -> Any:
        """The model as it stands, as a pipeline."""
        pipe = MARTextToImagePipeline(decoding=self.decoding, **self.components())
        pipe.set_progress_bar_config(disable=True)
        return pipe
