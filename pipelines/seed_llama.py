"""`SEEDLLaMAPipeline`: images and texts from one language model over semantic codes (SEED-LLaMA, Ge et al., arXiv 2310.01218)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.interleaved import InterleavedDecoding
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.seed import SEEDTokenizer
from tokenizers_visual.semantic import ImageCondition

from . import loading
from .bpe import BPETokenizer
from .conversation import IMAGE, conversation
from .interleaved import InterleavedPipeline
from .outputs import ARPipelineOutput
from .painting import PaintingPipeline, UnCLIPPainter

__all__ = ["DiffusionPipeline", "SEEDLLaMAPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.SEEDLLaMAPipeline.from_single_file(
        ...     "AILab-CVC/seed-llama-8b-sft", tokenizer="AILab-CVC/seed-tokenizer-2", config={"vision": "eva_vit_g.pth"}
        ... )
        >>> pipe.describe(image, "What is the animal doing?").texts[0]
        >>> pipe.load_image_decoder("stabilityai/stable-diffusion-2-1-unclip")
        >>> image = pipe("Generate an image of a dog on the beach.").images[0]
        ```
"""
# What is written before and behind a request, and behind an answer.
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "vicuna": ("USER: ", "\nASSISTANT:", "\n"),  # 8B
    "llama2": ("[INST] ", " [/INST]\n", "\n"),  # 14B
}
BEGIN, END, START, STOP = "<img>", "</img>", "<s>", "</s>"
_Resampling = PIL.Image.Resampling


class SEEDLLaMAPipeline(PaintingPipeline, InterleavedPipeline):
    """Describes images, converses in text and images, and draws: the model predicts codes, which an unCLIP model paints.

    Args:
        tokenizer (`SEEDTokenizer`): images -> codes -> embeddings of images.
        transformer (`AutoregressiveModel`): over one vocabulary of words and codes.
        decoding (`InterleavedDecoding`): the decoding strategy.
        text_tokenizer (`BPETokenizer`, *optional*): without it calls take ids instead of texts.
        image_block (`dict`): how images are written, see `armm.ImageBlock`.
        template (`str`): how requests are written, "vicuna" (8B) or "llama2" (14B).
        generation_config (`dict`, *optional*): settings of this checkpoint.

    Without an image decoder (`load_image_decoder`), images in answers are their `Codes`.
    """

    single_file_loader: ClassVar[str | None] = "armm.convert.seed"
    stop_names: ClassVar[dict[str, int]] = {STOP: 2}
    pad_id: ClassVar[int] = 0
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 1.0,
        "temperature": 1.0,
        "text_top_k": 50,
        "text_top_p": 0.5,
        "max_new_tokens": 512,
    }
    default_question: ClassVar[str] = f"{IMAGE}Please provide an accurate and concise description of the given image."

    def __init__(
        self,
        tokenizer: SEEDTokenizer,
        transformer: AutoregressiveModel,
        decoding: InterleavedDecoding,
        text_tokenizer: BPETokenizer | None = None,
        image_block: dict[str, Any] | None = None,
        template: str = "vicuna",
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(tokenizer, transformer, decoding, text_tokenizer, image_block, generation_config)  # type: ignore[arg-type]
        loading.check_choice(template, sorted(TEMPLATES), "`template`")
        number = tokenizer.config.num_tokens
        if self.block.grid != (1, number):
            raise ValueError(
                f"`image_block` must have the grid (1, {number}), the codes of `tokenizer`, got {self.block.grid}."
            )
        self.register_to_config(template=template)

    # ------------------------------------------------------------------ texts

    def encode_text(self, text: str, images: Sequence[list[int]] = ()) -> list[int]:
        """Ids of a text, `<|image|>` in it replaced by the blocks `images` in their order; images not mentioned come first.

        The text is encoded in one piece, since a word's ids depend on what stands before it.
        """
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, got {type(text).__name__}.")
        missing = len(images) - text.count(IMAGE)
        if missing < 0:
            raise ValueError(f"the text mentions {text.count(IMAGE)} images ({IMAGE}), but {len(images)} are given.")
        written = (IMAGE * missing + text).replace(IMAGE, BEGIN + END)
        ids: list[int] = []
        rest = list(images)
        for index in self.words().encode(written):
            if index == self.block.end and ids[-1:] == [self.block.begin] and rest:
                ids[-1:] = rest.pop(0)
            else:
                ids.append(index)
        return ids

    def write_request(self, text: str) -> str:
        """A request as the model was trained on it, from the start of a sequence to where it answers."""
        before, behind, _ = TEMPLATES[self.config.template]
        return f"{START}{before}{text}{behind}"

    def describe_prompt(self, image: list[int], question: str) -> list[int]:
        text = question if IMAGE in question else IMAGE + question
        return self.encode_text(self.write_request(text), [image])

    def encode_prompt(self, prompt: str) -> list[int]:
        """The ids of a request for an image."""
        return self.encode_text(self.write_request(prompt))

    def encode_turns(self, turns: Any) -> list[int]:
        before, behind, between = TEMPLATES[self.config.template]
        text, images = START, []
        for number, (said, shown) in enumerate(conversation(turns)):
            text += f"{said}{between}" if number % 2 else f"{before}{said}{behind}"
            images += [self.encode_image(image) for image in shown]
        return self.encode_text(text, images)

    def samplers(self, settings: Mapping[str, Any]) -> tuple[Sampler, Sampler]:
        sampler = Sampler(
            settings["temperature"] or 1.0,
            top_k=settings["text_top_k"],
            top_p=settings["text_top_p"],
            do_sample=settings["temperature"] > 0,
        )
        return sampler, sampler

    def continue_prompts(self, *arguments: Any, **options: Any) -> Any:
        generator = options.get("generator")
        self._painting_generator = generator if isinstance(generator, torch.Generator) else None
        return super().continue_prompts(*arguments, **options)

    def draw(
        self, prompts: Sequence[Sequence[int]], grid: tuple[int, int], settings: Mapping[str, Any], **options: Any
    ) -> Codes:
        codes = super().draw(prompts, grid, settings, **options)
        self._painting_generator = options.get("generator")
        return Codes(ids=codes.ids)  # in one row of meanings, not on a grid

    # ------------------------------------------------------------------ images

    def prepare_image(self, image: PIL.Image.Image) -> PIL.Image.Image:
        size = self.tokenizer.image_size
        return image.resize((size, size), _Resampling.BICUBIC)

    def condition(self, codes: Codes) -> ImageCondition:
        return self.tokenizer.condition(codes)

    def decode_image(self, codes: torch.Tensor, grid: tuple[int, int]) -> Any:
        """The picture of the codes of one image; their `Codes` where no image decoder is loaded."""
        found = Codes(ids=codes[None].to(self._execution_device))
        return found if self.image_decoder is None else self.decode_codes_to_images(found)[0]

    def load_image_decoder(self, source: Any = "stabilityai/stable-diffusion-2-1-unclip", **options: Any) -> None:
        """Loads the unCLIP model that paints images, from a hub id or a directory, onto the device of this pipeline.

        Args:
            options: of `StableUnCLIPImg2ImgPipeline.from_pretrained`, `torch_dtype` among them.
        """
        from diffusers import StableUnCLIPImg2ImgPipeline

        pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(source, **options)
        self.image_decoder = UnCLIPPainter(pipe.to(self._execution_device))

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Any = None,
        prompt_ids: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ARPipelineOutput | tuple:
        """Draws images.

        Args:
            prompt (`str` or `list[str]`): a request for an image. The answer is made to begin with one.
            guidance_scale (`float`, *optional*): guidance of the codes by the sequence before them; the authors use none (1).
            temperature (`float`, *optional*), top_k (`int`, *optional*, 0: off), top_p (`float`, *optional*, 1: off): of the draw of
                codes, as of words; temperature 0 takes the likeliest.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images of each prompt, next to each other.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each image; also of the painting.
            noise (*optional*): recorded noise in place of the generator, see `armm.NoiseSource`.
            prompt_ids (`list` or `torch.Tensor`, *optional*): whole prompts as ids, in place of `prompt`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"` through the image decoder, or `"latent"`
                (codes [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARPipelineOutput` rather than a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token.
            callback_on_step_end_tensor_inputs (`list`, *optional*): `"latents"`: the ids of the vocabulary so far.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images, and the codes if asked for.
        """
        self.check_output_type(output_type)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        settings = self.check_settings(
            guidance_scale=guidance_scale, temperature=temperature, text_top_k=top_k, text_top_p=top_p
        )
        rows = [
            self.encode_prompt(item) if isinstance(item, str) else item
            for item in self.check_prompts(prompt, prompt_ids)
        ]
        return self.generate(
            rows,
            self.block.grid,  # type: ignore[arg-type]
            settings,
            num_images_per_prompt=num_images_per_prompt,
            output_type=output_type,
            return_dict=return_dict,
            output_codes=output_codes,
            generator=generator,
            noise=noise,
            callback=callback_on_step_end,
            callback_names=callback_on_step_end_tensor_inputs,
        )
