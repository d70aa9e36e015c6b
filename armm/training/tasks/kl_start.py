"""KL tokenizers that go on from a trained VQ tokenizer: the same coders, without the codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizers_visual.kl_tokenizer import KLTokenizer
from tokenizers_visual.vq_tokenizer import VQTokenizer

_LOG_VARIANCE = -6.0


@torch.no_grad()
def kl_from_vq(tokenizer: VQTokenizer) -> KLTokenizer:
    """A tokenizer whose posterior's mean is the vector before quantization, with small equal variances.

    The 1x1 convolutions around the quantizer are merged with the 3x3 ones of the coders.
    """
    config = dict(tokenizer.config)
    if config["encoder_multipliers"] != config["decoder_multipliers"]:
        raise ValueError(
            "`model.start`: a KL tokenizer has equal coders, but encoder_multipliers and decoder_multipliers differ."
        )
    shared = (
        "in_channels",
        "base_channels",
        "num_res_blocks",
        "encoder_attention",
        "decoder_attention",
        "mid_attention",
    )
    channels = tokenizer.latent_channels
    new = KLTokenizer(
        **{name: config[name] for name in (*shared, "decoder_res_blocks", "norm_groups", "patch_size")},
        channel_multipliers=config["encoder_multipliers"],
        latent_channels=channels,
    )
    stored = tokenizer.state_dict()
    weight, bias = _projected(tokenizer.quant_conv, tokenizer.encoder.conv_out)
    stored["encoder.conv_out.weight"] = torch.cat([weight, torch.zeros_like(weight)])
    stored["encoder.conv_out.bias"] = torch.cat([bias, torch.full_like(bias, _LOG_VARIANCE)])
    inner, outer = tokenizer.post_quant_conv, tokenizer.decoder.conv_in
    stored["decoder.conv_in.weight"] = torch.einsum("ozhw,zc->ochw", outer.weight, inner.weight[:, :, 0, 0])
    stored["decoder.conv_in.bias"] = outer.bias + torch.einsum("ozhw,z->o", outer.weight, inner.bias)
    for name in ("quant_conv", "post_quant_conv"):
        conv = getattr(new, name)
        stored[f"{name}.weight"] = torch.eye(conv.out_channels)[:, :, None, None]
        stored[f"{name}.bias"] = torch.zeros(conv.out_channels)
    new.load_state_dict({name: stored[name].float() for name in new.state_dict()})
    return new


def _projected(outer: nn.Conv2d, inner: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of `inner` followed by the 1x1 convolution `outer`, as one."""
    mix = outer.weight[:, :, 0, 0]
    return torch.einsum("cz,zihw->cihw", mix, inner.weight), outer.bias + mix @ inner.bias
