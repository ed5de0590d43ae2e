"""FLOPs are those that PyTorch's own counter finds, and those of the kernels that it does not know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dit_booth.cost.flops import Flops
from dit_booth.testing import trial

torch.set_num_threads(1)


def counted(module: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """FLOPs of forward and backward: ours and PyTorch's."""
    with Flops() as ours:
        module(*inputs).square().sum().backward()
    with FlopCounterMode(display=False) as theirs:
        module(*inputs).square().sum().backward()
    return ours.total, theirs.get_total_flops()


def test_layers_as_pytorch_counts_them() -> None:
    images, tokens = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    for module, x in ((convolutions, images), (nn.Linear(8, 3), tokens)):
        ours, theirs = counted(module, x)
        assert ours == theirs > 0


def test_a_convolution_in_groups() -> None:
    """Forward, and for each gradient: 8 x 8 places, nine weights for each channel that a group reads."""
    for conv, each in (
        (nn.Conv2d(6, 6, 3, padding=1, groups=6), 1),
        (nn.Conv2d(6, 12, 3, padding=1, groups=2), 6),
    ):
        for learns, gradients in ((True, 2), (False, 1)):
            conv.weight.requires_grad_(learns)
            with Flops() as counter:
                conv(torch.randn(2, 6, 8, 8, requires_grad=True)).sum().backward()
            assert counter.total == (1 + gradients) * 2 * (2 * 8 * 8 * 9 * 6 * each)


@pytest.mark.parametrize("backbone", ["dit-joint", "unet"])
def test_a_network_as_pytorch_counts_it(backbone: str) -> None:
    """Once it is told of the kernel that the CPU's text tower uses."""
    ops = torch.ops.aten
    told = {
        ops._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        ops._scaled_dot_product_flash_attention_for_cpu_backward: lambda dout, q, k, v, *_, **__: (
            sdpa_backward_flop_count(dout, q, k, v)
        ),
    }
    run = trial("token_replacement+kv_concat", backbone)
    arguments = (run.x, run.t, run.prompt, run.reference())
    with Flops() as ours:
        run.model(*arguments).output.square().sum().backward()
    with FlopCounterMode(display=False, custom_mapping=told) as theirs:
        run.model(*arguments).output.square().sum().backward()
    assert ours.total == theirs.get_total_flops() > 1e6


def test_counting_changes_no_digit() -> None:
    """PyTorch's counter breaks operations up."""
    run = trial("kv_concat", "unet")
    with torch.no_grad():
        plain = run(run.reference())
        with Flops() as counter:
            assert torch.equal(run(run.reference()), plain)
    assert counter.total > 1e6


def test_the_cpu_s_flash_attention() -> None:
    """Two products of (6 x 4) and (4 x 5) numbers for each of 2 x 3 heads; five for the backward pass."""
    q, k = torch.randn(2, 3, 6, 4, requires_grad=True), torch.randn(2, 3, 5, 4, requires_grad=True)
    with Flops() as counter:
        out = scaled_dot_product_attention(q, k, k)
        assert counter.total == 2 * 6 * (2 * 6 * 4 * 5)
        out.sum().backward()
    assert counter.total == (2 + 5) * 6 * (2 * 6 * 4 * 5)


def test_our_own_kernel() -> None:
    q, k = torch.zeros(2, 3, 6, 4, device="meta"), torch.zeros(2, 3, 5, 4, device="meta")
    with Flops() as counter:
        out, lse = torch.ops.dit_booth.short_attention(q, k, k, 1.0)
        assert counter.total == 2 * 6 * (2 * 6 * 4 * 5)
        torch.ops.dit_booth.short_attention_backward(out, q, k, k, out, lse, 1.0)
    assert counter.total == (2 + 5) * 6 * (2 * 6 * 4 * 5)


def test_operations_on_the_meta_device_run_once_for_a_shape() -> None:
    """And return the same layouts: two blocks alike, then on other strides, another dtype and with a frozen input."""

    def gradients(x: Tensor, norm: nn.Module, conv: nn.Module, trained: bool) -> list[Tensor]:
        out = conv(norm(x))
        out = out.softmax(1) + out.logsumexp(1, keepdim=True) + conv(norm(x)).sum(1, keepdim=True)
        wanted = [x] * trained + list(norm.parameters())
        return [out, *torch.autograd.grad(out, wanted, out)]

    for dtype in (torch.float32, torch.float64):
        x = torch.empty(2, 4, 6, 6, device="meta", dtype=dtype)
        with torch.device("meta"):
            norm, conv = nn.GroupNorm(2, 4, dtype=dtype), nn.Conv2d(4, 5, 3, padding=1, dtype=dtype)
        counter = Flops()
        for given in (x, x.to(memory_format=torch.channels_last)):
            for trained in (False, True):
                leaf = given.detach().requires_grad_(trained)
                theirs = gradients(leaf, norm, conv, trained)
                with counter:
                    ours = gradients(leaf, norm, conv, trained)
                for a, b in zip(ours, theirs, strict=True):
                    assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        called = [key[0] for key in counter.known]
        assert (
            called.count(torch.ops.aten.native_group_norm.default) == 2
        )  # of two memory formats, in eight calls


def test_values_are_never_taken_for_known() -> None:
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.no_grad(), Flops() as counter:
        assert torch.equal(linear(x), linear(x)) and not torch.equal(linear(x), linear(-x))
    assert not counter.known
