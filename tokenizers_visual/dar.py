"""`DARTokenizer`: images as a sequence of ids that is decoded from coarse to fine (D-AR, Gao et al., arXiv 2505.23660)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from armm.nn.masks import causal_mask
from armm.nn.norms import LayerNorm

from .base import VisualTokenizer
from .codes import Codes
from .dar_decoder import HEAD_DIM, SOLVERS, GridRotary, PixelFlow, ProgressiveDecoding, shifted_times, window_starts
from .quantizers import Generators, Quantized, VectorQuantizer
from .vit import ViT

__all__ = ["ConfigMixin", "DARTokenizer", "ModelMixin"]


class DARTokenizer(VisualTokenizer):
    """Images <-> `num_tokens` ids in an order, of which the first are enough for a blurred image.

    Learned queries read the patches of an image, one after the other. Their ids are decoded by a diffusion model over pixels whose
    step i is conditioned on the i-th window of ids only. Codes belong to no place: `encode` gives codes with `grid=None`, and `decode`
    makes an image of any size.

    Args:
        image_size: side of the images it was trained on, and the least one of what is decoded.
        in_channels: channels of the pixels.
        patch_size, pixel_patch_size: sides of the patches that are read and that are painted.
        num_tokens: ids of an image.
        num_groups, window: groups of ids, and ids that condition one step.
        num_steps: steps of the denoising, unless a call says otherwise.
        codebook_size, codebook_dim: see `VectorQuantizer`.
        query_dim: width of the learned queries before their projection; None has queries of the full width.
        encoder_dim, encoder_layers, encoder_mlp_hidden: of the transformer that reads; an inner width of None is four times the width.
        decoder_dim, decoder_layers, decoder_mlp_hidden: of the causal transformer that turns ids into conditions.
        pixel_dim, pixel_layers, pixel_mlp_hidden: of the transformer that denoises. Heads are 64 wide everywhere.
        data_std: the standard deviation that pixels are scaled to.
        time_shift: of the times of the denoising, see `shifted_times`.
        rotary_theta, pixel_rotary_theta: bases of the rotary frequencies of patches that are read and painted.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["quantizer", "norm", "patch_embedding"]
    _no_split_modules = ["Block", "FlowBlock"]

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        in_channels: int = 3,
        patch_size: int = 16,
        pixel_patch_size: int = 8,
        num_tokens: int = 256,
        num_groups: int = 8,
        window: int = 32,
        num_steps: int = 8,
        codebook_size: int = 16384,
        codebook_dim: int = 8,
        query_dim: int | None = 8,
        encoder_dim: int = 768,
        encoder_layers: int = 8,
        encoder_mlp_hidden: int | None = None,
        decoder_dim: int = 768,
        decoder_layers: int = 8,
        decoder_mlp_hidden: int | None = None,
        pixel_dim: int = 768,
        pixel_layers: int = 12,
        pixel_mlp_hidden: int | None = None,
        data_std: float = 0.6,
        time_shift: float = 2.0,
        rotary_theta: float = 10000.0,
        pixel_rotary_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        for name, value in (("encoder_dim", encoder_dim), ("decoder_dim", decoder_dim), ("pixel_dim", pixel_dim)):
            if value < HEAD_DIM or value % HEAD_DIM:
                raise ValueError(f"`{name}` must be a multiple of {HEAD_DIM}, the width of a head, got {value}.")
        if min(num_tokens, num_groups, num_steps, patch_size, pixel_patch_size) < 1 or not 1 <= window <= num_tokens:
            raise ValueError(
                "`num_tokens`, `num_groups`, `num_steps` and the patch sizes must be positive and `window` between 1 and num_tokens, "
                f"got num_tokens={num_tokens}, num_groups={num_groups}, num_steps={num_steps}, patch_size={patch_size}, "
                f"pixel_patch_size={pixel_patch_size}, window={window}."
            )
        if image_size % patch_size or image_size % pixel_patch_size or image_size < 1:
            raise ValueError(
                f"`image_size` {image_size} must be a multiple of both patch sizes, {patch_size} and {pixel_patch_size}."
            )
        if not data_std > 0 or not time_shift > 0:
            raise ValueError(f"`data_std` and `time_shift` must be positive, got {data_std} and {time_shift}.")
        options: dict[str, Any] = {"mlp": "silu", "qk_norm": "layer", "branch_scale": 0.0}
        self.patch_embedding = nn.Conv2d(in_channels, encoder_dim, patch_size, stride=patch_size)
        self.patch_norm = LayerNorm(encoder_dim, affine=False)
        self.queries = nn.Parameter(torch.randn(num_tokens, query_dim or encoder_dim))
        self.query_proj = nn.Linear(query_dim, encoder_dim) if query_dim else nn.Identity()
        self.encoder = ViT(
            encoder_dim, encoder_layers, encoder_dim // HEAD_DIM, mlp_hidden=encoder_mlp_hidden, **options
        )
        self.encoder_norm = LayerNorm(encoder_dim, affine=False)
        self.quant_proj = nn.Linear(encoder_dim, codebook_dim, bias=False)
        self.quantizer = VectorQuantizer(codebook_size, codebook_dim, l2_normalize=True)
        self.post_quant_proj = nn.Linear(codebook_dim, decoder_dim, bias=False)
        self.decoder_positions = nn.Parameter(torch.randn(num_tokens, decoder_dim) * 0.02)
        self.decoder = ViT(
            decoder_dim, decoder_layers, decoder_dim // HEAD_DIM, mlp_hidden=decoder_mlp_hidden, **options
        )
        self.decoder_norm = LayerNorm(decoder_dim, affine=False)
        self.flow = PixelFlow(
            in_channels,
            pixel_patch_size,
            pixel_dim,
            pixel_layers,
            pixel_mlp_hidden or 4 * pixel_dim,
            decoder_dim,
            pixel_rotary_theta,
        )
        self.rotary = GridRotary(rotary_theta)

    @property
    def codebook_size(self) -> int:
        return self.quantizer.codebook_size

    @property
    def latent_channels(self) -> int:
        return self.quantizer.dim

    @property
    def downsample(self) -> int:
        """Pixels of a patch along each side; the codes themselves have no place."""
        return self.config.patch_size

    @property
    def smallest_size(self) -> int:
        return self.config.image_size

    # Reading.

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the queries found in `pixels`, before normalisation: `[B, num_tokens, codebook_dim]`."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        height, width = patches.shape[-2:]
        patches = self.patch_norm(patches.flatten(2).transpose(1, 2))
        queries = self.query_proj(self.queries).to(patches.dtype).expand(len(patches), -1, -1)
        tokens = torch.cat([patches, queries], dim=1)
        # All see the patches, and queries also the queries before them.
        count = self.config.num_tokens
        mask = causal_mask(tokens.shape[1], tokens.shape[1], tokens.device)
        mask[:, : height * width] = True
        hidden = self.encoder(tokens, rotary=self.rotary(height, width, tokens.device, count), mask=mask)
        return self.quant_proj(self.encoder_norm(hidden[:, -count:]))

    @apply_forward_hook
    def encode(self, pixels: torch.Tensor, *, generator: Generators = None) -> Codes:
        """Ids `[B, num_tokens]`, with `grid=None`, of pixels `[B, 3, H, W]` in [-1, 1]. Deterministic: `generator` is not used."""
        self.check_pixels(pixels)
        vectors = self.quantizer.normalize(self.features(pixels))
        return Codes(ids=self.quantizer.nearest(vectors, self.quantizer.codebook()))

    # Decoding.

    def embed(self, codes: Codes) -> torch.Tensor:
        """Code vectors float32 `[B, n, codebook_dim]` of unit length; n may be smaller than `num_tokens`."""
        self.check_ids(codes)
        return self.quantizer.lookup(codes.ids)

    def condition(self, vectors: torch.Tensor) -> torch.Tensor:
        """What the denoising is conditioned on, `[B, n, decoder_dim]`, of the first n code vectors `[B, n, codebook_dim]` of images.

        Causal: rows do not depend on the vectors behind them.
        """
        count = vectors.shape[1]
        x = self.post_quant_proj(vectors.to(self.post_quant_proj.weight.dtype)) + self.decoder_positions[:count]
        return self.decoder_norm(self.decoder(x, mask=causal_mask(count, count, x.device)))

    @apply_forward_hook
    def decode_step(self, pixels: torch.Tensor, time: float, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Velocity float32 of noisy `pixels` `[B, 3, H, W]` at `time`, from ids `[B, n]` whose window begins at `start`."""
        window = self.condition(self.quantizer.lookup(ids))[:, start : start + self.config.window]
        times = torch.full((len(pixels),), time, dtype=torch.float32, device=pixels.device)
        return self.flow(pixels, times, window).float()

    def start_decoding(
        self,
        batch: int,
        *,
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        noise: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        solver: str = "adams_bashforth",
    ) -> ProgressiveDecoding:
        """A decoding of `batch` images that is fed their ids as they arrive; arguments as of `decode`."""
        config = self.config
        sizes = [config.image_size if size is None else size for size in (height, width)]
        if noise is not None:
            sizes = list(noise.shape[-2:]) if height is None and width is None else sizes
        for name, size in zip(("height", "width"), sizes, strict=True):
            if size < config.image_size or size % config.pixel_patch_size:
                raise ValueError(
                    f"`{name}` must be a multiple of {config.pixel_patch_size} and at least {config.image_size}, the size this tokenizer "
                    f"was made for, got {size}: resize the image afterwards."
                )
        shape = (batch, config.in_channels, *sizes)
        if noise is None:
            noise = randn_tensor(shape, generator=_as_list(generator), device=self.device, dtype=torch.float32)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"`noise` must be {list(shape)}, got {list(noise.shape)}.")
        steps = config.num_steps if num_inference_steps is None else num_inference_steps
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`num_inference_steps` must be a positive integer, got {steps!r}.")
        if solver not in SOLVERS:
            raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}, got {solver!r}.")
        return ProgressiveDecoding(self, noise.to(device=self.device, dtype=torch.float32), steps, solver)

    @apply_forward_hook
    def decode(
        self,
        codes: Codes,
        *,
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        noise: torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        preview_steps: int | None = None,
        solver: str = "adams_bashforth",
    ) -> torch.Tensor:
        """Pixels `[B, 3, height, width]`, nominally in [-1, 1] but not clamped, of codes in any grid or none.

        Args:
            codes: `num_tokens` ids for each image; fewer give the preview of the steps that they are enough for.
            generator: of the noise; a list has one generator for each image, which then does not depend on the rest of the batch.
            height, width: multiples of `pixel_patch_size`, at least `image_size`, which is the default.
            noise: standard normal `[B, 3, height, width]` in place of the generator's.
            num_inference_steps: steps of the denoising, None for the tokenizer's own.
            preview_steps: only so many of them, then a jump to the end.
            solver: "adams_bashforth" (second order, as published) or "euler".
        """
        self.check_ids(codes)
        decoding = self.start_decoding(
            codes.batch_size,
            generator=generator,
            height=height,
            width=width,
            noise=noise,
            num_inference_steps=num_inference_steps,
            solver=solver,
        )
        if preview_steps is not None and not 1 <= preview_steps <= decoding.steps:
            raise ValueError(f"`preview_steps` must lie between 1 and {decoding.steps}, got {preview_steps!r}.")
        if codes.num_tokens < decoding.tokens_of(preview_steps or 1):
            raise ValueError(
                f"`codes` must hold the first {decoding.tokens_of(preview_steps or 1)} of {self.config.num_tokens} ids of each image at "
                f"least, got {codes.num_tokens}."
            )
        for _ in range(preview_steps or decoding.steps):
            if codes.num_tokens < decoding.tokens_needed:
                break
            decoding.step(codes.ids)
        return decoding.preview()

    # Training.

    def forward(
        self, pixels: torch.Tensor, *, generator: torch.Generator | None = None, times: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Quantized]:
        """What one step of the denoising makes of noisy `pixels` `[B, 3, H, W]` with a jump to the end, and the quantisation.

        With times t in [0, 1) (`[B]`; None draws them) the image is mixed with noise at the shifted time s, and conditioned on the
        window of t. The squared error of the result is (1 - s)^2 / data_std^2 times that of the velocity.
        """
        config = self.config
        quantized = self.quantizer(self.features(pixels))
        condition = self.condition(quantized.vectors)
        batch, device = len(pixels), pixels.device
        if times is None:
            times = torch.rand(batch, generator=generator, device=None if generator is None else generator.device)
        times = times.to(device)
        shifted = (times / (times + config.time_shift * (1 - times)))[:, None, None, None]
        groups = torch.floor(times * config.num_groups + 0.5).long() * config.num_tokens // config.num_groups
        places = groups.clamp(max=config.num_tokens - config.window)[:, None] + torch.arange(
            config.window, device=device
        )
        window = condition.gather(1, places[..., None].expand(-1, -1, condition.shape[-1]))
        clean = config.data_std * pixels
        noise = randn_tensor(clean.shape, generator=generator, device=device, dtype=clean.dtype)
        noisy = (1 - shifted) * noise + shifted * clean
        velocity = self.flow(noisy, shifted.flatten(), window)
        return (noisy + (1 - shifted) * velocity) / config.data_std, quantized

    def check_ids(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` hold ids of this tokenizer's codebook, at most as many as an image has."""
        super().check_ids(codes)
        if codes.num_tokens > self.config.num_tokens:
            raise ValueError(
                f"`codes` must have at most {self.config.num_tokens} ids for each image, got {codes.num_tokens}."
            )

    def schedule(self, num_inference_steps: int | None = None) -> tuple[list[float], list[int]]:
        """The times of all steps and 1, and the first id of the window of each step."""
        config = self.config
        steps = config.num_steps if num_inference_steps is None else num_inference_steps
        return (
            shifted_times(steps, config.time_shift),
            window_starts(steps, config.num_groups, config.num_tokens, config.window),
        )


def _as_list(generator: Generators) -> torch.Generator | list[torch.Generator] | None:
    return generator if generator is None or isinstance(generator, torch.Generator) else list(generator)
