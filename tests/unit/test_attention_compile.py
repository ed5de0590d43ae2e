"""`attend` in torch.compile: one graph, forward and backward, without a break, whatever sizes come next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor

from dit_booth.attention import FramePlan, Segment, attend
from dit_booth.attention import joint_softmax as segments
from dit_booth.attention.kernels.choice import CPU_FLASH

torch.set_num_threads(1)
PLAN = FramePlan("first+previous")


def loss(
    kernel: str, q: Tensor, query: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor
) -> Tensor:
    frames = PLAN.frames(q.shape[1])
    image = Segment(image_k, image_v, ((0,),) * q.shape[1], query, 0.3)
    return attend(q, (Segment(k, v, frames), image), kernel).square().sum()


def tensors(b: int, f: int, n: int, m: int, d: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, f, n, 2, d)] * 4 + [(b, 1, m, 2, d)] * 2
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        ("torch_flash", [(1, 4, 12, 5), (2, 5, 20, 7, 8)]),
        ("math", [(2, 4, 12, 5)]),
    ],
)
def test_one_graph(kernel: str, sizes: list[tuple[int, ...]]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for size in sizes:
        x = tensors(*size)
        ours, theirs = (torch.autograd.grad(run(kernel, *x), x) for run in (compiled, loss))
        for mine, eager in zip(ours, theirs, strict=True):
            assert (mine - eager).abs().max() < 1e-5


def test_inductor() -> None:
    """In this process: two kernels take less time than the start of a pool of compilers."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    x = tensors(1, 3, 8, 5)
    with inductor.patch(compile_threads=1):
        ours, theirs = (torch.autograd.grad(run("torch_flash", *x), x) for run in (compiled, loss))
    for mine, eager in zip(ours, theirs, strict=True):
        assert (mine - eager).abs().max() < 1e-5


def test_the_softmax_is_not_traced() -> None:
    torch._dynamo.reset()
    names: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    x = tensors(2, 4, 12, 5)
    assert torch.equal(compiled("torch_flash", *x), loss("torch_flash", *x))
    assert sum("_joint_softmax" in name for name in names) == 1
    assert not any("attention" in name.replace("_joint_softmax", "") for name in names)


def test_a_kernel_that_cannot_be_traced_breaks_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash4 does, beside one that can be traced."""
    torch._dynamo.reset()
    hidden = replace(
        CPU_FLASH,
        forward=torch.compiler.disable(CPU_FLASH.forward),
        backward=torch.compiler.disable(CPU_FLASH.backward),
        traceable=False,
    )
    x = tensors(2, 4, 12, 5)
    ours = [torch.autograd.grad(torch.compile(loss, backend="aot_eager")("torch_flash", *x), x)]
    monkeypatch.setattr(segments, "choose_kernel", lambda *_: hidden)
    torch._dynamo.reset()
    ours += [torch.autograd.grad(torch.compile(loss, backend="aot_eager")("flash4", *x), x)]
    theirs = torch.autograd.grad(loss("flash4", *x), x)
    for a, b, eager in zip(*ours, theirs, strict=True):
        assert torch.equal(a, b)
        assert (a - eager).abs().max() < 1e-5
