"""Every kernel that a GPU has, against the dense float64 oracle: results and gradients.

Skipped where there is no CUDA device; needs nothing but PyTorch there (kernels of packages that are not installed, or
that the device is too old for, are skipped one by one):  pytest tests/unit/test_attention_cuda.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from attention_oracle import LENGTHS, Case, errors, random_case
from torch import Tensor

from dit_booth.attention import FramePlan, Segment, attend
from dit_booth.attention.kernels import torch_ops
from dit_booth.attention.kernels.choice import TABLE, choose_kernel
from dit_booth.attention.policy import CUDA, Policy

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)  # once, not five hundred times

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LIMITS = {BF16: 0.15, F16: 0.02, F32: 2e-4}
"""Largest error as a share of the root mean square. Half precisions round inputs alike on both sides."""

LONG = ("flash4", "flash", "cudnn", "torch_flash", "torch_efficient", "math")
KERNELS = ("short", *LONG)
PLANS = (
    "self",
    "first",
    "first+previous",
    "self+first",
    "window(3)",
    "keyframes(3)",
    "sink(1)+window(2)",
    "all",
)


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def skip_unless(kernel: str, dtype: torch.dtype, head: int) -> None:
    try:
        choose_kernel(kernel, torch.device("cuda", torch.cuda.current_device()), dtype, head, True, longest=1)
    except ValueError as reason:
        pytest.skip(str(reason))


def check(case: Case, kernel: str, dtype: torch.dtype, policy: Policy = CUDA) -> None:
    """Ours on the GPU in a dtype, the oracle's on the CPU in float64, of the same rounded values."""
    low = case.to(dtype, "cuda")
    out, gradient = errors(lambda q, s: attend(q, s, kernel, policy=policy), low, low.to(torch.float64))
    assert out < LIMITS[dtype]
    assert gradient < LIMITS[dtype]


def video(plan: str, frames: int, n: int, m: int, head: int, batch: int = 1, heads: int = 2) -> Case:
    """A plan with an image for all frames, in the layout that projections give."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, frames, n, heads, head)] * 3 + [(batch, 1, m, heads, head)] * 2
    q, k, v, image_k, image_v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    image = Segment(image_k, image_v, ((0,),) * frames)
    return Case(q, [Segment(k, v, FramePlan(plan).frames(frames)), image], [])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("head", [8, 12, 16, 24, 40, 64, 72, 80, 96, 128])
def test_head_sizes(kernel: str, dtype: torch.dtype, head: int) -> None:
    skip_unless(kernel, dtype, head)
    lengths = (1, 2, 3, 5, 7, 12) if kernel == "short" else LENGTHS  # 5 frames and groups at most
    for seed in range(3):
        check(random_case(seed, sizes=(head,), lengths=lengths), kernel, dtype)


@pytest.mark.parametrize("kernel", LONG)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(kernel: str, dtype: torch.dtype, plan: str) -> None:
    skip_unless(kernel, dtype, 64)
    check(video(plan, 9, 65, 33, 64), kernel, dtype)


@pytest.mark.parametrize("kernel", LONG)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("lengths", [(1, 1), (127, 129), (31, 257), (300, 5)])
def test_odd_lengths(kernel: str, dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    skip_unless(kernel, dtype, 64)
    check(video("first+previous", 4, *lengths, 64), kernel, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shifts", [False, True])
def test_batches_sample_by_sample_in_pieces_and_in_shifts(kernel: str, shifts: bool) -> None:
    dtype = F32 if kernel == "torch_efficient" else BF16
    skip_unless(kernel, dtype, 64)
    n, m = (12, 10) if kernel == "short" else (40, 24)
    for copy_below in (0, 1 << 40):
        for piece in (1, 1 << 40):
            policy = replace(CUDA, shifts=shifts, copy_below=copy_below, call_elements=piece)
            check(video("first+previous", 5, n, m, 64, batch=2), kernel, dtype, policy)


@pytest.mark.parametrize("kernel", KERNELS)
def test_batches_larger_than_a_launch(kernel: str) -> None:
    """Temporal attention: a row per place, a group of a few frames."""
    dtype = F32 if kernel == "torch_efficient" else BF16
    skip_unless(kernel, dtype, 16)
    rows = torch_ops.MAX_LAUNCH_ROWS + 9
    q, k, v = (
        torch.randn(rows, 1, 4, 1, 16, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)
    )
    seen = [Segment(k, v, ((0,),))]
    ours = torch.autograd.grad(attend(q, seen, kernel).float().square().sum(), (q, k, v))
    exact = torch.autograd.grad(attend(q, seen, "math").float().square().sum(), (q, k, v))
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).abs().max() < LIMITS[dtype] * max(1.0, theirs.abs().max().item())


# ---- short sequences ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("head", [8, 64, 72, 128])
@pytest.mark.parametrize("lengths", [(1, 1), (7, 17), (16, 16), (17, 64), (33, 5), (64, 64)])
def test_lengths_of_the_short_kernel(dtype: torch.dtype, head: int, lengths: tuple[int, int]) -> None:
    """One fold on a frame's own keys and one on an image."""
    skip_unless("short", dtype, head)
    check(video("self", 1, *lengths, head, batch=3, heads=3), "short", dtype)


@pytest.mark.parametrize("kernel", ["short", "cudnn"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("frames", [2, 9, 17])
def test_temporal_plans(kernel: str, plan: str, frames: int) -> None:
    """A row per place, in which each frame is a group of one token."""
    skip_unless(kernel, BF16, 72)
    check(video(plan, frames, 1, 1, 72, batch=11), kernel, BF16)


def test_an_attention_too_long_for_the_short_kernel() -> None:
    skip_unless("short", BF16, 64)
    case = video("self", 5, 13, 8, 64).to(BF16, "cuda")
    with pytest.raises(ValueError, match="takes sequences up to 64, not 65"):
        attend(case.q, case.segments, "short")
    assert attend(case.q, case.segments).dtype == BF16


def test_the_short_kernel_takes_unaligned_rows() -> None:
    """Strides and addresses of 2 bytes; a gradient without strides."""
    skip_unless("short", BF16, 24)
    kernel = choose_kernel("short", torch.device("cuda", torch.cuda.current_device()), BF16, 24, True, 17)
    q, k, v = torch.randn(3, 4, 3, 18, 27, device="cuda").bfloat16()[..., 1:, 1:25].unbind(0)
    dout = torch.ones((), device="cuda", dtype=BF16).expand(q.shape)
    wide = [t.double() for t in (dout, q, k, v)]
    out, lse = torch_ops.math_forward(*wide[1:], 0.2)
    ours = (*kernel.forward(q, k, v, 0.2), *kernel.backward(dout, q, k, v, out.to(BF16), lse.float(), 0.2))
    exact = (out, lse, *torch_ops.math_backward(*wide, out, lse, 0.2))
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).abs().max() < LIMITS[BF16] * theirs.square().mean().sqrt()


def test_the_short_kernel_takes_more_than_two_billion_numbers() -> None:
    skip_unless("short", BF16, 128)
    rows, shape = 70_000, (16, 16, 128)  # 2.3e9: the last rows are beyond 32 bits
    if torch.cuda.mem_get_info()[0] < 3 * 2 * rows * 16 * 16 * 128:
        pytest.skip("needs 14 GB of memory")
    kernel = choose_kernel("short", torch.device("cuda", torch.cuda.current_device()), BF16, 128, True, 16)
    x = torch.randn(16, *shape, device="cuda", dtype=BF16).repeat(rows // 16, 1, 1, 1)
    out, lse = kernel.forward(x, x, x, 0.1)
    assert torch.equal(out[:16], out[-16:])
    assert torch.equal(lse[:16], lse[-16:])
    exact, _ = torch_ops.math_forward(x[-16:], x[-16:], x[-16:], 0.1)
    assert (out[-16:] - exact).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("head", [8, 12, 40, 64, 128])
def test_auto_takes_every_head_size(dtype: torch.dtype, head: int) -> None:
    check(random_case(1, sizes=(head,)), "auto", dtype)


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("plan", ["first+previous", "window(2)"])
def test_flex(dtype: torch.dtype, plan: str) -> None:
    skip_unless("flex", dtype, 64)
    low = video(plan, 4, 100, 40, 64).to(dtype, "cuda")
    out, gradient = errors(lambda q, s: attend(q, s, "flex"), low, low.to(torch.float64))
    # Inductor may run float32 products in TF32.
    assert max(out, gradient) < max(LIMITS[dtype], 0.02)


@pytest.mark.parametrize("kernel", ["torch_flash", "torch_efficient", "flash", "cudnn", "short"])
def test_one_compiled_graph(kernel: str) -> None:
    dtype = F32 if kernel == "torch_efficient" else BF16
    skip_unless(kernel, dtype, 64)
    n, m = (12, 10) if kernel == "short" else (40, 24)
    case = video("first+previous", 4, n, m, 64).to(dtype, "cuda")

    def run(q: Tensor, segments: Sequence[Segment]) -> Tensor:
        return attend(q, segments, kernel)

    torch._dynamo.reset()
    out, gradient = errors(torch.compile(run, fullgraph=True), case, case.to(torch.float64))
    assert max(out, gradient) < LIMITS[dtype]


def test_autocast() -> None:
    case = video("first+previous", 4, 40, 24, 64).to(F32, "cuda")
    with torch.autocast("cuda", BF16):
        assert attend(case.q, case.segments).dtype == BF16
        out, gradient = errors(attend, case, case.to(torch.float64))
    assert max(out, gradient) < LIMITS[BF16]


def test_memory_of_first_and_previous_is_less_than_half_of_concatenation() -> None:
    """Forward and backward: the keys of 16 frames and an image are never concatenated or repeated."""
    from experiments.bench.attention import AttentionCase, cat_repeat, job, segments
    from experiments.bench.measure import peak_memory

    case = AttentionCase("first+previous", 16, 1024, 1024)
    device = torch.device("cuda")
    tensors = case.tensors(BF16, device)
    gradient = torch.randn_like(tensors[0])
    ours, theirs = (
        peak_memory(job(run, case, tensors, gradient, True), device) for run in (segments, cat_repeat)
    )
    assert ours < 0.5 * theirs


def test_the_table_has_a_row_for_this_device() -> None:
    assert any(row.device == "cuda" and row.auto and row.installed() for row in TABLE)
