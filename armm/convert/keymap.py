"""Converters as data: ordered rules from the authors' tensor names to ours, strict in both directions.

A rule is a pair of templates. `{i}` stands for a number and `{name}` for one dotted part; what the source matches is put into the
target. An optional operation changes the tensor or splits it over several targets. Because templates can be read backwards, an
error about one of our tensors names the authors' tensor that should have filled it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .containers import CheckpointKeysError, CheckpointShapeError

Operation = Callable[[torch.Tensor, Mapping[str, Any]], "torch.Tensor | tuple[torch.Tensor, ...]"]


def squeeze_convolution(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """Weight [out, in, 1, 1] of a 1x1 convolution as the weight [out, in] of a linear layer; biases stay."""
    if tensor.ndim == 4:
        if tensor.shape[2:] != (1, 1):
            raise CheckpointShapeError(f"expected a 1x1 convolution, got a kernel of {tuple(tensor.shape[2:])}")
        return tensor.flatten(1)
    return tensor


def split_qkv(tensor: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Rows of a fused projection: queries, keys, values, in the sizes `context["qkv_rows"]`."""
    rows = context["qkv_rows"]
    if tensor.shape[0] != sum(rows):
        raise CheckpointShapeError(f"expected {sum(rows)} rows ({' + '.join(map(str, rows))}), got {tensor.shape[0]}")
    return tensor.split(rows, dim=0)


def split_thirds(tensor: torch.Tensor, context: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Rows of a fused projection in which queries, keys and values have the same size."""
    if tensor.shape[0] % 3:
        raise CheckpointShapeError(f"expected queries, keys and values of equal size, got {tensor.shape[0]} rows")
    return tensor.chunk(3, dim=0)


def first_row(tensor: torch.Tensor, context: Mapping[str, Any]) -> torch.Tensor:
    """Learned tokens [1, N, D] as [N, D]."""
    if tensor.ndim != 3 or tensor.shape[0] != 1:
        raise CheckpointShapeError(f"expected [1, tokens, width], got {tuple(tensor.shape)}")
    return tensor[0]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Args:
        source: template of the authors' name.
        target: template of our name, one for each part the operation yields; None drops the tensor.
        operation: applied to the tensor.
    """

    source: str
    target: str | tuple[str, ...] | None
    operation: Operation | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        return () if self.target is None else (self.target,) if isinstance(self.target, str) else self.target

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return _compile(self.source)

    @cached_property
    def target_patterns(self) -> list[re.Pattern[str]]:
        return [_compile(target) for target in self.targets]

    def source_of(self, name: str) -> str | None:
        """The authors' name of our tensor `name`, if this rule fills it."""
        for pattern in self.target_patterns:
            match = pattern.fullmatch(name)
            if match:
                return self.source.format(**match.groupdict())
        return None


def _compile(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    pieces = [re.escape(part) if k % 2 == 0 else _group(part) for k, part in enumerate(parts)]
    return re.compile("".join(pieces))


def _group(name: str) -> str:
    return f"(?P<{name}>\\d+)" if len(name) == 1 else f"(?P<{name}>[^.]+)"


def apply_rules(
    state: Mapping[str, torch.Tensor], rules: tuple[Rule, ...], context: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Our names -> tensors. A name that no rule matches is a `CheckpointKeysError` listing all of them."""
    converted: dict[str, torch.Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        for rule in rules:
            match = rule.pattern.fullmatch(name)
            if match:
                break
        else:
            unknown.append(name)
            continue
        if rule.target is None:
            continue
        try:
            result = tensor if rule.operation is None else rule.operation(tensor, context or {})
        except CheckpointShapeError as error:
            raise CheckpointShapeError(f"{name}: {error}") from error
        values = result if isinstance(result, tuple) else (result,)
        for target, value in zip(rule.targets, values, strict=True):
            converted[target.format(**match.groupdict())] = value
    if unknown:
        raise CheckpointKeysError(f"unknown tensors in the checkpoint: {_listed(unknown)}.", unknown=sorted(unknown))
    return converted


def load_strict(
    module: nn.Module,
    converted: Mapping[str, torch.Tensor],
    rules: tuple[Rule, ...],
    *,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Fills `module` (which may live on the meta device) with copies of `converted`; every name and shape must fit.

    Args:
        dtype: of the parameters; None keeps the file's where all tensors agree and takes float32 where they do not.
    """
    expected = module.state_dict()
    missing = sorted({_source(name, rules) for name in expected.keys() - converted.keys()})
    unknown = sorted({_source(name, rules) for name in converted.keys() - expected.keys()})
    if missing or unknown:
        parts = [f"missing {_listed(missing)}"] if missing else []
        parts += [f"unknown {_listed(unknown)}"] if unknown else []
        raise CheckpointKeysError(
            f"the checkpoint does not fit its family: {'; '.join(parts)}.", missing=missing, unknown=unknown
        )
    wrong = [
        f"{_source(name, rules)} is {tuple(converted[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if converted[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointShapeError(f"tensors of the wrong shape: {'; '.join(wrong[:8])}.")
    if dtype is None:
        dtypes = {tensor.dtype for tensor in converted.values() if tensor.is_floating_point()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    keep_float32 = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    copies = {}
    for name, tensor in converted.items():
        target = torch.float32 if keep_float32.intersection(name.split(".")) else dtype
        copies[name] = tensor.to(target if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
    module.load_state_dict(copies, strict=True, assign=True)
    return module.eval()


def _source(name: str, rules: tuple[Rule, ...]) -> str:
    return next((source for rule in rules if (source := rule.source_of(name))), name)


def _listed(names: list[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
