"""Every kernel that a GPU has, against the dense float64 oracle: results and gradients.

Skipped where there is no CUDA device; needs nothing but PyTorch there (kernels of packages that are not installed, or
that the device is too old for, are skipped one by one):  pytest tests/unit/test_attention_cuda.py
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from attention_oracle import Case, errors, random_case
from torch import Tensor

from dit_booth.attention import FramePlan, Segment, attend, torch_kernels
from dit_booth.attention import segments as joint
from dit_booth.attention.kernels import TABLE, choose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LIMITS = {BF16: 0.15, F16: 0.02, F32: 2e-4}
"""Largest error as a share of the root mean square. Half precisions round inputs alike on both sides."""

KERNELS = ("flash4", "flash", "torch_flash", "torch_efficient", "math")
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
        choose(kernel, torch.device("cuda", torch.cuda.current_device()), dtype, head, True)
    except ValueError as reason:
        pytest.skip(str(reason))


def check(case: Case, kernel: str, dtype: torch.dtype) -> None:
    """Ours on the GPU in a dtype, the oracle's on the CPU in float64, of the same rounded numbers."""
    low = case.to(dtype, "cuda")
    out, gradient = errors(lambda q, s: attend(q, s, kernel), low, low.to(torch.float64))
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
    for seed in range(3):
        check(random_case(seed, sizes=(head,)), kernel, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(kernel: str, dtype: torch.dtype, plan: str) -> None:
    skip_unless(kernel, dtype, 64)
    check(video(plan, 9, 65, 33, 64), kernel, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("lengths", [(1, 1), (127, 129), (31, 257), (300, 5)])
def test_odd_lengths(kernel: str, dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    skip_unless(kernel, dtype, 64)
    check(video("first+previous", 4, *lengths, 64), kernel, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_batches_sample_by_sample_and_in_pieces(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = F32 if kernel == "torch_efficient" else BF16
    skip_unless(kernel, dtype, 64)
    for copy_below in (0, 1 << 40):
        for piece in (1, 1 << 40):
            monkeypatch.setattr(joint, "COPY_BELOW", copy_below)
            monkeypatch.setitem(joint.PIECE, "cuda", piece)
            check(video("first+previous", 5, 40, 24, 64, batch=2), kernel, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
def test_batches_larger_than_a_launch(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporal attention: a row per place, a group of a few frames."""
    dtype = F32 if kernel == "torch_efficient" else BF16
    skip_unless(kernel, dtype, 16)
    rows = torch_kernels.MOST_BATCH + 9
    q, k, v = (
        torch.randn(rows, 1, 4, 1, 16, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)
    )
    seen = [Segment(k, v, ((0,),))]
    ours = torch.autograd.grad(attend(q, seen, kernel).float().square().sum(), (q, k, v))
    exact = torch.autograd.grad(attend(q, seen, "math").float().square().sum(), (q, k, v))
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).abs().max() < LIMITS[dtype] * max(1.0, theirs.abs().max().item())


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


@pytest.mark.parametrize("kernel", ["torch_flash", "torch_efficient", "flash"])
def test_one_compiled_graph(kernel: str) -> None:
    dtype = F32 if kernel == "torch_efficient" else BF16
    skip_unless(kernel, dtype, 64)
    case = video("first+previous", 4, 40, 24, 64).to(dtype, "cuda")

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
    from experiments.bench.attention import Case as BenchCase
    from experiments.bench.attention import cat_repeat, job, segments
    from experiments.bench.measure import peak_memory

    case = BenchCase("first+previous", 16, 1024, 1024)
    device = torch.device("cuda")
    tensors = case.tensors(BF16, device)
    gradient = torch.randn_like(tensors[0])
    ours, theirs = (
        peak_memory(job(run, case, tensors, gradient, True), device) for run in (segments, cat_repeat)
    )
    assert ours < 0.5 * theirs


def test_the_table_has_a_row_for_this_device() -> None:
    assert any(row.device == "cuda" and row.auto and row.installed() for row in TABLE)
