"""Marks that tell torch.compile how to treat a function, importing the compiler only where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Let torch.compile call the function and keep its result as a constant of the graph, instead of tracing it.

    The mark is that of ``torch.compiler.assume_constant_result``, which would import the compiler: two seconds of every
    start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: Function) -> Function:
    """Let torch.compile break the graph at the function instead of tracing it. Imports the compiler."""
    disable: Callable[[Function], Function] = torch.compiler.disable
    return disable(function)


def allow_in_graph(function: Callable[..., object]) -> None:
    """Let torch.compile put the function into the graph as one node. Imports the compiler."""
    allow: Callable[[Callable[..., object]], object] = torch.compiler.allow_in_graph
    allow(function)
