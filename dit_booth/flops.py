"""FLOPs of what PyTorch's dispatcher sees, by PyTorch's own formulas and two for the attention kernels they lack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import dit_booth.attention.short_kernel  # noqa: F401 (registers its operators)


class Flops(TorchDispatchMode):
    """Counts while it is entered, on any device, the meta device included.

    The same sum as `torch.utils.flop_counter.FlopCounterMode` makes, which follows modules, breaks
    operations up (and so changes last digits), and takes nearly twice as long.
    An attention kernel that hides from the dispatcher (flash, flash4) counts as nothing.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas = formulas()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        if formula := self.formulas.get(getattr(func, "_overloadpacket", func)):
            self.total += formula(*args, **given, out_val=out)
        return out


@cache
def formulas() -> Mapping[Any, Callable[..., int]]:
    """By operator: its FLOPs from its arguments and its result (`out_val`)."""
    ops, ours = torch.ops.aten, torch.ops.dit_booth
    return {
        **flop_registry,
        ops._scaled_dot_product_flash_attention_for_cpu: _forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
        ours.short_attention: _forward,
        ours.short_attention_backward: _backward,
    }


def _forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(dout.shape, q.shape, k.shape, v.shape))
