"""Next-token decoding of continuous tokens: each is drawn along a flow from one hidden state of the trunk, and fed back as what a
tokenizer makes readable of it (Ming-UniVision, arXiv 2510.06590)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.condition import Condition
from armm.decoding.base import StepCallback, wake
from armm.decoding.guidance import ContextGuidance
from armm.decoding.solvers.flow import FlowSolver
from armm.decoding.solvers.noise import GaussianNoise
from armm.nn.masks import additive_mask, key_mask, prefix_mask

if TYPE_CHECKING:
    from armm.heads.diffusion import DiffusionHead
    from armm.multimodal_model import MultimodalModel

__all__ = ["NextLatentDecoding", "NextLatentOutput", "SchedulerMixin", "flow_sample"]

# read(the newest latents [B, 1, C]) -> their features [B, 1, F]; it remembers the ones before
Reader = Callable[[Tensor], Tensor]
TIME_SCALE = 1000.0  # of flow times for the head's sinusoids


@dataclass
class NextLatentOutput:
    """latents [B, N, C] and their features [B, N, F] (0 where not drawn); logits [B, V] of the word after the image, if all of it was
    drawn and they were asked for; num_calls of the trunk and head_calls of the head; steps: tokens really drawn."""

    latents: Tensor
    features: Tensor
    logits: Tensor | None = None
    num_calls: int = 0
    head_calls: int = 0
    steps: int = 0


def time_index(solver: FlowSolver, num_steps: int, device: torch.device) -> Tensor:
    """float32 [calls + 1] on the device: the solver's times as the head's sinusoids take them."""
    return (TIME_SCALE * solver.times(num_steps)).to(device=device, dtype=torch.float32)


def flow_sample(
    head: DiffusionHead,
    condition: Tensor,
    noise: Tensor,
    solver: FlowSolver,
    num_steps: int,
    guidance: ContextGuidance | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """Tokens [B, n, C] from `noise` [B, n, C] by a head whose output is the velocity, all steps of the solver.

    condition: `head.condition(...)` [R * B, n, W] of the rows that `guidance` combines, the full ones first; they share the noise.
    index: from `time_index`, for many tokens; made here by default.
    """
    rows = len(condition) // len(noise)
    index = time_index(solver, num_steps, condition.device) if index is None else index

    def velocity(x: Tensor, call: int, time: float) -> Tensor:
        state = x.float().repeat(rows, 1, 1) if rows > 1 else x.float()
        out = head(state, index[call].expand(1, 1), condition)
        return guidance.combine(out) if rows > 1 and guidance is not None else out

    return solver(velocity, noise, num_steps=num_steps)


class NextLatentDecoding(SchedulerMixin, ConfigMixin):
    """One continuous token after the other. A component of a pipeline, like a scheduler.

    Rows for guidance have the prompt's keys and values of the full row and see fewer of them: they are masks, and the prompt is run
    once. What they see is numbered from 0.

    Args:
        shift: of the `FlowSolver`'s times; 1 = evenly spaced.
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(self, shift: float = 1.0) -> None:
        self.solver = FlowSolver(shift=shift)

    def num_calls(self, tokens: int) -> int:
        """Calls of the trunk for an image of so many tokens: the prompt's included, that for the word behind the image not."""
        return tokens + 1

    @torch.no_grad()
    def __call__(
        self,
        model: MultimodalModel,
        condition: Condition,
        views: Sequence[Tensor] = (),
        *,
        num_tokens: int,
        read: Reader,
        num_steps: int = 16,
        temperature: float = 1.0,
        guidance: ContextGuidance | None = None,
        noise: GaussianNoise | torch.Generator | Sequence[Any] | None = None,
        next_word: bool = False,
        callback: StepCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
    ) -> NextLatentOutput:
        """Draw one image per row of `condition`, whose last token begins it.

        views: bool [B, T] for each row of the guidance besides the full one, in its order ("images", then null): what it sees of
        the prompt. read: see `Reader`. num_steps: of the solver. temperature: scale of the noise. noise: one generator, one per
        sample, or recorded normal noise [B, 1, C], one for each token. next_word: also feed the last token, for the logits of the
        word after it. callback(step, latents so far [B, step + 1, C]): may return their replacement, of which the newest one counts.
        interrupt: asked before every token, True ends the loop.
        """
        wake(model)
        guidance = guidance if guidance is not None and guidance.active else None
        self._check(model, condition, views, num_tokens, guidance, temperature)
        index = time_index(self.solver, num_steps, condition.embeds.device)
        batch, device, head = condition.batch, condition.embeds.device, cast("DiffusionHead", model.latent_head)
        if not isinstance(noise, GaussianNoise):
            noise = GaussianNoise(noise, batch, device)
        stream = _GuidedStream(model, condition, views if guidance is not None else (), num_tokens)
        output = NextLatentOutput(
            torch.zeros(batch, num_tokens, model.latent_channels, device=device), condition.embeds[:, :0]
        )
        features: list[Tensor] = []
        embeds = stream.prefill()
        for step in range(num_tokens):
            if interrupt is not None and interrupt():
                break
            hidden = stream.feed(embeds)
            start = noise.draw(1, model.latent_channels) * temperature
            latent = flow_sample(head, model.latent_condition(hidden), start, self.solver, num_steps, guidance, index)
            output.latents[:, step : step + 1] = latent
            output.head_calls += self.solver.num_calls(num_steps)
            output.steps = step + 1
            if callback is not None:
                replacement = callback(step, output.latents[:, : step + 1])
                if replacement is not None:
                    output.latents[:, : step + 1] = replacement
                    latent = output.latents[:, step : step + 1].clone()
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
            features.append(read(latent))
            embeds = model.embed_features(features[-1])
        if features:
            missing = num_tokens - len(features)
            output.features = torch.nn.functional.pad(torch.cat(features, dim=1), (0, 0, 0, missing))
        if next_word and output.steps == num_tokens:
            output.logits = model.logits(stream.feed(embeds)[:batch, -1], high=model.text_vocab_size)
        output.num_calls = stream.num_calls
        return output

    @staticmethod
    def _check(
        model: MultimodalModel,
        condition: Condition,
        views: Sequence[Tensor],
        num_tokens: int,
        guidance: ContextGuidance | None,
        temperature: float,
    ) -> None:
        if model.latent_head is None:
            raise ValueError("this model does not draw continuous tokens: it has no head for latents")
        if condition.length < 2:
            raise ValueError(
                "the condition must have a prompt and the token that begins the image, got less than 2 tokens"
            )
        if num_tokens < 1 or condition.length + num_tokens > model.max_positions:
            raise ValueError(
                f"num_tokens={num_tokens} does not fit behind a prompt of {condition.length} tokens: this model has "
                f"{model.max_positions} positions"
            )
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number >= 0, got {temperature!r}")
        if guidance is None:
            return
        shape = tuple(condition.embeds.shape[:2])
        if len(views) != len(guidance.views) or any(tuple(v.shape) != shape or v.dtype != torch.bool for v in views):
            raise ValueError(
                f"guidance needs {len(guidance.views)} views, each bool {list(shape)} (what it sees of the prompt), got "
                f"{[(v.dtype, tuple(v.shape)) for v in views]}"
            )
        if any(not bool(view[:, -1].all()) for view in views):
            raise ValueError("every view must see the last token of the prompt, which begins the image")


class _GuidedStream:
    """A prompt through trunk and cache, then token after token in 1 + len(views) rows of each sample, the full ones first."""

    def __init__(self, model: MultimodalModel, condition: Condition, views: Sequence[Tensor], capacity: int) -> None:
        self.model, self.condition, self.num_calls = model, condition, 0
        batch, length = condition.embeds.shape[:2]
        self.rows = 1 + len(views)
        device = condition.embeds.device
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if condition.mask is not None:
            real = condition.mask.bool()
        self.real = real
        visible = torch.cat([real, *(view.to(device) & real for view in views)])
        self.position = visible.sum(1, keepdim=True) - 1  # of the token to be fed, [R * B, 1]
        self.cache = model.trunk.allocate_cache(batch, length + capacity)
        self.bias: Tensor | None = None
        if views or condition.mask is not None:
            keys = torch.cat([visible, visible.new_ones(len(visible), capacity)], dim=1)
            self.bias = additive_mask(key_mask(keys), self.cache.buffer.dtype)

    def prefill(self) -> Tensor:
        """Run the prompt without its last token, which is returned for all rows [R * B, 1, D]."""
        condition, model = self.condition, self.model
        embeds = condition.embeds.to(model.trunk.dtype)
        length = condition.length - 1
        index = (self.real.cumsum(1) - 1).clamp(min=0)[:, :length]
        mask = None if condition.mask is None else prefix_mask(self.real[:, :length], length)
        routes = {} if condition.routes is None else {"routes": condition.routes[:, :length]}
        positions = model.positions_for(index)
        model.trunk(embeds[:, :length], positions=positions, mask=mask, causal=mask is None, cache=self.cache, **routes)
        self.num_calls += 1
        if self.rows > 1:
            self.cache.reorder(torch.arange(len(embeds), device=embeds.device).repeat(self.rows))
        return embeds[:, -1:]

    def feed(self, embeds: Tensor) -> Tensor:
        """Feed the next token [B, 1, D] of every sample: hidden states [R * B, 1, D]."""
        slot = self.cache.length
        mask = None if self.bias is None else self.bias.narrow(3, 0, slot + 1)
        positions = self.model.positions_for(self.position)
        embeds = embeds.to(self.model.trunk.dtype).repeat(self.rows, 1, 1)
        hidden = self.model.trunk(embeds, positions=positions, mask=mask, cache=self.cache)
        self.position = self.position + 1
        self.num_calls += 1
        return hidden[0] if isinstance(hidden, tuple) else hidden
