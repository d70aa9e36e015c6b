"""What the pipelines of the Chameleon family say: texts about images, and conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline

from armm.condition import Condition
from armm.decoding.base import wake
from armm.decoding.cautious import PAUSES, CautiousSampler, decode_text_cautiously
from armm.decoding.vocabulary import Grammar

from .conversation import IMAGE
from .interleaved_base import InterleavedBase
from .outputs import ARInterleavedOutput, ARTextOutput

__all__ = ["DiffusionPipeline", "IMAGE", "InterleavedPipeline"]


class InterleavedPipeline(InterleavedBase):
    """Base of the pipelines of one model that reads and writes text and images in one sequence: `describe` and `converse`."""

    default_question: ClassVar[str] = f"Describe the image in detail. {IMAGE}"

    def write_texts(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Mapping[str, Any],
        max_new_tokens: int,
        *,
        cautious: bool = False,
        generator: Any = None,
        **options: Any,
    ) -> list[str]:
        """The text that follows each prompt. cautious: by `CautiousSampler`."""
        if not cautious:
            output = self.continue_prompts(
                prompts, settings, max_new_tokens, images=False, stop_ids=self.stop_ids, generator=generator, **options
            )
            rows = output.tokens()
        else:
            rows = self._write_cautiously(prompts, settings, max_new_tokens, generator)
        stops = set(self.stop_ids)
        return [self.words().decode([index for index in row if index not in stops]) for row in rows]

    def _write_cautiously(
        self, prompts: Sequence[Sequence[int]], settings: Mapping[str, Any], max_new_tokens: int, generator: Any
    ) -> list[list[int]]:
        self.check_generator(generator, len(prompts))
        self._interrupt = False
        model, words = self.transformer, self.words()
        text, _ = self.samplers(settings)
        pauses = {ids[0] for pause in PAUSES if (ids := words.encode(pause))}
        sampler = CautiousSampler(
            temperature=text.temperature, top_k=text.top_k, top_p=text.top_p, pause_ids=tuple(sorted(pauses))
        )
        wake(model)
        ids, mask = self.pad(prompts)
        room = self.check_room(ids)
        real = torch.ones_like(ids) if mask is None else mask.long()
        index = (real.cumsum(1) - 1).clamp(min=0)
        grammar = Grammar(self.block, model.vocab_size, images=False, banned=[self.block.begin, self.block.end])
        output = decode_text_cautiously(
            model,
            Condition(model.embed(ids), mask, index),
            stop_ids=self.stop_ids,
            max_tokens=min(max_new_tokens, room),
            sampler=sampler,
            noise=generator,
            allowed=grammar.table[0].to(ids.device),
            interrupt=lambda: self._interrupt,
        )
        return output.tokens()

    # ------------------------------------------------------------------ reading and talking

    def describe_prompt(self, image: list[int], question: str) -> list[int]:
        """The prompt that asks `question` about an image, given as ids."""
        return [self.start_id, *self.encode_text(question, [image]), self.turn_id]

    @torch.no_grad()
    def describe(
        self,
        image: Any,
        question: str | Sequence[str] | None = None,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        text_top_k: int | None = None,
        text_top_p: float | None = None,
        cautious: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARTextOutput | tuple:
        """Answers questions about images.

        Args:
            image: a PIL image, an array [H, W, 3], a tensor [3, H, W], or a list of them.
            question (`str` or `list`, *optional*): one for all images or one for each; `<|image|>` says where the image stands,
                by default before the question. Without it the images are described.
            max_new_tokens (`int`, *optional*, defaults to 512): longest answer.
            temperature, text_top_k, text_top_p (*optional*): of the draw of words; where the family has them.
            cautious (`bool`, *optional*, defaults to `False`): cautious next-token sampling, see `armm.CautiousSampler`; slower.
            generator, return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: as in a call; there are no callbacks with
                `cautious`.

        Returns:
            [`ARTextOutput`] or `tuple`: one text for each image.
        """
        pictures = list(image) if isinstance(image, (list, tuple)) else [image]
        asked = self.default_question if question is None else question
        questions = [asked] * len(pictures) if isinstance(asked, str) else list(asked)
        if not pictures or len(questions) != len(pictures):
            raise ValueError(
                f"`question` holds {len(questions)} questions for {len(pictures)} images: give one for each."
            )
        self.check_number("max_new_tokens", max_new_tokens, low=1, integer=True)
        settings = self.check_settings(**self.text_settings(temperature, text_top_k, text_top_p))
        self._guidance_scale = 1.0
        prompts = [
            self.describe_prompt(self.encode_image(item), text) for item, text in zip(pictures, questions, strict=True)
        ]
        watch: dict[str, Any] = {}
        if cautious and callback_on_step_end is not None:
            raise ValueError(
                "`callback_on_step_end` does not go with `cautious`, which looks ahead before it says a token."
            )
        if not cautious:
            watch = {"callback": callback_on_step_end, "callback_names": callback_on_step_end_tensor_inputs}
        texts = self.write_texts(prompts, settings, max_new_tokens, cautious=cautious, generator=generator, **watch)
        self.maybe_free_model_hooks()
        return ARTextOutput(texts=texts) if return_dict else (texts,)

    def ask(self, image: Any, question: Any = None, **options: Any) -> ARTextOutput:
        """`describe`, by the name that all pipelines share that read; several questions may be about one image."""
        several = isinstance(question, (list, tuple)) and not isinstance(image, (list, tuple))
        return self.describe([image] * len(question) if several else image, question, **options)  # type: ignore[return-value]

    def text_settings(self, temperature: float | None, top_k: int | None, top_p: float | None) -> dict[str, Any]:
        """The settings of this family that `temperature`, `text_top_k` and `text_top_p` stand for."""
        named = {"temperature": temperature, "text_top_k": top_k, "text_top_p": top_p}
        unknown = [name for name, value in named.items() if value is not None and name not in self.generation_settings]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no settings {unknown}; it has {sorted(self.generation_settings)}."
            )
        return {name: value for name, value in named.items() if value is not None}

    @torch.no_grad()
    def converse(
        self,
        turns: Sequence[Any],
        max_new_tokens: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_answers: int = 1,
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARInterleavedOutput | tuple:
        """Continues a conversation with text and images in any order.

        Args:
            turns (`list`): each a text, an image, a list of both, or a dict with such "content"; you speak first, the model next.
            max_new_tokens (`int`, *optional*): longest answer in tokens, images included.
            guidance_scale (`float`, *optional*): of the images.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each answer.
            num_answers (`int`, *optional*, defaults to 1): how many answers to draw.
            return_dict, callback_on_step_end, callback_on_step_end_tensor_inputs: as in a call.

        Returns:
            [`ARInterleavedOutput`] or `tuple`: the contents of each answer.
        """
        self.check_number("num_answers", num_answers, low=1, integer=True)
        settings = self.check_settings(guidance_scale=guidance_scale, max_new_tokens=max_new_tokens)
        self._guidance_scale = settings["guidance_scale"]
        prompts = [self.encode_turns(turns)] * num_answers
        output = self.continue_prompts(
            prompts,
            settings,
            settings["max_new_tokens"],
            stop_ids=self.stop_ids,
            generator=generator,
            callback=callback_on_step_end,
            callback_names=callback_on_step_end_tensor_inputs,
        )
        contents = [self.decode_contents(row) for row in output.tokens()]
        self.maybe_free_model_hooks()
        return ARInterleavedOutput(contents=contents) if return_dict else (contents,)
