"""Prompts through a T5 encoder, as text features aligned to the right: what LlamaGen's text models are conditioned on."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .base import ARPipeline
from .captions import clean_caption

__all__ = ["DiffusionPipeline", "T5PromptPipeline", "align_right"]

logger = logging.getLogger(__name__)


class T5PromptPipeline(ARPipeline):
    """Base of pipelines with the components `transformer` (a caption condition), `text_encoder` and `text_tokenizer`."""

    transformer: Any
    text_encoder: Any
    text_tokenizer: Any

    @staticmethod
    def load_text_encoder(repo_id: str, *, dtype: Any = None, **options: Any) -> dict[str, Any]:
        """The components for prompts from the T5 model `repo_id`; none (and a warning) where transformers is not installed."""
        if importlib.util.find_spec("transformers") is None:
            logger.warning(
                "transformers is not installed: give `prompt_embeds` instead of prompts, or `pip install armm[transformers]`"
            )
            return {"text_encoder": None, "text_tokenizer": None}
        from transformers import AutoTokenizer, T5EncoderModel

        if isinstance(dtype, dict):
            dtype = dtype.get("text_encoder", dtype.get("default"))
        return {
            "text_encoder": T5EncoderModel.from_pretrained(repo_id, dtype=dtype or torch.float32, **options),
            "text_tokenizer": AutoTokenizer.from_pretrained(repo_id, **options),
        }

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        device: torch.device | None = None,
        clean_prompt: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The text features [B, T, C] the transformer is conditioned on and their mask [B, T], aligned to the right.

        Args:
            prompt (`str` or `list`): encoded with the text encoder, padded and cut to T tokens.
            prompt_embeds (`torch.Tensor`): features given instead, [B, up to T, C]; without a mask they must fill all T slots.
            prompt_attention_mask (`torch.Tensor`): [B, up to T], 1 where a feature is real.
            clean_prompt (`bool`): clean prompts as the authors do.
        """
        device = device or self._execution_device
        embedding = self.transformer.condition_embedding
        slots = embedding.num_tokens
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            if self.text_encoder is None or self.text_tokenizer is None:
                raise ValueError(
                    "this pipeline has no text encoder: pass `text_encoder` and `text_tokenizer` (google/flan-t5-xl for the published "
                    "models; `LlamaGenPipeline.load_text_encoder` loads them), or give `prompt_embeds` and `prompt_attention_mask`."
                )
            if self.setting("clean_prompt", clean_prompt):
                prompts = [clean_caption(clean_caption(text)) for text in prompts]
            tokens = self.text_tokenizer(
                prompts,
                max_length=slots,
                padding="max_length",
                truncation=True,
                return_attention_mask=True,
                add_special_tokens=True,
                return_tensors="pt",
            )
            prompt_attention_mask = tokens.attention_mask.to(device)
            prompt_embeds = self.text_encoder(tokens.input_ids.to(device), attention_mask=prompt_attention_mask)[0]
        elif prompt_embeds.dim() != 3 or prompt_embeds.shape[-1] != embedding.in_dim or prompt_embeds.shape[1] > slots:
            raise ValueError(
                f"`prompt_embeds` must be [batch, up to {slots}, {embedding.in_dim}] for this transformer, got "
                f"{tuple(prompt_embeds.shape)}."
            )
        if prompt_attention_mask is None:
            if prompt_embeds.shape[1] != slots:
                raise ValueError(
                    f"`prompt_embeds` of {prompt_embeds.shape[1]} tokens need a `prompt_attention_mask`; without one they must fill "
                    f"all {slots} slots."
                )
            return prompt_embeds.to(device), None
        if tuple(prompt_attention_mask.shape) != tuple(prompt_embeds.shape[:2]):
            raise ValueError(
                f"`prompt_attention_mask` must be {tuple(prompt_embeds.shape[:2])} as `prompt_embeds`, got "
                f"{tuple(prompt_attention_mask.shape)}."
            )
        return align_right(prompt_embeds.to(device), prompt_attention_mask.to(device), slots)


def align_right(features: torch.Tensor, mask: torch.Tensor, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the real features of each row to the end of `slots` slots and zeroes the rest: the form the models were trained on.

    Args:
        features: [B, T, C], T <= slots. mask: [B, T], non-zero where real. Rows keep the order of their real features, so that
            aligned input comes back unchanged.

    Returns: features [B, slots, C] and the mask int64 [B, slots].
    """
    mask = mask != 0
    missing = slots - mask.shape[1]
    if missing:
        features = torch.cat([features.new_zeros(features.shape[0], missing, features.shape[2]), features], dim=1)
        mask = torch.cat([mask.new_zeros(mask.shape[0], missing), mask], dim=1)
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    mask = mask.gather(1, order)
    features = features.gather(1, order[:, :, None].expand_as(features))
    return features * mask[:, :, None].to(features.dtype), mask.long()
