"""The key/value cache: a value owned by one generation, never a buffer of a module."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer in one preallocated buffer [layers, 2, B, Hkv, length, d].

    Lengths are kept per layer, as plain integers. Nothing is copied to read: `append` returns views of what is visible.
    """

    __slots__ = ("_slots", "_visible", "_window", "buffer", "capacity", "lengths")

    def __init__(self, buffer: Tensor) -> None:
        if buffer.dim() != 6 or buffer.shape[1] != 2:
            raise ValueError(
                f"buffer must be [layers, 2, batch, kv_heads, length, head_dim], got {tuple(buffer.shape)}"
            )
        self.lengths = [0] * buffer.shape[0]
        self._set(buffer)

    def _set(self, buffer: Tensor) -> None:
        self.buffer = buffer
        self.capacity = buffer.shape[4]
        self._window: tuple[int, int] | None = None
        self._slots: tuple[Tensor, ...] = ()
        self._visible: tuple[Tensor, ...] = ()

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        length: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        return cls(torch.empty(num_layers, 2, batch, num_kv_heads, length, head_dim, dtype=dtype, device=device))

    @property
    def batch(self) -> int:
        return self.buffer.shape[2]

    @property
    def length(self) -> int:
        """The number of positions kept (of the longest layer where layers differ)."""
        return max(self.lengths)

    def append(self, layer: int, key: Tensor, value: Tensor, discard: int = 0) -> tuple[Tensor, Tensor]:
        """Write `key`, `value` [B, Hkv, N, d] behind what is kept and return views of everything visible.

        The last `discard` of the new positions are visible now, but will be overwritten by the next call.
        """
        slot, keys, values = self._claim(layer, key.shape[2], discard)
        slot[0].copy_(key)
        slot[1].copy_(value)
        return keys, values

    def append_packed(self, layer: int, keys_values: Tensor, discard: int = 0) -> tuple[Tensor, Tensor]:
        """`append` for keys and values stacked in one tensor [2, B, Hkv, N, d]."""
        slot, keys, values = self._claim(layer, keys_values.shape[3], discard)
        slot.copy_(keys_values)
        return keys, values

    def _claim(self, layer: int, new: int, discard: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where to write `new` positions of a layer, and the keys and values visible once they are written."""
        start = self.lengths[layer]
        if start + new > self.capacity:
            raise ValueError(
                f"the cache of layer {layer} holds {start} of {self.capacity} positions and cannot take {new} more; "
                "allocate a longer cache or crop it first"
            )
        if not 0 <= discard <= new:
            raise ValueError(f"discard must be between 0 and the {new} new positions, got {discard}")
        self.lengths[layer] = start + new - discard
        if self._window != (start, new):
            # The layers mostly ask for the same window one after the other: make the views of all of them at once.
            self._window = (start, new)
            self._slots = self.buffer.narrow(4, start, new).unbind(0)
            self._visible = self.buffer.narrow(4, 0, start + new).flatten(0, 1).unbind(0)
        return self._slots[layer], self._visible[2 * layer], self._visible[2 * layer + 1]

    def crop(self, length: int, layer: int | None = None) -> None:
        """Forget every position from `length` on (of one layer, or of all)."""
        if length < 0:
            raise ValueError(f"length must not be negative, got {length}")
        layers = range(len(self.lengths)) if layer is None else [layer]
        for index in layers:
            self.lengths[index] = min(self.lengths[index], length)

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy the positions `source` [B, K] of every row to `target` [B, K], in all layers; lengths stay as they are.

        Targets that repeat must have equal sources.
        """
        rows = torch.arange(self.batch, device=self.buffer.device)[:, None]
        self.buffer[:, :, rows, :, target] = self.buffer[:, :, rows, :, source]

    def reset(self) -> None:
        self.crop(0)

    def reorder(self, rows: Tensor) -> None:
        """Row i of the cache becomes what row `rows[i]` was; rows may repeat or be left out."""
        self._set(self.buffer.index_select(2, rows.to(device=self.buffer.device, dtype=torch.long)))

    def repeat(self, times: int) -> None:
        """Every row becomes `times` equal neighbouring rows."""
        self._set(self.buffer.repeat_interleave(times, dim=2))

    def narrow(self, rows: int) -> None:
        """Keep the first `rows` rows only; nothing is copied."""
        if not 0 < rows <= self.batch:
            raise ValueError(f"rows must be between 1 and {self.batch}, got {rows}")
        self._set(self.buffer.narrow(2, 0, rows))
