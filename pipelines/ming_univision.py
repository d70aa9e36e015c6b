"""`MingUniVisionPipeline`: images from text, edited turn by turn, and text about images (Ming-UniVision, arXiv 2510.06590)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.condition import Condition
from armm.decoding.guidance import ContextGuidance
from armm.decoding.next_latent import NextLatentDecoding, NextLatentOutput
from armm.decoding.text import decode_text
from armm.multimodal_model import MultimodalModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.mingtok import MingTokTokenizer

from . import loading
from .arguments import grid_of_size, text_list
from .bpe import BPETokenizer
from .images import pictures
from .ming_prompts import SPECIAL_TOKENS, MingPrompt
from .ming_reading import MingReading
from .outputs import ARInterleavedOutput, ARPipelineOutput

__all__ = ["DiffusionPipeline", "MingUniVisionPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.MingUniVisionPipeline.from_single_file("inclusionAI/Ming-UniVision-16B-A3B", dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("A cat in a yellow raincoat").images[0]
        >>> image = pipe("Change the raincoat to red", image).images[0]
        >>> pipe.chat(image, "What does the cat wear?").texts[0]
        ```
"""


class MingUniVisionPipeline(MingReading):
    """Draws and edits (`pipe(prompt)`), reads (`pipe.chat(image, question)`) and converses in both (`pipe.converse(turns)`) with one
    language model, which predicts continuous tokens and reads what their tokenizer makes of them.

    Args:
        tokenizer (`MingTokTokenizer`): latents <-> images, and what is read of both.
        transformer (`MultimodalModel`): the language model with its projector and the head for latents.
        decoding (`NextLatentDecoding`): the decoding strategy of images.
        text_tokenizer (`BPETokenizer`, *optional*): for texts.
        special_ids (`dict`, *optional*): ids of `"begin_image"`, `"image"`, `"end_image"` and `"eos"`; taken from the text tokenizer where
            it has them.
        reading_size (`int`, *optional*): side in pixels of images that are read; twice that of images that are drawn.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    model_cpu_offload_seq = "transformer"
    # It is asked after every token, so it stays where the language model is.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["tokenizer"]
    _optional_components: ClassVar[list[str]] = ["text_tokenizer"]
    single_file_loader: ClassVar[str | None] = "armm.convert.ming_univision"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 3.0,
        "image_guidance_scale": 1.1,
        "temperature": 1.0,
        "num_inference_steps": 16,
        "max_new_tokens": 512,
    }

    def __init__(
        self,
        tokenizer: MingTokTokenizer,
        transformer: MultimodalModel,
        decoding: NextLatentDecoding,
        text_tokenizer: BPETokenizer | None = None,
        special_ids: dict[str, int] | None = None,
        reading_size: int | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if tokenizer is not None and transformer is not None:
            self._check_parts(tokenizer, transformer)
        self.register_modules(
            tokenizer=tokenizer, transformer=transformer, decoding=decoding, text_tokenizer=text_tokenizer
        )
        given = {name: int(value) for name, value in (special_ids or {}).items()}
        for name in given:
            loading.check_choice(name, sorted(SPECIAL_TOKENS), "`special_ids` key")
        found = (
            {}
            if text_tokenizer is None
            else {name: text_tokenizer.id_of(token) for name, token in SPECIAL_TOKENS.items()}
        )
        self.special_ids = {**given, **{name: index for name, index in found.items() if index is not None}}
        if reading_size is None and tokenizer is not None:
            reading_size = 2 * tokenizer.config.image_size
        elif tokenizer is not None and reading_size % tokenizer.downsample:  # type: ignore[operator]
            raise ValueError(f"`reading_size` must be a multiple of {tokenizer.downsample}, got {reading_size}.")
        self.register_to_config(special_ids=self.special_ids, reading_size=reading_size)
        self.register_generation_config(generation_config)

    @staticmethod
    def _check_parts(tokenizer: MingTokTokenizer, transformer: MultimodalModel) -> None:
        projector = transformer.feature_projection
        if not transformer.latent_channels or projector is None:
            raise ValueError(
                "`transformer` draws no latents or reads no features: it is not the language model of this pipeline."
            )
        ours, theirs = (
            (tokenizer.latent_channels, tokenizer.feature_dim),
            (transformer.latent_channels, projector.in_dim),
        )
        if ours != theirs:
            raise ValueError(
                f"`tokenizer` has latents and features of width {ours}, `transformer` draws and reads {theirs}: these components do not "
                "belong together."
            )

    def fuse_projections(self) -> None:
        super().fuse_projections()
        if getattr(self, "tokenizer", None) is not None and not self.tokenizer.training:
            self.tokenizer.fuse_projections()

    def unfuse_projections(self) -> None:
        super().unfuse_projections()
        self.tokenizer.unfuse_projections()

    # ------------------------------------------------------------------ drawing

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        messages: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple:
        r"""Draws images, or edits some.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            prompt (`str` or `list[str]`): what to draw, or how to edit; prompts of different lengths go in one batch.
            image (*optional*): to be edited: an image in any form (see `pictures`) for all prompts, or a list with one for each.
            height (`int`, *optional*), width (`int`, *optional*): in pixels; the models were trained at one size only.
            guidance_scale (`float`, *optional*): how strongly the text is followed.
            image_guidance_scale (`float`, *optional*): how strongly images in the prompt are followed; without any it has no effect.
            num_inference_steps (`int`, *optional*): steps of the flow of each token.
            temperature (`float`, *optional*): scale of the noise that each token begins as.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each prompt.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            noise (`list[torch.Tensor]`, *optional*): recorded normal noise [B, 1, C] for each token, in place of the generator.
            messages (`list`, *optional*): a conversation in turns, see `chat`, in place of `prompt` and `image`: what it ends with is
                drawn, after all that was said and shown before, and guidance is towards its last turn.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (latents [B, N, C]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token;
                it may return replaced tensors, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the latents so far.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        grid = self.grid_of(height, width)
        settings = self.check_settings(guidance_scale, image_guidance_scale, num_inference_steps, temperature)
        prompts = self.drawing_prompts(prompt, image, messages)
        self.check_generator(generator, len(prompts) * num_images_per_prompt)
        self._guidance_scale, self._interrupt = float(settings["guidance_scale"]), False
        guidance = self.guidance_of(prompts, settings)
        condition, views = self.conditions(prompts, draw=True), self.views(prompts, guidance)
        self._num_timesteps = grid[0] * grid[1]
        with self.progress_bar(total=self._num_timesteps) as bar:
            output = self.draw(
                condition.repeat(num_images_per_prompt),
                [view.repeat_interleave(num_images_per_prompt, 0) for view in views],
                grid,
                settings,
                guidance=guidance,
                noise=generator if noise is None else noise,
                callback=self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs),
            )
        codes = Codes(latents=output.latents, grid=(1, *grid))
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)

    def draw(
        self,
        condition: Condition,
        views: Sequence[torch.Tensor],
        grid: tuple[int, int],
        settings: dict[str, Any],
        *,
        guidance: ContextGuidance | None = None,
        **options: Any,
    ) -> NextLatentOutput:
        """An image of `grid` tokens behind each row of `condition`; `views` as from `self.views`.

        Args:
            settings: `num_inference_steps` and `temperature`.
            options: of `NextLatentDecoding`.
        """
        tokens = grid[0] * grid[1]
        # What the tokenizer remembers of the tokens of this call.
        cache = self.tokenizer.allocate_cache(condition.batch, tokens)
        return self.decoding(
            self.transformer,
            condition,
            views,
            num_tokens=tokens,
            read=partial(self.tokenizer.read, cache=cache),
            num_steps=settings["num_inference_steps"],
            temperature=settings["temperature"],
            guidance=guidance,
            interrupt=lambda: self._interrupt,
            **options,
        )

    def guidance_of(self, prompts: Sequence[MingPrompt], settings: dict[str, Any]) -> ContextGuidance:
        """The guidance of images drawn after `prompts`: with a row for images where the last request of one of them shows some."""
        shown = any(self.special_ids.get("image") in prompt.ids[slice(*prompt.request)] for prompt in prompts)
        return ContextGuidance(self._guidance_scale, float(settings["image_guidance_scale"]) if shown else None)

    def views(self, prompts: Sequence[MingPrompt], guidance: ContextGuidance) -> list[torch.Tensor]:
        """What each row of the guidance besides the full one sees of `prompts`, bool [B, T], padded on the left."""
        images = [self.special_ids[name] for name in ("begin_image", "image", "end_image") if name in self.special_ids]
        length = max(len(prompt.ids) for prompt in prompts)
        views = []
        for view in guidance.views:
            rows = [prompt.seen(images if view == "images" else ()) for prompt in prompts]
            padded = [[False] * (length - len(row)) + row for row in rows]
            views.append(torch.tensor(padded, device=self._execution_device))
        return views

    def grid_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The tokens of an image of `height` x `width` pixels, by default the checkpoint's own."""
        return grid_of_size(height, width, self.transformer.grid, self.tokenizer.downsample)

    def check_settings(
        self,
        guidance_scale: Any = None,
        image_guidance_scale: Any = None,
        num_inference_steps: Any = None,
        temperature: Any = None,
    ) -> dict[str, Any]:
        """The settings of drawing, with this checkpoint's where an argument is None."""
        return super().check_settings(
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            num_inference_steps=num_inference_steps,
            temperature=temperature,
        )

    def drawing_prompts(self, prompt: Any, image: Any, messages: Any) -> list[MingPrompt]:
        """What images are drawn after."""
        if (prompt is None) == (messages is None):
            raise ValueError("give either `prompt` or `messages`.")
        if messages is not None:
            if image is not None:
                raise ValueError("`messages` hold their images: leave `image` out.")
            return [self.prompt(messages, draw=True)]
        texts = text_list(prompt, "prompt")
        if not all(text.strip() for text in texts):
            raise ValueError("`prompt` is empty: say what to draw.")
        shown = [] if image is None else pictures(image)
        if len(shown) == 1:
            shown = shown * len(texts)
        if shown and len(shown) != len(texts):
            raise ValueError(
                f"`image` holds {len(shown)} images for {len(texts)} prompts: give one, or one for each prompt."
            )
        return [self.prompt([[*shown[row : row + 1], text]], draw=True) for row, text in enumerate(texts)]

    # ------------------------------------------------------------------ conversing

    @torch.no_grad()
    def converse(
        self,
        messages: Any,
        *,
        max_new_tokens: int | None = None,
        text_temperature: float = 0.0,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        max_images: int = 4,
        generator: torch.Generator | None = None,
    ) -> ARInterleavedOutput:
        """Answers a conversation in words and images: where the model begins an image, it is drawn, and the model goes on.

        Args:
            messages (`list`): turns of user and model, see `chat`.
            max_new_tokens (`int`, *optional*): most words of the answer, images not counted.
            text_temperature (`float`, *optional*, defaults to 0): of the words; 0 says the likeliest.
            guidance_scale, image_guidance_scale, num_inference_steps, temperature: of the images, see `__call__`.
            max_images (`int`, *optional*, defaults to 4): the answer ends behind so many images.
            generator (`torch.Generator`, *optional*): randomness.

        Returns:
            [`ARInterleavedOutput`]: the texts and images of the answer in order.
        """
        settings = self.check_settings(guidance_scale, image_guidance_scale, num_inference_steps, temperature)
        self.check_number("max_images", max_images, low=1, integer=True)
        sampler = self.check_text_sampling(text_temperature, 0, 1.0)
        self.check_generator(generator, 1)
        prompt = self.prompt(messages, draw=True)
        prompt.ids.pop()  # the model begins its images by itself
        self._guidance_scale, self._interrupt = float(settings["guidance_scale"]), False
        guidance = self.guidance_of([prompt], settings)
        condition, views = self.conditions([prompt], draw=True), self.views([prompt], guidance)
        grid, begin = self.transformer.grid, self.special("begin_image")
        left = self.setting("max_new_tokens", max_new_tokens)
        self.check_number("max_new_tokens", left, low=1, integer=True)
        contents: list[Any] = []
        drawn = 0
        while left and drawn < max_images:
            output = decode_text(
                self.transformer, condition, stop_id=self.stop_id, max_tokens=left, last_ids=[begin], sampler=sampler, noise=generator,
                vocabulary=self.text_range, interrupt=lambda: self._interrupt, check_every=1,
            )  # fmt: skip
            ids = output.tokens()[0]
            left -= len(ids)
            begun = ids[-1:] == [begin]
            text = self.decode_words(ids[:-1] if begun else ids)
            contents += [text] if text.strip() else []
            if not begun:
                break
            condition = self._extend(
                condition, self.transformer.embed(torch.tensor([ids], device=self._execution_device))
            )
            views = [torch.nn.functional.pad(view, (0, len(ids)), value=True) for view in views]
            image = self.draw(condition, views, grid, settings, guidance=guidance, noise=generator)
            contents += self.pixels_to_images(self.tokenizer.decode_features(image.features, grid), "pil")
            drawn += 1
            condition = self._extend(condition, self.transformer.embed_features(image.features))
            views = [torch.nn.functional.pad(view, (0, grid[0] * grid[1]), value=True) for view in views]
        self.maybe_free_model_hooks()
        return ARInterleavedOutput(contents=[contents])

    @staticmethod
    def _extend(condition: Condition, embeds: torch.Tensor) -> Condition:
        """`condition` followed by tokens [1, n, D]."""
        first = condition.length
        return condition.extend(embeds, torch.arange(first, first + embeds.shape[1], device=embeds.device))
