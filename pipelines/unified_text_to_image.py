"""`UnifiedTextToImagePipeline`: a picture from a sentence, by a model whose vocabulary holds words and image codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import replace_example_docstring

from armm.decoding.acceleration import Acceleration
from armm.decoding.speculative import Speculative
from tokenizers_visual.codes import Codes

from .outputs import ARPipelineOutput
from .unified import UnifiedPipeline, candidate_generators

__all__ = ["DiffusionPipeline", "UnifiedTextToImagePipeline"]

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import armm

        >>> pipe = armm.pipeline("text-to-image")
        >>> image = pipe("a small red sphere to the left of a large blue cube").images[0]
        >>> image.save("scene.png")
        ```
"""


class UnifiedTextToImagePipeline(UnifiedPipeline):
    """Draws images from text, one token after the other, with classifier-free guidance."""

    _accelerations: ClassVar[tuple[type[Acceleration], ...]] = (Speculative,)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        num_candidates: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        output_codes: bool = False,
    ) -> ARPipelineOutput | tuple:
        """Draws.

        Args:
            prompt (`str` or `list[str]`): what to draw, in words of the model's vocabulary.
            height, width (`int`, *optional*): must be the model's own size.
            num_images_per_prompt (`int`, *optional*, defaults to 1): images of each prompt, next to each other.
            num_candidates (`int`, *optional*): pictures drawn for each one that is returned. The model reads them and keeps the one
                about which it would most likely say the prompt (reranking as in DALL-E, arXiv 2102.12092, section 2.6, with the
                model as its own judge). 1 draws only what is returned.
            guidance_scale (`float`, *optional*): above 1, how strongly the prompt is followed; 1 turns guidance off.
            temperature (`float`, *optional*): of the draw; 0 always takes the likeliest code.
            top_k (`int`, *optional*): draw from the k likeliest codes only; 0 from all.
            top_p (`float`, *optional*): draw from the likeliest codes with this total probability; 1 from all.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): one for the call, or one for each image: then
                an image does not depend on its batch.
            output_type (`str`, *optional*, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"` (code ids [B, N]).
            return_dict (`bool`, *optional*, defaults to `True`): return an `ARPipelineOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `callback(pipe, step, timestep, tensors)` after each
                token; a returned `"latents"` (code ids so far, of all candidates) replaces them.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): what the callback is given: `"latents"`.
            output_codes (`bool`, *optional*, defaults to `False`): also return the visual codes.

        Examples:

        Returns:
            [`ARPipelineOutput`] or `tuple`: the images, and the codes if asked for.
        """
        self.check_output_type(output_type)
        self.check_size(height, width)
        self.check_number("num_images_per_prompt", num_images_per_prompt, low=1, integer=True)
        guidance_scale, sampler = self.check_sampling(guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p)
        candidates = self.check_settings(num_candidates=num_candidates)["num_candidates"]
        prefix = self.encode_prompt(prompt, num_images_per_prompt)
        self.check_generator(generator, len(prefix))
        codes = self.draw_codes(
            prefix.repeat_interleave(candidates, 0),
            guidance_scale,
            sampler,
            candidate_generators(generator, len(prefix), candidates),
            callback=callback_on_step_end,
            callback_names=callback_on_step_end_tensor_inputs,
        )
        if candidates > 1:
            codes = Codes(ids=codes.tensor[self.best_candidates(prefix, codes.tensor, candidates)], grid=codes.grid)
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)
