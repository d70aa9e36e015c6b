"""`LaVITPipeline`: images and texts from one language model over a varying number of codes (LaVIT, Jin et al., arXiv 2309.04669)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring

from armm.decoding.beam import BeamSearch
from armm.decoding.guidance import Guidance
from armm.decoding.text import decode_text
from armm.hub import fetch_snapshot
from armm.multimodal_model import MultimodalModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.lavit import LaVITTokenizer
from tokenizers_visual.lavit_decoder import LaVITDecoder
from tokenizers_visual.semantic import ImageCondition

from .arguments import text_list
from .bpe import BPETokenizer
from .conversation import picture
from .crops import on_white, to_pixels
from .outputs import ARPipelineOutput, ARTextOutput
from .painting import PaintingPipeline, StableDiffusionPainter, XLPainter
from .understanding import Reading, UnderstandingPipeline

__all__ = ["DiffusionPipeline", "LaVITPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.LaVITPipeline.from_single_file("rain1011/LaVIT-7B-v2")
        >>> pipe.describe(image, search=armm.BeamSearch(num_beams=2)).texts[0]
        >>> pipe.load_image_decoder("rain1011/LaVIT-7B-v2")
        >>> image = pipe("a photo of an astronaut riding a horse in the forest").images[0]
        ```
"""
START, STOP = "<s>", "</s>"
_Resampling = PIL.Image.Resampling


class LaVITPipeline(PaintingPipeline, UnderstandingPipeline):
    """Describes images, of which it reads features, and draws: it predicts as many codes as an image needs.

    Args:
        tokenizer (`LaVITTokenizer`): images -> codes, and features of images.
        transformer (`MultimodalModel`): over one vocabulary: words, begin of image, end of image, codes.
        decoder (`LaVITDecoder`, *optional*): codes -> what a diffusion model paints from.
        text_tokenizer (`BPETokenizer`, *optional*): without it calls take ids instead of texts.
        begin_image (`int`, *optional*): the id that begins an image; the next ones are its end and the codes. None: such that the codes
            are the last ids of the vocabulary.
        generation_config (`dict`, *optional*): settings of this checkpoint; `sample_tokens` says whether it is drawn which patches of
            an image that is read are kept, as by the authors, or the likelier ones are.
    """

    model_cpu_offload_seq = "tokenizer->transformer->decoder"
    _optional_components: ClassVar[list[str]] = ["decoder", "text_tokenizer"]
    single_file_loader: ClassVar[str | None] = "armm.convert.lavit"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 4.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "min_image_tokens": 20,
        "max_image_tokens": 200,
        "max_new_tokens": 128,
        "sample_tokens": False,
    }

    def __init__(
        self,
        tokenizer: LaVITTokenizer,
        transformer: MultimodalModel,
        decoder: LaVITDecoder | None = None,
        text_tokenizer: BPETokenizer | None = None,
        begin_image: int | None = None,
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        size, words = tokenizer.codebook_size, transformer.text_vocab_size
        begin_image = words - size - 2 if begin_image is None else begin_image
        if begin_image < 1 or begin_image + 2 + size > words:
            raise ValueError(
                f"`transformer` has {words} ids, which cannot hold {size} codes behind begin and end of image at {begin_image} and "
                f"{begin_image + 1}: these components do not belong together."
            )
        width = tokenizer.config.reading_dim
        if width is not None and width != transformer.trunk.dim:
            raise ValueError(
                f"`tokenizer` makes features {width} wide, `transformer` has tokens {transformer.trunk.dim} wide."
            )
        if decoder is not None and decoder.config.code_dim != tokenizer.latent_channels:
            raise ValueError(
                f"`decoder` takes codes {decoder.config.code_dim} wide, those of `tokenizer` are {tokenizer.latent_channels}."
            )
        self.register_modules(
            tokenizer=tokenizer, transformer=transformer, decoder=decoder, text_tokenizer=text_tokenizer
        )
        self.begin_image, self.end_image, self.first_code = begin_image, begin_image + 1, begin_image + 2
        self.register_to_config(begin_image=begin_image)
        self.register_generation_config(generation_config)

    # ------------------------------------------------------------------ texts

    def words(self) -> BPETokenizer:
        """The text tokenizer; a ValueError where there is none."""
        if self.text_tokenizer is None:
            raise ValueError(
                "this pipeline has no text tokenizer: pass `text_tokenizer=` when loading, or ids instead of texts."
            )
        return self.text_tokenizer

    def special_id(self, name: str, released: int) -> int:
        found = None if self.text_tokenizer is None else self.text_tokenizer.id_of(name)
        return released if found is None else found

    @property
    def start_id(self) -> int:
        """The id that every sequence begins with."""
        return self.special_id(START, 1)

    @property
    def stop_id(self) -> int:
        return self.special_id(STOP, 2)

    @property
    def text_range(self) -> tuple[int, int]:
        return 0, self.begin_image

    def decode_words(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids)) if self.text_tokenizer is None else self.text_tokenizer.decode(ids)

    def text_rows(self, texts: Any, ids: Any, name: str) -> list[list[int]]:
        """Ids of texts, or those that were given in their place."""
        if (texts is None) == (ids is None):
            raise ValueError(f"give either `{name}` or `prompt_ids`.")
        if ids is not None:
            rows = ids.tolist() if isinstance(ids, torch.Tensor) else list(ids)
            rows = [list(row) for row in ([rows] if rows and isinstance(rows[0], int) else rows)]
            if not rows or not all(0 <= value < self.begin_image for row in rows for value in row):
                raise ValueError(f"`prompt_ids` must be lists of ids of words, 0 .. {self.begin_image - 1}.")
            return rows
        return [self.words().encode(text) if text else [] for text in text_list(texts, name)]

    # ------------------------------------------------------------------ images

    def seen(self, image: Any) -> PIL.Image.Image:
        size = self.tokenizer.image_size
        return on_white(picture(image)).resize((size, size), _Resampling.BICUBIC)

    def preprocess(self, image: Any) -> torch.Tensor:
        """A PIL image, an array or a tensor as pixels [1, 3, S, S] in [-1, 1]; proportions are not kept."""
        weight = self.tokenizer.quant_proj[0].weight
        return to_pixels(self.seen(image)).to(self._execution_device, weight.dtype)

    @torch.no_grad()
    def encode_image(self, image: Any, *, sample_tokens: bool | None = None, generator: Any = None) -> Codes:
        """The codes of one image, or of a list of them."""
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        pixels = torch.cat([self.preprocess(item) for item in images])
        sample = self.setting("sample_tokens", sample_tokens)
        return self.tokenizer.encode(pixels, sample=sample, generator=generator)

    def condition(self, codes: Codes) -> ImageCondition:
        if self.decoder is None:
            raise ValueError(
                "this pipeline has no `decoder`: pass a LaVITDecoder (tokenizer_decoder.bin or highres_tokenizer_decoder.bin)."
            )
        return self.decoder(self.tokenizer.embed(codes), codes.mask)

    def load_image_decoder(self, source: Any = "rain1011/LaVIT-7B-v2", **options: Any) -> None:
        """Loads the diffusion model that paints what `decoder` makes, onto the device of this pipeline.

        Args:
            source: the authors' folder or its hub id; `highres_pixel_decoding` (SDXL) or `pixel_decoding` (Stable Diffusion 1.5) in it
                are read.
            options: of the models' `from_pretrained`, `torch_dtype` among them.
        """
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

        if self.decoder is None:
            raise ValueError("without a `decoder` there is nothing to paint from: load the pipeline with one first.")
        root = Path(source) if Path(str(source)).is_dir() else Path(fetch_snapshot(str(source)))
        folder = root / ("pixel_decoding" if self.decoder.pool is None else "highres_pixel_decoding")
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **options)
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **options)
        scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        device = self._execution_device
        if self.decoder.pool is not None:
            pipe = StableDiffusionXLPipeline(
                vae=vae, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet, scheduler=scheduler
            )  # fmt: skip
            self.image_decoder = XLPainter(pipe.to(device))
            return
        file = folder / "uncond_embeddings.bin"
        unconditional = torch.load(file, map_location="cpu", weights_only=True)
        self.image_decoder = StableDiffusionPainter(unet.to(device), vae.to(device), scheduler, unconditional)

    # ------------------------------------------------------------------ reading

    def readings(
        self,
        image: Any,
        question: str | Sequence[str] | None = None,
        *,
        prompt_ids: Any = None,
        sample_tokens: bool | None = None,
        generator: Any = None,
    ) -> list[Reading]:
        """The start of a sequence, an image, and a text about it, for each of the images."""
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        texts = ("" if question is None else question) if prompt_ids is None else None
        rows = self.text_rows(texts, prompt_ids, "question")
        rows = rows * len(images) if len(rows) == 1 else rows
        images = images * len(rows) if len(images) == 1 else images
        if not images or len(rows) != len(images):
            raise ValueError(f"`question` holds {len(rows)} questions for {len(images)} images: give one for each.")
        sample = self.setting("sample_tokens", sample_tokens)
        self.check_generator(generator, len(images))
        generators = generator if isinstance(generator, (list, tuple)) else [generator] * len(images)
        model, device, readings = self.transformer, self._execution_device, []
        for item, words, source in zip(images, rows, generators, strict=True):
            # one image at a time: what is read of it does not depend on the others, bit for bit
            features, _ = self.tokenizer.reading_features(self.preprocess(item), sample=sample, generator=source)
            count = features.shape[1]
            ids = [self.start_id, self.begin_image, *[0] * count, self.end_image, *words]
            places = torch.zeros(1, len(ids), dtype=torch.bool, device=device)
            places[:, 2 : 2 + count] = True
            condition = model.prompt_condition(torch.tensor([ids], device=device), None, features, places)
            limit = model.max_positions - len(ids)
            readings.append(Reading(condition, ids, [(2, 2 + count)], [(1, count)], (3 + count, len(ids)), limit))
        return readings

    @torch.no_grad()
    def describe(
        self,
        image: Any,
        question: str | Sequence[str] | None = None,
        *,
        prompt_ids: Any = None,
        sample_tokens: bool | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        search: BeamSearch | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> ARTextOutput | tuple:
        """Writes what follows an image and a text about it.

        Args:
            image: a PIL image, an array [H, W, 3], a tensor [3, H, W], or a list of them.
            question (`str` or `list`, *optional*): text behind the image, one for all images, one for each, or several about one
                image; without it the image is captioned. The model was not tuned to follow instructions.
            prompt_ids (`list` or `torch.Tensor`, *optional*): ids in place of `question`.
            sample_tokens (`bool`, *optional*): draw which patches of the image are kept.
            max_new_tokens (`int`, *optional*): longest text.
            temperature, top_k, top_p: of the draw of words; temperature 0 takes the likeliest.
            search (`BeamSearch`, *optional*): the authors caption with 2 beams and answer with 5.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each image.
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARTextOutput` rather than a tuple.

        Returns:
            [`ARTextOutput`] or `tuple`: one text for each image.
        """
        return self.answer(
            partial(
                self.readings, image, question, prompt_ids=prompt_ids, sample_tokens=sample_tokens, generator=generator
            ),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            search=search,
            generator=generator,
            return_dict=return_dict,
        )

    def ask(self, image: Any, question: Any = None, **options: Any) -> ARTextOutput:
        """`describe`, by the name that all pipelines share that read."""
        return self.describe(image, question, **options)  # type: ignore[return-value]

    # ------------------------------------------------------------------ drawing

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
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
            prompt (`str` or `list[str]`): what to draw.
            guidance_scale (`float`, *optional*): classifier-free guidance against the begin of an image alone; up to 1 it is off.
            temperature (`float`, *optional*), top_k (`int`, *optional*, 0: off), top_p (`float`, *optional*, 1: off): of the draw of
                codes; temperature 0 takes the likeliest.
            min_image_tokens, max_image_tokens (`int`, *optional*): fewest and most codes of an image.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images of each prompt, next to each other.
            generator (`torch.Generator` or `list`, *optional*): one for the call, or one for each image; also of the painting.
            noise (*optional*): recorded noise in place of the generator, see `armm.NoiseSource`.
            prompt_ids (`list` or `torch.Tensor`, *optional*): ids of words, a list or a list for each image, in place of `prompt`.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"` or `"pt"` through the image decoder, or `"latent"`
                (codes [B, N]; ask for the codes too to know how many of them are real).
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARPipelineOutput` rather than a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes` with their mask.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token.
            callback_on_step_end_tensor_inputs (`list`, *optional*): `"latents"`: the ids of the vocabulary so far.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images, and the codes if asked for.
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        scale, sampler = self.check_sampling(guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        most = self.setting("max_image_tokens", max_image_tokens)
        self.check_number("max_image_tokens", most, low=1, high=self.tokenizer.max_tokens, integer=True)
        fewest = self.setting("min_image_tokens", min_image_tokens)
        self.check_number("min_image_tokens", fewest, low=1, high=most, integer=True)
        words = [row for row in self.text_rows(prompt, prompt_ids, "prompt") for _ in range(num_images_per_prompt)]
        self.check_generator(generator, len(words))
        condition, null = (
            self.drawing_condition(rows) for rows in ([[self.start_id, *row, self.begin_image] for row in words], [[self.begin_image]])
        )  # fmt: skip
        self._guidance_scale, self._interrupt, self._num_timesteps = scale, False, most
        guidance = Guidance(scale, formula="log_softmax")
        with self.progress_bar(total=most) as bar:
            output = decode_text(
                self.transformer,
                condition,
                stop_id=self.end_image,
                max_tokens=most,
                min_tokens=fewest,
                vocabulary=(self.end_image, self.first_code + self.tokenizer.codebook_size),
                null_condition=null.repeat(len(words)),
                guidance=guidance,
                sampler=sampler,
                noise=generator if noise is None else noise,
                callback=self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs),
                interrupt=lambda: self._interrupt,
            )
        codes = self.codes_of(output.ids, output.lengths)
        self._painting_generator = generator
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)

    def drawing_condition(self, rows: Sequence[Sequence[int]]) -> Any:
        """What images are drawn after: rows of ids, padded on the left."""
        length = max(len(row) for row in rows)
        ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=self._execution_device)
        missing = torch.tensor([length - len(row) for row in rows], device=ids.device)
        return self.transformer.prompt_condition(ids, torch.arange(length, device=ids.device) >= missing[:, None])

    def codes_of(self, ids: torch.Tensor, lengths: torch.Tensor) -> Codes:
        """The codes of ids [B, N] of which the first `lengths` [B] are codes."""
        longest = int(lengths.max())
        mask = torch.arange(longest, device=ids.device) < lengths[:, None]
        return Codes(ids=(ids[:, :longest] - self.first_code).masked_fill(~mask, 0), mask=mask)
