"""Count FLOPs of all operations that PyTorch dispatches, by PyTorch's formulas and some that it lacks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import dit_booth.attention.kernels.short  # noqa: F401 (registers its operators)

Operator = Callable[..., Any]


class Flops(TorchDispatchMode):
    """Count FLOPs while it is entered, on any device, the meta device included.

    The sum equals that of `torch.utils.flop_counter.FlopCounterMode`, which follows modules, breaks
    operations up (and so changes last digits), and takes nearly twice as long.
    An attention kernel that hides from the dispatcher (flash, flash4) counts as nothing.
    On the meta device an operation runs once for every shape: many are Python and take milliseconds.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.formulas = formulas()
        self.known: dict[Hashable, list[Layout | None]] = {}

    def __torch_dispatch__(
        self,
        func: Operator,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        out = self._run(func, args, given)
        if formula := self.formulas.get(getattr(func, "_overloadpacket", func)):
            self.total += formula(*args, **given, out_val=out)
        return out

    def _run(self, func: Operator, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        parts: list[Hashable] = [func]
        for part in layouts((*args, *kwargs.items())) if makes_tensors(func) else ():
            if part is None:
                return func(*args, **kwargs)
            parts.append(part)
        if not any(isinstance(part, Layout) for part in parts):
            return func(*args, **kwargs)
        key = tuple(parts)
        if key not in self.known:
            out = func(*args, **kwargs)
            self.known[key] = [Layout.of(t) for t in ([out] if isinstance(out, Tensor) else out)]
            return out
        first, *others = (layout and layout.tensor() for layout in self.known[key])
        return (first, *others) if others else first


class Layout(NamedTuple):
    """Layout of a tensor on the meta device: shape, strides, dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor | None) -> Layout | None:
        return None if t is None else cls(tuple(t.shape), t.stride(), t.dtype)

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def layouts(values: Iterable[object]) -> Iterator[Hashable]:
    """Yield what an operation's result depends on: layouts of tensors, other values; None for a tensor with values."""
    for value in values:
        if isinstance(value, Tensor):
            yield Layout.of(value) if value.is_meta else None
        elif isinstance(value, (list, tuple)):
            yield len(value)
            yield from layouts(value)
        else:
            yield type(value), value  # 1 is not 1.0


@cache
def makes_tensors(func: Operator) -> bool:
    """Return True if an operator returns new tensors only, and changes none that it is given."""
    schema = getattr(func, "_schema", None)
    return bool(
        schema
        and schema.returns
        and not schema.is_mutable
        and all(str(r.type) == "Tensor" and r.alias_info is None for r in schema.returns)
    )


@cache
def formulas() -> Mapping[Operator, Callable[..., int]]:
    """Return operator -> its FLOPs as a function of its arguments and its result (`out_val`)."""
    ops, ours = torch.ops.aten, torch.ops.dit_booth
    return {
        **flop_registry,
        ops._scaled_dot_product_flash_attention_for_cpu: _forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        ops.convolution_backward: convolution_backward,
        ours.short_attention: _forward,
        ours.short_attention_backward: _backward,
    }


def convolution_backward(dout: Tensor, x: Tensor, weight: Tensor, *more: Any, **_: object) -> int:
    """Count as many FLOPs as forward for each gradient (PyTorch's formula forgets the groups)."""
    transposed, mask = more[4], more[-1]
    forward = conv_flop_count(list(x.shape), list(weight.shape), list(dout.shape), transposed=transposed)
    return int(forward * sum(mask[:2]))


def _forward(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(dout.shape, q.shape, k.shape, v.shape))
