"""`ATokenTokenizer`: images, videos and voxels with one tokenizer (AToken, Lu et al., arXiv 2509.14476)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from armm.nn.block import Attention, BlockConfig
from armm.nn.mlp import MLP
from armm.nn.norms import LayerNorm, build_norm
from armm.nn.positions import resize_positions
from armm.nn.rotary import rotary_table

from .base import VisualTokenizer
from .codes import Codes
from .quantizers import FSQ_LEVELS, FiniteScalarQuantizer, Generators, Quantized
from .sparse import SparseTokens, Windows, grid_coordinates, patchify, unpatchify, windows
from .vit import ViT

__all__ = ["ATokenTokenizer", "ConfigMixin", "ModelMixin"]

AXES = 4  # time, row, column, depth: each turns a quarter of a head
# The authors' frequencies are 10000 ** (-j / d) for j = 0 .. d/8 - 1 on every axis, d being the width of a whole head. On d/4
# dimensions that is a usual table of this base.
ROTARY_THETA = 10000.0 ** (1 / 8)


class TokenEncoding(NamedTuple):
    """What the encoder makes of a batch: `moments` `[N, 2 * latent_channels]` (means, then log-variances), `pooled` `[B, C]`, one vector
    of unit length for each thing, and `features` `[N, C]`, what is read to understand."""

    moments: torch.Tensor
    pooled: torch.Tensor
    features: torch.Tensor


class SparseTransformer(nn.Module):
    """A transformer over sparse tokens: tokens of one temporal window of one thing see each other whole, at rotary positions
    (time, row, column, depth) and with a learned position for row and column on top.

    Args:
        in_dim: width of the tokens that come in.
        dim, num_layers, num_heads, mlp_hidden: of the `ViT`.
        norm, bias, qk_norm: of its blocks.
        input_bias: whether the first linear layer has a bias.
        table: rows and columns of the learned positions.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_hidden: int,
        norm: str,
        bias: bool,
        qk_norm: str | None,
        table: int,
    ) -> None:
        super().__init__()
        if dim % num_heads or (dim // num_heads) % (2 * AXES):
            raise ValueError(
                f"heads must be a multiple of {2 * AXES} wide for {AXES} rotary axes, got a width of {dim} in {num_heads} heads."
            )
        self.axes_dims = (dim // num_heads // AXES,) * AXES
        self.table = table
        self.input_projection = nn.Linear(in_dim, dim, bias=bias)
        self.position_embedding = nn.Embedding(table**2, dim)
        self.vit = ViT(
            dim,
            num_layers,
            num_heads,
            mlp="gelu_tanh",
            mlp_hidden=mlp_hidden,
            norm=norm,
            norm_eps=1e-6,
            bias=bias,
            qk_norm=qk_norm,
        )
        self.norm = build_norm(norm, dim, 1e-6)

    def learned(self, placed: Windows) -> torch.Tensor:
        """Learned positions `[G, L, dim]`: the table, stretched over the rows and columns that a window reaches."""
        table = self.position_embedding.weight.unflatten(0, (self.table, self.table))
        places = placed.coordinates[..., 1:3]
        reach = places.masked_fill(~placed.real[..., None], 0).amax(1) + 1
        out = table.new_empty(*placed.index.shape, table.shape[-1])
        for size in reach.unique(dim=0).tolist():
            own = (reach == torch.tensor(size, device=reach.device)).all(1)
            rows, columns = places[own].unbind(-1)
            stretched = resize_positions(table, *size, mode="bilinear", antialias=True)
            out[own] = stretched[(rows * size[1] + columns).clamp(max=len(stretched) - 1)]
        return out

    def forward(self, tokens: SparseTokens, placed: Windows) -> torch.Tensor:
        """Normalised states `[N, dim]`."""
        x = self.input_projection(tokens.features.to(self.input_projection.weight.dtype))
        x = placed.gather(x) + self.learned(placed)
        rotary = rotary_table(placed.coordinates, self.axes_dims, ROTARY_THETA)
        return self.norm(placed.scatter(self.vit(x, rotary=rotary, mask=placed.mask)))


class PoolingHead(nn.Module):
    """One vector for all tokens of a thing: a learned query that looks at them, and a feed-forward network (SigLIP, arXiv 2303.15343)."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int, bias: bool) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(dim) * 0.02)
        config = BlockConfig(
            dim=dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=dim // num_heads,
            mlp="gelu_tanh",
            mlp_hidden=mlp_hidden,
            qkv_bias=bias,
            out_bias=bias,
        )
        self.attention = Attention(config)
        self.norm = LayerNorm(dim)
        self.mlp = MLP(dim, mlp_hidden, "gelu_tanh", bias)

    def forward(self, features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`features` `[B, L, dim]`, `mask` as from `Windows.mask` -> `[B, dim]`."""
        probe = self.probe.expand(len(features), 1, -1)
        pooled = self.attention(probe, None, mask, False, None, 0, 0, None, features)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class ATokenTokenizer(VisualTokenizer):
    """Images, videos and voxels <-> one latent or a few ids for each patch of a few frames.

    Everything is a set of patches at (time, row, column, depth); an image is a patch thick, its other frames are zeros. Videos are coded
    in windows of `window_frames` frames that do not see each other. `encode` and `decode` work on images `[B, 3, H, W]` and videos
    `[B, 3, T, H, W]`; `encode_tokens` and `decode_tokens` on anything, also on batches of different sizes and kinds.

    Args:
        patch_size: (frames, rows, columns) of a patch.
        in_channels: channels of the pixels.
        latent_channels: width of a latent, the channels of all codebooks together where there is a quantizer.
        encoder_dim, encoder_layers, encoder_heads, encoder_mlp_hidden: of the encoder, which has layer norms and biases.
        decoder_dim, decoder_layers, decoder_heads, decoder_mlp_hidden: of the decoder, which has RMS norms, also on queries and keys,
            and no biases.
        position_table: rows and columns of the learned positions, which are stretched over every picture.
        window_frames: frames of a temporal window, a multiple of a patch's.
        codebook_size: about so many ids of a codebook, one of those in `FSQ_LEVELS`; 0 makes continuous latents.
        num_codebooks: codebooks of the quantizer.
        chunk_size: rows that a latent is cut into before it is quantised; a patch has `chunk_size * num_codebooks` ids.
    """

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["quantizer"]
    _skip_layerwise_casting_patterns = ["norm", "position_embedding", "quantizer"]
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        patch_size: Sequence[int] = (4, 16, 16),
        in_channels: int = 3,
        latent_channels: int = 48,
        encoder_dim: int = 1152,
        encoder_layers: int = 27,
        encoder_heads: int = 16,
        encoder_mlp_hidden: int = 4304,
        decoder_dim: int = 1152,
        decoder_layers: int = 27,
        decoder_heads: int = 16,
        decoder_mlp_hidden: int = 4304,
        position_table: int = 16,
        window_frames: int = 16,
        codebook_size: int = 0,
        num_codebooks: int = 8,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        frames, height, width = patch_size
        if min(patch_size) < 1 or height != width:
            raise ValueError(f"`patch_size` must be (frames, side, side), all positive, got {list(patch_size)}.")
        if window_frames < frames or window_frames % frames:
            raise ValueError(
                f"`window_frames` must be a multiple of the {frames} frames of a patch, got {window_frames}."
            )
        if codebook_size and codebook_size not in FSQ_LEVELS:
            raise ValueError(f"`codebook_size` must be 0 or one of {sorted(FSQ_LEVELS)}, got {codebook_size}.")
        self.patch_size = (frames, height, width)
        features = in_channels * frames * height * width
        self.encoder = SparseTransformer(
            features,
            encoder_dim,
            encoder_layers,
            encoder_heads,
            encoder_mlp_hidden,
            "layer",
            True,
            None,
            position_table,
        )
        self.pooling = PoolingHead(encoder_dim, encoder_heads, encoder_mlp_hidden, True)
        self.moments_projection = nn.Linear(encoder_dim, 2 * latent_channels, bias=False)
        self.quantizer = None
        if codebook_size:
            if chunk_size < 1 or latent_channels % chunk_size:
                raise ValueError(
                    f"`chunk_size` must be positive and divide `latent_channels`, {latent_channels}, got {chunk_size}."
                )
            self.quantizer = FiniteScalarQuantizer(
                FSQ_LEVELS[codebook_size], num_codebooks, latent_channels, chunk_size
            )
        self.decoder = SparseTransformer(
            latent_channels,
            decoder_dim,
            decoder_layers,
            decoder_heads,
            decoder_mlp_hidden,
            "rms",
            False,
            "head_rms",
            position_table,
        )
        self.pixel_projection = nn.Linear(decoder_dim, features, bias=False)

    @property
    def codebook_size(self) -> int:
        return 0 if self.quantizer is None else self.quantizer.codebook_size

    @property
    def sub_codes(self) -> int:
        return 1 if self.quantizer is None else self.quantizer.ids_per_vector

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def downsample(self) -> int:
        return self.patch_size[1]

    @property
    def feature_dim(self) -> int:
        """Width of the features that are read to understand."""
        return self.config.encoder_dim

    # ------------------------------------------------------------------ tokens

    def tokens(self, pixels: Sequence[torch.Tensor]) -> SparseTokens:
        """Images `[3, H, W]` and videos `[3, T, H, W]` in [-1, 1], of any sizes, as patches; see `patchify` for what is cut off."""
        return patchify([item[:, None] if item.ndim == 3 else item for item in pixels], self.patch_size)

    def voxel_tokens(self, features: torch.Tensor, coordinates: torch.Tensor, number: int = 0) -> SparseTokens:
        """Voxels as tokens: features `[N, F]` in [0, 1] of the occupied ones and their places, integers `[N, 3]`; number: in the batch."""
        width = self.pixel_projection.out_features
        if coordinates.is_floating_point():
            raise ValueError(
                f"`coordinates` must be integers, the numbers of voxels along each axis, got {coordinates.dtype}."
            )
        if features.ndim != 2 or features.shape[1] > width or tuple(coordinates.shape) != (len(features), 3):
            raise ValueError(
                f"`features` must be [N, up to {width}] and `coordinates` [N, 3], got {tuple(features.shape)} and "
                f"{tuple(coordinates.shape)}."
            )
        places = F.pad(F.pad(coordinates.long(), (1, 0), value=1), (1, 0), value=number)  # voxels stand at time 1
        return SparseTokens(F.pad(features * 2 - 1, (0, width - features.shape[1])), places)

    def placed(self, coordinates: torch.Tensor) -> Windows:
        """Tokens at `coordinates` `[N, 5]` in the temporal windows of this tokenizer."""
        return windows(coordinates, self.config.window_frames // self.patch_size[0])

    @apply_forward_hook
    def encode_tokens(self, tokens: SparseTokens) -> TokenEncoding:
        """Latent moments, a pooled vector for each thing and features of tokens."""
        width = self.pixel_projection.out_features
        if tokens.features.shape[1] != width:
            raise ValueError(
                f"features of tokens must be {width} wide, as patches of this tokenizer are, got {tokens.features.shape[1]}."
            )
        features = self.encoder(tokens, self.placed(tokens.coordinates))
        things = windows(tokens.coordinates, None)
        pooled = F.normalize(self.pooling(things.gather(features), things.mask), dim=-1)
        return TokenEncoding(self.moments_projection(features), pooled, features)

    def sample(self, moments: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents float32 `[..., latent_channels]` of moments: their means, or with `noise` a draw from the posterior."""
        mean, log_variance = moments.float().chunk(2, dim=-1)
        return mean if noise is None else mean + (0.5 * log_variance).exp() * noise.to(mean)

    @apply_forward_hook
    def decode_tokens(self, latents: SparseTokens) -> SparseTokens:
        """Patches (not clamped) of latents, or of the quantizer's code vectors, at the same coordinates."""
        if latents.features.shape[1] != self.latent_channels:
            raise ValueError(f"latents must be {self.latent_channels} wide, got {latents.features.shape[1]}.")
        return latents.replace(self.pixel_projection(self.decoder(latents, self.placed(latents.coordinates))))

    def pictures(self, patches: SparseTokens) -> list[torch.Tensor]:
        """Videos `[3, T, H, W]` of patches in raster order; the first frame is the picture of what is one patch thick."""
        return unpatchify(patches, self.patch_size)

    # ------------------------------------------------------------------ batches of one size

    @apply_forward_hook
    def encode(
        self,
        pixels: torch.Tensor,
        *,
        generator: Generators = None,
        sample: bool = False,
        noise: torch.Tensor | None = None,
    ) -> Codes:
        """Codes with their grid (t, h, w) of images `[B, 3, H, W]` or videos `[B, 3, T, H, W]` in [-1, 1].

        Args:
            generator: randomness of `sample`; a list has one generator for each thing.
            sample: draw continuous latents from the posterior, as the authors do, instead of taking its mean.
            noise: standard normal `[B, N, C]` to sample with, in place of the generator's.
        """
        self.check_pixels(pixels)
        batch = len(pixels)
        tokens = self.tokens(list(pixels))
        moments = self.encode_tokens(tokens).moments.unflatten(0, (batch, -1))
        grid = tuple(int(size) + 1 for size in tokens.coordinates[:, 1:4].amax(0))
        if self.quantizer is not None:
            if sample or noise is not None:
                raise ValueError(
                    "ids are not drawn: leave out `sample` and `noise`, or use a tokenizer with `codebook_size=0`."
                )
            return Codes(ids=self.quantizer.ids(moments[..., : self.latent_channels]), grid=grid)  # type: ignore[arg-type]
        shape = (*moments.shape[:2], self.latent_channels)
        if noise is None and sample:
            noise = randn_tensor(shape, generator=generator, device=moments.device)  # type: ignore[arg-type]
        elif noise is not None and noise.shape != shape:
            raise ValueError(f"`noise` must be {shape}, got {tuple(noise.shape)}.")
        return Codes(latents=self.sample(moments, noise), grid=grid)  # type: ignore[arg-type]

    @apply_forward_hook
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What is read to understand: features `[B, N, feature_dim]` of images `[B, 3, H, W]` or videos `[B, 3, T, H, W]`."""
        self.check_pixels(pixels)
        return self.encode_tokens(self.tokens(list(pixels))).features.unflatten(0, (len(pixels), -1))

    def embed(self, codes: Codes) -> torch.Tensor:
        """The latents, or code vectors, `[B, N, latent_channels]`."""
        self.check_codes(codes)
        return codes.tensor if self.quantizer is None else self.quantizer.lookup(codes.tensor)

    @apply_forward_hook
    def decode(
        self, codes: Codes, *, generator: torch.Generator | None = None, as_video: bool | None = None
    ) -> torch.Tensor:
        """Pixels, nominally in [-1, 1] but not clamped, of codes with a grid: images `[B, 3, H, W]` or videos `[B, 3, T, H, W]`.

        Args:
            as_video: None: as images what is one patch thick. Such codes may also be of a video of a few frames.
        """
        vectors = self.embed(codes)
        if codes.grid is None:
            raise ValueError(
                "`codes` need a grid (t, h, w) to be decoded; codes without one go through `decode_tokens`."
            )
        coordinates = [grid_coordinates(codes.grid, number, vectors.device) for number in range(len(vectors))]
        patches = self.decode_tokens(SparseTokens(vectors.flatten(0, 1), torch.cat(coordinates)))
        videos = torch.stack(self.pictures(patches))
        as_video = codes.grid[0] > 1 if as_video is None else as_video
        return videos if as_video else videos[:, :, 0]

    def forward(
        self, pixels: torch.Tensor, *, generator: Generators = None
    ) -> tuple[torch.Tensor, torch.Tensor | Quantized]:
        """For training: the reconstruction of `pixels`, with what made it.

        Where there is a quantizer that is the quantisation, with vectors `[B, N, latent_channels]` and ids `[B, N, sub_codes]`; gradients
        pass the rounding straight through, and the codes themselves have nothing to learn. Otherwise it is the moments
        `[B * N, 2 * latent_channels]`, from which a latent is drawn.

        Images and frames that patches do not fill are restored without what `patchify` cuts off.
        """
        self.check_pixels(pixels)
        tokens = self.tokens(list(pixels))
        moments = self.encode_tokens(tokens).moments
        quantized = None
        if self.quantizer is not None:
            quantized = self.quantizer(moments[:, : self.latent_channels].unflatten(0, (len(pixels), -1)))
            latents = quantized.vectors.flatten(0, 1)
        else:
            shape = (len(moments), self.latent_channels)
            latents = self.sample(moments, randn_tensor(shape, generator=generator, device=moments.device))  # type: ignore[arg-type]
        videos = torch.stack(self.pictures(self.decode_tokens(tokens.replace(latents))))
        restored = videos[:, :, : pixels.shape[2]] if pixels.ndim == 5 else videos[:, :, 0]
        return restored, moments if quantized is None else quantized

    def check_pixels(self, pixels: torch.Tensor) -> None:
        """Raises ValueError unless `pixels` are images `[B, 3, H, W]` or videos `[B, 3, T, H, W]`; see `patchify` for sizes."""
        channels = self.config.in_channels
        if pixels.ndim not in (4, 5) or pixels.shape[1] != channels or not pixels.is_floating_point():
            raise ValueError(
                f"`pixels` must be floating point, [B, {channels}, H, W] or [B, {channels}, T, H, W] in [-1, 1], got {pixels.dtype} of "
                f"shape {tuple(pixels.shape)}."
            )
        self.check_values(pixels)

    def check_codes(self, codes: Codes) -> None:
        """Raises ValueError unless `codes` are of this tokenizer's kind and width."""
        if self.quantizer is None:
            self.check_latents(codes)
            return
        if codes.ids is None or codes.ids.ndim != 3 or codes.ids.shape[2] != self.sub_codes:
            raise ValueError(
                f"`codes` must hold ids [B, N, {self.sub_codes}] of this tokenizer, one for each codebook and row."
            )
        self.check_id_values(codes.ids)
