"""What every model around the shared trunk has: diffusers' bookkeeping, fused inference, attention backends, adapters."""

from __future__ import annotations

from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from armm.nn.int8_weights import Int8Weights
from armm.transformer import ARTransformer

__all__ = ["TrunkModel"]


class TrunkModel(Int8Weights, ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A model with a `trunk` (`ARTransformer`) and a `head`. Subclasses add what turns a request into embeddings.

    Models of several stacks name them in `stacks` instead of having a trunk.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _repeated_blocks = ["Block"]
    _skip_keys = ["cache"]
    # Blocks of the stacks are cast. What stands around them is small, and its parameters are also used without its forward.
    _skip_layerwise_casting_patterns = [
        "norm",
        "position_embedding",
        r"^\w*(embedding|projection|position|head|shuffle|tokens)\b",
    ]
    # Its hooks wait for the model's forward or that of each layer; strategies call other parts. Model offload works.
    _supports_group_offloading = False

    trunk: ARTransformer
    head: nn.Module

    @property
    def stacks(self) -> tuple[ARTransformer, ...]:
        """The transformers of the model."""
        return (self.trunk,)

    def __getattr__(self, name: str):
        # Submodules only: diffusers would also look in the config, where an entry may have a submodule's name.
        return nn.Module.__getattr__(self, name)

    def fuse_projections(self) -> None:
        """Prepare for fast inference; see `ARTransformer.fuse_projections`. Parameters keep their names."""
        for stack in self.stacks:
            stack.fuse_projections()
        self.head.fuse()

    def unfuse_projections(self) -> None:
        for stack in self.stacks:
            stack.unfuse_projections()
        self.head.unfuse()

    def set_attention_backend(self, backend: str) -> None:
        """As of `ARTransformer`, in all transformers of the model: those of heads as well."""
        for module in self.modules():
            if isinstance(module, ARTransformer):
                module.set_attention_backend(backend)

    def reset_attention_backend(self) -> None:
        for module in self.modules():
            if isinstance(module, ARTransformer):
                module.reset_attention_backend()

    def enable_layerwise_casting(self, *args, **kwargs) -> None:
        self.unfuse_projections()
        super().enable_layerwise_casting(*args, **kwargs)

    def add_adapter(self, *args, **kwargs) -> None:
        self.unfuse_projections()
        super().add_adapter(*args, **kwargs)

    def load_lora_adapter(self, *args, **kwargs):
        self.unfuse_projections()
        return super().load_lora_adapter(*args, **kwargs)
