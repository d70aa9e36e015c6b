"""A GPU that is pretended: tensors that say they are on "cuda" and are computed on the CPU.

Inside `pretend_cuda()` what a program does with the device "cuda" works on a machine that has none, and what would fail on a real one
for mixing devices fails as well: tensors of two devices in one operation, a generator of another device. Results are the CPU's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
# Indices may be on the CPU; single numbers may be, too, except where tensors are joined.
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
JOINED = {"aten::cat", "aten::stack"}
FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
TO_NUMBERS = {Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__}
# After these the host waits for the device.
SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_unique2", "aten::masked_select"}


class PretendTensor(Tensor):
    """A tensor on the pretended GPU; `elem` holds its values."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> PretendTensor:
        options = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype}
        # To C++ it is on the device "meta", which needs no driver.
        out = Tensor._make_wrapper_subclass(cls, elem.size(), **options, device="meta")
        out.elem = elem
        return out

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"PretendTensor({self.elem!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, Counter())

    __torch_function__ = torch._C._disabled_torch_function_impl


class PretendGenerator(torch.Generator):
    """A generator that says it is on the pretended GPU if it was asked to be."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, device="cpu")

    def __init__(self, device="cpu") -> None:
        self._device = CUDA if is_cuda(device) else CPU

    @property
    def device(self) -> torch.device:
        return self._device


def is_cuda(device) -> bool:
    # C++ asks for "meta" where it asks for the device of a pretended tensor.
    return device is not None and torch.device(device).type in ("cuda", "meta")


def unwrap(value):
    return value.elem if isinstance(value, PretendTensor) else value


def shapes(tensors) -> list:
    return [(str(tensor.device), tuple(tensor.shape)) for tensor in tensors]


def run(func, args, kwargs, syncs: Counter):
    """One operation, checked, on the values."""
    name = func._schema.name
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_cuda = any(isinstance(tensor, PretendTensor) for tensor in tensors)
    strangers = [t for t in tensors if not isinstance(t, PretendTensor) and (t.dim() or name in JOINED)]
    if on_cuda and strangers and func not in COPIES:
        if not (name in INDEXED and isinstance(args[0], PretendTensor)):
            raise RuntimeError(f"Expected all tensors of {func} to be on the same device, got {shapes(tensors)}")
        syncs[name] += 1
    device = kwargs.get("device")
    target = on_cuda if device is None else is_cuda(device)
    copied = (
        func in COPIES
        and (target != on_cuda or (on_cuda and strangers))
        and not kwargs.get("non_blocking", len(args) > 2 and args[2])
    )
    if copied or (on_cuda and name in SYNCS):
        syncs[name] += 1
    values, options = tree_map(unwrap, (args, kwargs))
    if device is not None:
        options["device"] = CPU
    for option in ("non_blocking", "pin_memory"):
        if option in options:
            options[option] = False
    out = func(*values, **options)
    if func is aten._to_copy.default and on_cuda != target and out is values[0]:
        out = out.clone()
    written = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.returns):
        return written[0] if len(func._schema.returns) == 1 else tuple(written)
    if not target:
        return out
    return tree_map(lambda value: PretendTensor(value) if isinstance(value, Tensor) else value, out)


class _Dispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.syncs)


class _Functions(TorchFunctionMode):
    """What cannot be seen by the dispatcher, or cannot do without a driver: the class of generators, tensors made from Python's
    numbers, indexing."""

    def __init__(self, syncs: Counter) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        here = tensors[0].device if tensors else CPU
        if kwargs.get("device") is not None:
            kwargs["device"] = here = CUDA if is_cuda(kwargs["device"]) else torch.device(kwargs["device"])
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and is_cuda(here) != is_cuda(generator.device):
            raise RuntimeError(f"{func.__name__}: expected a generator on {here}, got one on {generator.device}")
        if func in FROM_NUMBERS and is_cuda(here):
            if func is not Tensor.new_tensor and isinstance(args[0], Tensor):
                return args[0].to(**kwargs)
            data = args[0] if func is not Tensor.new_tensor else args[1]
            dtype = kwargs.get("dtype") or (args[0].dtype if func is Tensor.new_tensor else None)
            return PretendTensor(torch.tensor(data, dtype=dtype, device="cpu"))
        if func in TO_NUMBERS and is_cuda(here):
            return func(args[0].to(CPU), *args[1:])
        if func in (Tensor.numpy, Tensor.__array__) and is_cuda(here):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and any(
            isinstance(tensor, PretendTensor) for tensor in tensors
        ):
            return self._index(func, args)
        if func is Tensor.cuda:
            return args[0].to(CUDA)
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)) and is_cuda(args[1]):
            args = (args[0], CUDA, *args[2:])
        return func(*args, **kwargs)

    def _index(self, func, args):
        given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if not isinstance(args[0], PretendTensor):
            raise RuntimeError(
                f"{func.__name__}: indices on cuda:0 (or a value) for a tensor on the CPU, {shapes(given)}"
            )
        for place, tensor in enumerate(given[1:]):
            value = func is Tensor.__setitem__ and place == len(given) - 2
            if not isinstance(tensor, PretendTensor) and tensor.dim():
                self.syncs["cpu value" if value else "cpu indices"] += 1
            if tensor.dtype == torch.bool and not value:
                self.syncs["boolean index"] += 1
        with torch._C.DisableTorchFunction():
            out = func(*tree_map(unwrap, args))
        return None if out is None else PretendTensor(out)


@contextmanager
def pretend_cuda() -> Iterator[Counter]:
    """Yields how many times the host waited for the device, by operation."""
    dispatch = _Dispatch()
    with (
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.Generator", PretendGenerator),
        mock.patch("torch.__future__._overwrite_module_params_on_conversion", True),
        _Functions(dispatch.syncs),
        dispatch,
    ):
        yield dispatch.syncs
