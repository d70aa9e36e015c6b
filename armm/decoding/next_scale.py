"""Next-scale decoding: one call of the trunk for each token map, all tokens of a map at once (VAR, arXiv 2404.02905)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from armm.decoding.base import DecodingOutput, check_known, wake
from armm.decoding.guidance import Guidance
from armm.decoding.sampling import NoiseSource, Sampler

if TYPE_CHECKING:
    from armm.next_scale_model import NextScaleModel
    from tokenizers_visual.multi_scale import MultiScaleQuantizer

# callback(step, ids so far [B, tokens], features so far [B, C, h, h]) -> replacement of the ids, or None
ScaleCallback = Callable[[int, Tensor, Tensor], "Tensor | None"]


@dataclass
class NextScaleOutput(DecodingOutput):
    """ids [B, L], logits [B, L, V] if recorded, num_calls, steps (scales drawn) and the accumulated codes `features`
    [B, C, h, h], from which the tokenizer makes the image."""

    features: Tensor | None = None


def scale_masks(keep: Tensor, scales: Sequence[int]) -> Tensor:
    """Which tokens of all scales lie in the region `keep` [H, W] or [B, H, W] (1 or True = keep): bool [B, L].

    The mask is resized bilinearly to each scale and cut at one half. Scales of at most three tokens are kept whole: they set
    the picture's overall look.
    """
    if keep.dim() not in (2, 3):
        raise ValueError(f"keep must be [H, W] or [B, H, W], got shape {tuple(keep.shape)}")
    plane = (keep if keep.dim() == 3 else keep[None])[:, None].float()
    parts = []
    for side in scales:
        if side * side <= 3:
            parts.append(torch.ones(plane.shape[0], side * side, dtype=torch.bool, device=plane.device))
        else:
            resized = F.interpolate(plane, size=(side, side), mode="bilinear", align_corners=False)
            parts.append((resized > 0.5).flatten(1))
    return torch.cat(parts, dim=1)


class NextScaleDecoding(SchedulerMixin, ConfigMixin):
    """Token maps of growing size, each drawn at once from those before it. A component of a pipeline, like a scheduler.

    Args:
        smooth_temperature, smooth_decay, smooth_floor: of smooth sampling, whose temperature falls over the progress r (0 at the
            first scale, 1 at the last) as max(smooth_temperature * (1 - smooth_decay * r), smooth_floor).
    """

    config_name = "scheduler_config.json"
    order = 1

    @register_to_config
    def __init__(
        self, smooth_temperature: float = 0.27, smooth_decay: float = 0.95, smooth_floor: float = 0.005
    ) -> None:
        if not smooth_temperature > 0 or not smooth_floor > 0 or not 0 <= smooth_decay <= 1:
            raise ValueError(
                "smooth_temperature and smooth_floor must be positive and smooth_decay in [0, 1], got "
                f"{smooth_temperature!r}, {smooth_floor!r}, {smooth_decay!r}"
            )

    def num_calls(self, scales: Sequence[int]) -> int:
        """Calls of the trunk for token maps of these sides."""
        return len(scales)

    @torch.no_grad()
    def __call__(
        self,
        model: NextScaleModel,
        quantizer: MultiScaleQuantizer,
        condition: Tensor,
        null_condition: Tensor | None = None,
        *,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        noise: NoiseSource | torch.Generator | Sequence[torch.Generator] | Tensor | None = None,
        smooth: bool = False,
        known_ids: Tensor | None = None,
        known_mask: Tensor | None = None,
        callback: ScaleCallback | None = None,
        interrupt: Callable[[], bool] | None = None,
        record_logits: bool = False,
    ) -> NextScaleOutput:
        """Generate the codes of one image per row of `condition` [B, D].

        quantizer: the tokenizer's, which turns ids into the next scale's input. null_condition: [B, D], needed with active
        guidance; a step of the guidance is a scale. noise: one generator, one per sample, or recorded Exp(1) noise [B, L, V].
        smooth: add an average of the code vectors to the image instead of the drawn one, weighted by the softmax of
        (logits * (1 + r) - ln noise) / temperature; the ids are drawn all the same. known_ids, known_mask: [B, L], ids to
        use where the mask is True in place of the drawn ones. callback(step, ids so far, features so far): after every scale;
        may return a replacement of the ids, of which those of this scale count. interrupt: asked before every scale, True
        ends the loop. record_logits: keep what each draw was made from (after guidance, before the filters).
        """
        wake(model)
        sampler = sampler or Sampler()
        guided = guidance is not None and guidance.active
        _check(model, quantizer, condition, null_condition, guidance, smooth, sampler)
        batch, device = condition.shape[0], condition.device
        scales, sizes, total_tokens, codes = model.scales, model.sizes, model.num_tokens, model.vocab_size
        check_known(known_ids, known_mask, batch, total_tokens, quantizer.codebook_size)
        if sampler.do_sample and not isinstance(noise, NoiseSource):
            noise = NoiseSource(noise, batch, codes, device)

        rows = torch.cat([condition, null_condition]) if guided else condition  # type: ignore[list-item]
        positions = model.positions()
        cache = model.trunk.allocate_cache(rows.shape[0], total_tokens)
        features = quantizer.empty(batch, scales).to(device)
        ids = torch.zeros(batch, total_tokens, dtype=torch.long, device=device)
        kept = torch.empty(batch, total_tokens, codes, device=device) if record_logits else None
        start = done = 0
        for step, size in enumerate(sizes):
            if interrupt is not None and interrupt():
                break
            if guided and not guidance.covers(step):
                guided = False  # for good: the null rows are not needed any more
                rows = condition
                cache.narrow(batch)
            stop = start + size
            if step == 0:
                embeds = model.start_tokens(rows)
            else:
                embeds = model.embed_codes(quantizer.next_input(features, step, scales))
                embeds = torch.cat([embeds, embeds]) if guided else embeds
            hidden = model.trunk(embeds, positions=positions[start:stop], cache=cache, modulation=rows)
            logits = model.logits(hidden, rows)
            if guided:
                logits = guidance.combine(logits, step, len(scales))
            if kept is not None:
                kept[:, start:stop] = logits
            draw = noise.draw_group(start, size) if sampler.do_sample else None
            drawn = sampler(logits, draw)
            vectors = quantizer.lookup(drawn)
            if smooth:
                vectors = self._average(sampler.filter(logits), draw, step, len(scales), quantizer.codebook())
            if known_ids is not None:
                known, given = known_mask[:, start:stop].to(device), known_ids[:, start:stop].to(device)
                vectors = torch.where(
                    known[..., None], quantizer.lookup(given.where(known, given.new_zeros(()))), vectors
                )
                drawn = torch.where(known, given, drawn)
            ids[:, start:stop] = drawn
            before, features = features, quantizer.accumulate(features, vectors, step, scales)
            done = step + 1
            if callback is not None:
                replacement = callback(step, ids[:, :stop], features)
                if replacement is not None:
                    ids[:, start:stop] = replacement[:, start:stop]
                    features = quantizer.accumulate(before, ids[:, start:stop], step, scales)
                wake(model)  # the callback may have decoded a preview, which swaps models under offloading
            start = stop
        return NextScaleOutput(ids, kept, done, done, features)

    def _average(self, logits: Tensor, noise: Tensor, step: int, steps: int, codebook: Tensor) -> Tensor:
        """Filtered logits and Exp(1) noise [B, n, V] -> averaged code vectors [B, n, C] (Gumbel softmax, 1611.01144)."""
        progress = step / (steps - 1) if steps > 1 else 1.0
        config = self.config
        temperature = max(config.smooth_temperature * (1 - config.smooth_decay * progress), config.smooth_floor)
        gumbel = -noise.clamp(min=torch.finfo(noise.dtype).tiny).log()
        return ((logits * (1 + progress) + gumbel) / temperature).softmax(-1) @ codebook


def _check(
    model: NextScaleModel,
    quantizer: MultiScaleQuantizer,
    condition: Tensor,
    null_condition: Tensor | None,
    guidance: Guidance | None,
    smooth: bool,
    sampler: Sampler,
) -> None:
    if quantizer.dim != model.code_dim or quantizer.codebook_size != model.vocab_size:
        raise ValueError(
            f"the tokenizer has {quantizer.codebook_size} codes of width {quantizer.dim}, the transformer was made for "
            f"{model.vocab_size} of width {model.code_dim}: they do not belong together"
        )
    if condition.dim() != 2 or condition.shape[1] != model.trunk.dim:
        raise ValueError(f"condition must be [batch, {model.trunk.dim}], got {tuple(condition.shape)}")
    if guidance is not None and guidance.active:
        if null_condition is None:
            raise ValueError(f"guidance with scale {guidance.scale} needs a null_condition")
        if null_condition.shape != condition.shape:
            raise ValueError(
                f"null_condition is {tuple(null_condition.shape)}, but condition is {tuple(condition.shape)}"
            )
    if smooth and not sampler.do_sample:
        raise ValueError("smooth sampling needs noise: use a sampler with do_sample=True")
