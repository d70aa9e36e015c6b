"""What every acceleration has: its name, which pipelines it fits, and the settings its authors use it with."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

__all__ = ["Acceleration"]


class Acceleration:
    """Base of what `ARPipeline.enable_acceleration` takes. A pipeline lists the classes it supports in `_accelerations`.

    Attributes:
        name: for messages.
        settings: settings of a call (see `ARPipeline.generation_config`) that go with the acceleration; they stand between those
            of the checkpoint and the arguments of the call.
    """

    name: ClassVar[str] = "acceleration"
    settings: Mapping[str, Any] = MappingProxyType({})

    def check(self, pipe: Any) -> None:
        """Raises ValueError where the components of `pipe` cannot be accelerated like this."""

    def strategy(self, pipe: Any) -> Any:
        """The decoding strategy of a call of `pipe`: its own, or what takes its place."""
        return pipe.decoding
