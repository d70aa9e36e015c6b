"""`DARPipeline`: images whose tokens go from coarse to fine, with previews while they are drawn (D-AR, arXiv 2505.23660)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.doc_utils import replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor

from armm.decoding.base import DecodingOutput
from armm.decoding.guidance import Guidance
from armm.decoding.next_token import NextTokenDecoding
from armm.decoding.sampling import Sampler
from armm.model import AutoregressiveModel
from tokenizers_visual.codes import Codes
from tokenizers_visual.dar import DARTokenizer
from tokenizers_visual.dar_decoder import ProgressiveDecoding

from .llamagen import LlamaGenPipeline
from .outputs import ARPipelineOutput

__all__ = ["DARPipeline", "DARPipelineOutput", "DiffusionPipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("dar-c2i-l-256")
        >>> image = pipe(class_labels="red fox").images[0]

        >>> # a preview after every eighth of the tokens
        >>> def show(pipe, tokens, images):
        ...     images[0].save(f"fox-{tokens:03d}.png")
        >>> pipe(class_labels="red fox", callback_on_preview=show)

        >>> # one layout for several classes: the first tokens are those of the first image
        >>> images = pipe(class_labels=["red fox", "golden retriever", "tabby"], shared_prefix=64).images
        ```
"""


@dataclass
class DARPipelineOutput(ARPipelineOutput):
    """Generated images, and what they looked like on the way.

    Args:
        images: see `ARPipelineOutput`.
        codes: the visual codes behind the images, when the call asked for them with `output_codes=True`.
        previews: the images after each group of tokens but the last, in the form of `images`, when the call asked for them with
            `output_previews=True`.
    """

    previews: list[Any] | None = None


class DARPipeline(LlamaGenPipeline):
    """Class-conditional images with a D-AR transformer.

    Args:
        tokenizer (`DARTokenizer`): decodes token ids to pixels, from coarse to fine.
        transformer (`AutoregressiveModel`): with a class condition, and one rotary axis.
        decoding (`NextTokenDecoding`): the decoding strategy.
        generation_config (`dict`, *optional*): settings of this checkpoint, see `generation_settings`.
    """

    model_cpu_offload_seq = "transformer"
    # It may be fed after every token, so it stays where the transformer is.
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["tokenizer"]
    _optional_components: ClassVar[list[str]] = []
    single_file_loader: ClassVar[str | None] = "armm.convert.dar"
    generation_settings: ClassVar[dict[str, Any]] = {
        "guidance_scale": 4.0,
        "guidance_start": None,
        "guidance_interval": -1,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "do_sample": True,
        "num_inference_steps": None,
    }

    def __init__(
        self,
        tokenizer: DARTokenizer,
        transformer: AutoregressiveModel,
        decoding: NextTokenDecoding,
        generation_config: dict | None = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        if tokenizer is not None and transformer is not None:
            ours = (transformer.grid[-1], transformer.vocab_size)
            theirs = (tokenizer.config.num_tokens, tokenizer.codebook_size)
            if ours[0] != theirs[0] or ours[1] < theirs[1]:
                raise ValueError(
                    f"`transformer` draws {ours[0]} tokens of {ours[1]} values, `tokenizer` has {theirs[0]} of {theirs[1]}: load the "
                    "tokenizer that belongs to the transformer."
                )
        self.register_modules(tokenizer=tokenizer, transformer=transformer, decoding=decoding)
        self.register_generation_config(generation_config)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(  # type: ignore[override]
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        guidance_start: float | None = None,
        guidance_interval: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool | None = None,
        num_inference_steps: int | None = None,
        shared_prefix: int = 0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        pixel_noise: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        output_codes: bool = False,
        output_previews: bool = False,
        callback_on_preview: Callable[[DARPipeline, int, Any], None] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DARPipelineOutput | tuple[list[PIL.Image.Image] | np.ndarray | torch.Tensor, ...]:
        r"""Generates images.

        Settings left at None take the value in the checkpoint's `generation_config`.

        Args:
            class_labels (`int`, `str` or `list`): classes by number or, for ImageNet models, by name.
            height (`int`, *optional*), width (`int`, *optional*): in pixels, at least the checkpoint's own; other sizes work but were
                not trained.
            guidance_scale (`float`, *optional*): classifier-free guidance; up to 1 only the condition is run.
            guidance_start (`float`, *optional*): the guidance grows from here at the first token to its scale at the last.
            guidance_interval (`int`, *optional*): last decode step that is guided, -1 for all.
            temperature (`float`, *optional*), top_k (`int`, *optional*, 0: off), top_p (`float`, *optional*, 1: off): the
                sampling filters, applied in this order.
            do_sample (`bool`, *optional*): False takes the most likely token.
            num_inference_steps (`int`, *optional*): steps of the denoising; None is one for each group of tokens.
            shared_prefix (`int`, *optional*, defaults to 0): so many first tokens of all images are those of the first one: they share
                its layout. For the layout of a given image, put its first ids into `latents`.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images for each class.
            generator (`torch.Generator` or `list`, *optional*): randomness; a list has one generator for each image, which then
                does not depend on the rest of the batch.
            latents (`torch.Tensor`, *optional*): token ids [B, N] or [1, N] to keep, -1 where tokens are to be generated.
            noise (`torch.Tensor`, *optional*): recorded exponential noise [B, N, vocabulary] that replaces the generator.
            pixel_noise (`torch.Tensor`, *optional*): standard normal [B, 3, height, width] that the pixels begin with.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (token ids [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): False returns a tuple.
            output_codes (`bool`, *optional*, defaults to `False`): also return the `Codes`.
            output_previews (`bool`, *optional*, defaults to `False`): also return what the images looked like after each group.
            callback_on_preview (`Callable`, *optional*): called as `callback(pipe, tokens, images)` as soon as the tokens of a group
                are there, with images in the form of `output_type`; the denoising goes on from there, so that it costs next to nothing.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each token;
                it may return replaced tensors, set `pipe._guidance_scale`, or end the call with `pipe._interrupt = True`: the
                images are then those of the tokens so far.
            callback_on_step_end_tensor_inputs (`list`, *optional*): which tensors it sees: `"latents"`, the token ids so far
                [B, step + 1].

        Examples:

        Returns:
            [`DARPipelineOutput`] or `tuple`: the images (and the codes, and the previews, if asked for).
        """
        self.check_output_type(output_type)
        self.check_callback_inputs(callback_on_step_end_tensor_inputs)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        grid = self.transformer.grid
        self.check_number("shared_prefix", shared_prefix, low=0, high=grid[-1], integer=True)
        previewed = output_previews or callback_on_preview is not None
        if shared_prefix and self.acceleration is not None:
            raise ValueError(
                "`shared_prefix` needs tokens drawn one after the other: call `disable_acceleration()` first."
            )
        if previewed and output_type == "latent":
            raise ValueError("previews are images: use another `output_type` than 'latent'.")
        settings = self.check_settings(
            guidance_scale=guidance_scale,
            guidance_start=guidance_start,
            guidance_interval=guidance_interval,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            do_sample=do_sample,
            num_inference_steps=num_inference_steps,
        )

        self._guidance_scale = settings["guidance_scale"]
        self._interrupt = False
        device = self._execution_device
        labels = torch.tensor(self.class_indices(class_labels), device=device)
        condition = self.transformer.condition(labels=labels).repeat(num_images_per_prompt)
        self.check_generator(generator, condition.batch)
        known_ids, known_mask = self.known_tokens(latents, condition.batch, grid, device)
        self.check_noise(noise, condition.batch, grid)
        # Drawn before the tokens, so that previews do not change what is drawn.
        pixel_noise = self.prepare_pixels(condition.batch, height, width, generator, pixel_noise, device)
        decoding = self.tokenizer.start_decoding(
            condition.batch, noise=pixel_noise, num_inference_steps=settings["num_inference_steps"]
        )
        guidance = self.guidance(settings)
        null_condition = self.transformer.null_condition(condition.batch, like=condition) if guidance.active else None
        self._num_timesteps = self.decoding.num_calls(grid)
        previews: list[Any] = []

        def show(ids: torch.Tensor) -> None:
            if self.acceleration is not None:  # all ids, those that are not certain yet are -1
                ids = ids[:, : int((ids >= 0).all(dim=0).long().cumprod(dim=0).sum())]
            while not decoding.finished and ids.shape[1] >= decoding.tokens_needed:
                tokens = decoding.tokens_needed
                decoding.step(ids)
                if decoding.finished:
                    return
                images = self.pixels_to_images(decoding.preview(), output_type)
                if output_previews:
                    previews.append(images)
                if callback_on_preview is not None:
                    callback_on_preview(self, tokens, images)

        with self.progress_bar(total=self._num_timesteps) as bar:
            watch = self.after_step(bar, guidance, callback_on_step_end, callback_on_step_end_tensor_inputs)

            def step_end(step: int, ids: torch.Tensor) -> torch.Tensor | None:
                count = min(int(shared_prefix), ids.shape[1])
                replaced = None
                if count:
                    replaced = torch.cat([ids[:1, :count].expand(len(ids), -1), ids[:, count:]], dim=1)
                told = watch(step, ids if replaced is None else replaced)
                replaced = told if told is not None else replaced
                if previewed:
                    show(ids if replaced is None else replaced)
                return replaced

            output = self.strategy(
                self.transformer,
                condition,
                null_condition,
                grid,
                sampler=Sampler(**{name: settings[name] for name in ("temperature", "top_k", "top_p", "do_sample")}),
                guidance=guidance,
                noise=generator if noise is None else noise,
                known_ids=known_ids,
                known_mask=known_mask,
                callback=step_end,
                interrupt=lambda: self._interrupt,
            )
        codes = Codes(ids=output.ids)
        images = codes.tensor if output_type == "latent" else self.finish(decoding, output, output_type)
        self.maybe_free_model_hooks()
        kept = [part for part, wanted in ((codes, output_codes), (previews, output_previews)) if wanted]
        if not return_dict:
            return (images, *kept)  # type: ignore[return-value]
        return DARPipelineOutput(images, codes if output_codes else None, previews if output_previews else None)

    def prepare_pixels(
        self,
        batch: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        pixel_noise: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """The noise [B, 3, H, W] that the pixels begin with; sizes that the tokenizer cannot make are a ValueError."""
        config = self.tokenizer.config
        sizes = []
        for axis, (name, value) in enumerate((("height", height), ("width", width))):
            given = None if pixel_noise is None else int(pixel_noise.shape[axis - 2])
            value = (given or config.image_size) if value is None else value
            self.check_number(name, value, low=config.image_size, integer=True)
            if value % config.pixel_patch_size:
                raise ValueError(f"`{name}` must be a multiple of {config.pixel_patch_size}, got {value}.")
            sizes.append(int(value))
        shape = (batch, config.in_channels, *sizes)
        if pixel_noise is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(pixel_noise.shape) != shape:
            raise ValueError(f"`pixel_noise` must be {list(shape)}, got {list(pixel_noise.shape)}.")
        return pixel_noise.to(device)

    def finish(self, decoding: ProgressiveDecoding, output: DecodingOutput, output_type: str) -> Any:
        """Images of all tokens, or of those that there are after an interruption."""
        ids = output.ids[:, : output.steps]
        while not decoding.finished and ids.shape[1] >= decoding.tokens_needed:
            decoding.step(ids)
        if not decoding.done:
            raise ValueError(
                f"interrupted after {output.steps} tokens: the first preview needs {decoding.tokens_needed}. Use output_type='latent'."
            )
        return self.pixels_to_images(decoding.preview(), output_type)

    def guidance(self, settings: dict[str, Any]) -> Guidance:
        """The guidance of a call."""
        start = settings["guidance_start"]
        if start is None:
            return Guidance(settings["guidance_scale"], interval=settings["guidance_interval"])
        if start == 1.0 and settings["guidance_scale"] > 1.0:
            start = 1.001  # as the authors, whose loop wants guidance from the first token on
        return Guidance(
            settings["guidance_scale"], schedule="linear", start=start, interval=settings["guidance_interval"]
        )
