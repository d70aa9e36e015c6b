"""The key/value cache against a naive one made of lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armm.cache import KVCache

LAYERS, HEADS, SIZE, CAPACITY = 2, 2, 3, 12


class NaiveCache:
    """rows[layer][row] is a list of (key, value) pairs of one position."""

    def __init__(self, batch):
        self.rows = [[[] for _ in range(batch)] for _ in range(LAYERS)]

    def append(self, layer, key, value, discard):
        visible = []
        for row, kept in enumerate(self.rows[layer]):
            new = [(key[row, :, i], value[row, :, i]) for i in range(key.shape[2])]
            visible.append(kept + new)
            self.rows[layer][row] = kept + new[: len(new) - discard]
        stack = lambda which: torch.stack([torch.stack([p[which] for p in row], dim=1) for row in visible])  # noqa: E731
        return stack(0), stack(1)

    def crop(self, length):
        self.rows = [[row[:length] for row in layer] for layer in self.rows]

    def reorder(self, rows):
        self.rows = [[list(layer[i]) for i in rows] for layer in self.rows]


operation = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 3), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("crop"), st.integers(0, 8)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.just(2)),
    st.tuples(st.just("narrow"), st.just(1)),
    st.tuples(st.just("reset")),
)


@settings(max_examples=40, deadline=None)
@given(operations=st.lists(operation, min_size=1, max_size=10), seed=st.integers(0, 999))
def test_against_the_naive_cache(operations, seed):
    torch.manual_seed(seed)
    cache, naive = KVCache.allocate(LAYERS, 2, HEADS, CAPACITY, SIZE), NaiveCache(2)
    for name, *arguments in operations:
        if name == "append":
            new, discard, packed = arguments[0], min(arguments[1], arguments[0]), arguments[2]
            if cache.length + new > CAPACITY:
                continue
            for layer in range(LAYERS):
                key, value = torch.randn(2, cache.batch, HEADS, new, SIZE)
                if packed:
                    got = cache.append_packed(layer, torch.stack([key, value]), discard)
                else:
                    got = cache.append(layer, key, value, discard)
                for ours, theirs in zip(got, naive.append(layer, key, value, discard), strict=True):
                    assert torch.equal(ours, theirs)
        elif name == "crop":
            cache.crop(arguments[0])
            naive.crop(arguments[0])
        elif name == "reset":
            cache.reset()
            naive.crop(0)
        else:
            if name == "reorder":
                rows = [row % cache.batch for row in arguments[0]]
                cache.reorder(torch.tensor(rows))
            elif name == "repeat":
                if cache.batch > 4:
                    continue
                rows = [row for row in range(cache.batch) for _ in range(arguments[0])]
                cache.repeat(arguments[0])
            else:
                rows = list(range(arguments[0]))
                cache.narrow(arguments[0])
            naive.reorder(rows)
        assert cache.batch == len(naive.rows[0])
        assert cache.lengths == [len(layer[0]) for layer in naive.rows]


def test_layers_may_differ_in_length():
    cache = KVCache.allocate(2, 1, 1, 8, 2)
    cache.append(0, *torch.randn(2, 1, 1, 5, 2))
    cache.append(1, *torch.randn(2, 1, 1, 5, 2))
    cache.crop(3, layer=1)
    assert cache.lengths == [5, 3]
    assert cache.length == 5
    assert cache.append(1, *torch.randn(2, 1, 1, 1, 2))[0].shape[2] == 4


def test_reading_copies_nothing():
    cache = KVCache.allocate(1, 1, 1, 8, 2)
    keys, _ = cache.append(0, *torch.randn(2, 1, 1, 3, 2))
    assert keys.untyped_storage().data_ptr() == cache.buffer.untyped_storage().data_ptr()


def test_errors_say_what_is_wrong():
    cache = KVCache.allocate(1, 1, 1, 4, 2)
    cache.append(0, *torch.randn(2, 1, 1, 3, 2))
    with pytest.raises(ValueError, match="holds 3 of 4 positions and cannot take 2 more"):
        cache.append(0, *torch.randn(2, 1, 1, 2, 2))
    with pytest.raises(ValueError, match="discard must be between 0 and the 1 new"):
        cache.append(0, *torch.randn(2, 1, 1, 1, 2), discard=2)
    with pytest.raises(ValueError, match="length must not be negative"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="rows must be between 1 and 1"):
        cache.narrow(2)
    with pytest.raises(ValueError, match="buffer must be"):
        KVCache(torch.zeros(2, 2))
    assert cache.lengths == [3]
