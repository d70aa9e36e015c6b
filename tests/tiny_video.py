"""A tiny random video tokenizer and a pipeline around it, for tests."""

from __future__ import annotations

from typing import Any

import torch

from pipelines.base import ARPipeline
from tokenizers_visual import Codes, LARPTokenizer

TINY: dict[str, Any] = {
    "num_frames": 4,
    "sample_size": 8,
    "num_tokens": 6,
    "codebook_size": 32,
    "codebook_dim": 4,
    "temporal_patch_size": 2,
    "patch_size": 4,
    "encoder_dim": 16,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_dim": 8,
    "decoder_layers": 2,
    "decoder_heads": 1,
}


def tiny_video_tokenizer(**changes: Any) -> LARPTokenizer:
    """Four frames of 8 x 8 as six codes, with weights large enough that everything depends on everything."""
    torch.manual_seed(3)
    model = LARPTokenizer(**{**TINY, **changes}).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


class TinyVideoPipeline(ARPipeline):
    """Draws random codes: what a video pipeline does around its transformer."""

    def __init__(self, tokenizer: LARPTokenizer) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        class_labels=None,
        num_images_per_prompt=1,
        generator=None,
        output_type="pil",
        return_dict=True,
        output_codes=False,
    ):
        self.check_output_type(output_type)
        size, count = self.tokenizer.codebook_size, self.tokenizer.config.num_tokens
        total = len(class_labels) * num_images_per_prompt
        self.check_generator(generator, total)
        ids = torch.stack([torch.randint(size, (count,), generator=source) for source in generator])
        codes = Codes(ids=ids, grid=(1, 2, count // 2))
        return self.make_output(codes, output_type, return_dict=return_dict, output_codes=output_codes)


def video_pipeline() -> TinyVideoPipeline:
    pipe = TinyVideoPipeline(tiny_video_tokenizer())
    pipe.set_progress_bar_config(disable=True)
    return pipe
