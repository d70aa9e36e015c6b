"""`KVCache` under the path that models and strategies know it by; it lives in `armm.nn`, where tokenizers that decode step by step
may use it too."""

from __future__ import annotations

from armm.nn.cache import KVCache

__all__ = ["KVCache"]
