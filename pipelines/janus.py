"""`JanusPipeline`: images from text, and text about images (Janus, arXiv 2410.13848; Janus-Pro, arXiv 2501.17811)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.condition import Condition
from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.multimodal_model import MultimodalModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.vision_encoder import VisionEncoder
from tokenizers_visual.vq_tokenizer import VQTokenizer

from . import loading
from .arguments import check_noise, grid_of_size, text_list
from .chat import TEMPLATES
from .janus_reading import SPECIAL_TOKENS, JanusReading, id_rows
from .outputs import ARPipelineOutput

__all__ = ["DiffusionPipeline", "JanusPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.JanusPipeline.from_single_file("deepseek-ai/Janus-Pro-1B")
        >>> image = pipe("A stunning princess from Kabul in red and white traditional clothing").images[0]
        >>> pipe.chat(image, "What is she wearing?").texts[0]
        >>> for piece in pipe.stream_chat(image, "Describe the picture."):
        ...     print(piece, end="", flush=True)
        ```
"""


class JanusPipeline(JanusReading):
    """Draws (`pipe(prompt)`) and reads (`pipe.chat(image, question)`) with one language model.

    Args:
        tokenizer (`VQTokenizer`): codes <-> images that are drawn.
        transformer (`MultimodalModel`): the language model with its projectors and heads.
        image_encoder (`VisionEncoder`): the eye for images that are read.
        decoding (`NextTokenDecoding`): the decoding strategy of images.
        text_tokenizer (`PreTrainedTokenizerFast`, *optional*): for texts; without it calls take `prompt_ids`.
        special_ids (`dict`, *optional*): ids of `"bos"`, `"eos"`, `"pad"`, `"image"`, `"begin_image"`, `"end_image"`; taken from the
            text tokenizer where it has them.
        template (`str`, *optional*): how conversations are written, a key of `TEMPLATES`: "deepseek" for Janus-Pro.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    model_cpu_offload_seq = "image_encoder->transformer->tokenizer"
    _optional_components: ClassVar[list[str]] = ["text_tokenizer"]
    single_file_loader: ClassVar[str | None] = "armm.convert.janus"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 5.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "do_sample": True,
        "max_new_tokens": 512,
    }

    def __init__(
        self,
        tokenizer: VQTokenizer,
        transformer: MultimodalModel,
        image_encoder: VisionEncoder,
        decoding: NextTokenDecoding,
        text_tokenizer: Any = None,
        special_ids: dict[str, int] | None = None,
        template: str = "deepseek",
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if tokenizer is not None and transformer is not None and tokenizer.codebook_size != transformer.num_codes:
            raise ValueError(
                f"`tokenizer` has {tokenizer.codebook_size} codes, `transformer` draws {transformer.num_codes}: these components do "
                "not belong together."
            )
        loading.check_choice(template, sorted(TEMPLATES), "`template`")
        self.register_modules(
            tokenizer=tokenizer,
            transformer=transformer,
            image_encoder=image_encoder,
            decoding=decoding,
            text_tokenizer=text_tokenizer,
        )
        given = {name: int(value) for name, value in (special_ids or {}).items()}
        for name in given:
            loading.check_choice(name, sorted(SPECIAL_TOKENS), "`special_ids` key")
        self.special_ids = {**_special_ids(text_tokenizer), **given}
        missing = sorted(set(SPECIAL_TOKENS) - set(self.special_ids))
        if missing:
            raise ValueError(
                f"`special_ids` lacks {', '.join(missing)}, and no `text_tokenizer` has them: give their ids."
            )
        self.register_to_config(special_ids=self.special_ids, template=template)
        self.register_generation_config(generation_config)

    # ------------------------------------------------------------------ drawing

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        prompt_ids: Sequence[int] | Sequence[Sequence[int]] | torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple:
        r"""Draws images.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            prompt (`str` or `list[str]`): what to draw; prompts of different lengths go in one batch.
            height (`int`, *optional*), width (`int`, *optional*): in pixels; the models were trained at one size only.
            guidance_scale (`float`, *optional*): classifier-free guidance; up to 1 only the condition is run.
            temperature (`float`, *optional*), top_k (`int`, *optional*, 0: off), top_p (`float`, *optional*, 1: off): the
                sampling filters, applied in this order.
            do_sample (`bool`, *optional*): False takes the most likely code.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each prompt.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            noise (`torch.Tensor`, *optional*): recorded exponential noise [B, N, codes] that replaces the generator.
            prompt_ids (`list` or `torch.Tensor`, *optional*): ids in place of `prompt`, up to begin-of-image.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (codes [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each code;
                it may return replaced tensors, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the codes so far.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images (and the codes, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        grid = self.grid_of(height, width)
        scale, sampler = self.check_sampling(
            guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, do_sample=do_sample
        )
        rows = self.drawing_rows(prompt, prompt_ids)
        batch = len(rows) * num_images_per_prompt
        self.check_generator(generator, batch)
        expected = (batch, grid[0] * grid[1], self.transformer.num_codes)
        check_noise(noise, expected, "batch, tokens, codes")

        self._guidance_scale, self._interrupt = scale, False
        guidance = Guidance(self._guidance_scale)
        condition, null = self.drawing_conditions(rows)
        self._num_timesteps = self.decoding.num_calls(grid)
        with self.progress_bar(total=self._num_timesteps) as bar:
            watch = self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs)
            output = self.decoding(
                self.transformer,
                condition.repeat(num_images_per_prompt),
                null.repeat(num_images_per_prompt) if guidance.active else None,
                grid,
                sampler=sampler,
                guidance=guidance,
                noise=generator if noise is None else noise,
                vocabulary=self.transformer.code_range,
                callback=watch,
                interrupt=lambda: self._interrupt,
            )
        codes = Codes(ids=output.ids, grid=(1, *grid))
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)

    def grid_of(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The codes of an image of `height` x `width` pixels, by default the checkpoint's own."""
        return grid_of_size(height, width, self.transformer.grid, self.tokenizer.downsample, "code")

    def drawing_rows(self, prompt: Any, prompt_ids: Any) -> list[list[int]]:
        """Ids of what images are drawn after, each up to begin-of-image."""
        if (prompt is None) == (prompt_ids is None):
            raise ValueError("give either `prompt` or `prompt_ids`.")
        if prompt_ids is not None:
            return [self.check_row(row) for row in id_rows(prompt_ids)]
        prompts = text_list(prompt, "prompt")
        if not all(text.strip() for text in prompts):
            raise ValueError("`prompt` is empty: say what to draw.")
        turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": ""}] for text in prompts]
        begin = self.special_ids["begin_image"]
        return [self.check_row([*self.encode_words(self.format(messages)), begin]) for messages in turns]

    def drawing_conditions(self, rows: Sequence[Sequence[int]]) -> tuple[Condition, Condition]:
        """What images are drawn after, with and without the prompt: in the latter all but the first and the last id are padding,
        which is looked at like any other token."""
        pad = self.special_ids["pad"]
        ids, real = self.pad(rows)
        null, _ = self.pad([[row[0], *[pad] * (len(row) - 2), row[-1]] for row in rows])
        return self.transformer.prompt_condition(ids, real), self.transformer.prompt_condition(null, real)


def _special_ids(text_tokenizer: Any) -> dict[str, int]:
    if text_tokenizer is None:
        return {}
    vocabulary = text_tokenizer.get_vocab()
    return {name: vocabulary[token] for name, token in SPECIAL_TOKENS.items() if token in vocabulary}
