"""The table of kernels, its errors, and each kernel's adapter as far as a machine without a GPU can say.

What runs on a GPU only is called here on tensors without storage (PyTorch's own operators check their arguments), or
over stand-ins with the signatures of the packages; test_attention_cuda.py runs the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_oracle import dense, errors, random_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_booth.attention import FramePlan, Segment, attend
from dit_booth.attention import joint_softmax as joint
from dit_booth.attention.calls import SizeClass, build_calls
from dit_booth.attention.kernels import choice as kernels
from dit_booth.attention.kernels import flex, packages, torch_ops
from dit_booth.attention.kernels.choice import TABLE, choose_kernel
from dit_booth.attention.plans import UNLIMITED_FRAMES, seen_by_all
from dit_booth.attention.policy import CUDA as CUDA_POLICY

torch.set_num_threads(1)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of compute capability 9.0, with no package installed."""
    kernels._find.cache_clear()
    monkeypatch.setattr(kernels, "_capability", lambda device: (9, 0) if device.type == "cuda" else (0, 0))
    yield
    kernels._find.cache_clear()


def name_of(
    name: str, device: torch.device, dtype: torch.dtype, head: int, longest: int = kernels.UNLIMITED
) -> str:
    chosen = choose_kernel(name, device, dtype, head, True, longest)
    return next(row.name for row in TABLE if row.kernel is chosen)


# ---- the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "dtype", "head", "expected"),
    [
        (CPU, F32, 64, "torch_flash"),
        (CPU, F64, 12, "torch_flash"),
        (CPU, BF16, 40, "torch_flash"),
        (CUDA, BF16, 64, "cudnn"),
        (CUDA, F16, 256, "torch_flash"),
        (CUDA, BF16, 264, "torch_efficient"),
        (CUDA, BF16, 12, "math"),
        (CUDA, F32, 64, "torch_efficient"),
        (CUDA, F32, 12, "torch_efficient"),
        (CUDA, F32, 10, "math"),
        (CUDA, F64, 64, "math"),
        (torch.device("meta"), F32, 64, "math"),
    ],
)
def test_auto(device: torch.device, dtype: torch.dtype, head: int, expected: str, hopper: None) -> None:
    assert name_of("auto", device, dtype, head) == expected


def test_auto_prefers_the_packages_where_they_are_installed(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row.name: row for row in TABLE}
    for name, better, head in (("torch_flash", "flash", 256), ("cudnn", "flash4", 64)):
        assert name_of("auto", CUDA, BF16, head) == name
        object.__setattr__(rows[better], "installed", lambda: True)
        kernels._find.cache_clear()
    try:
        assert name_of("auto", CUDA, BF16, 64) == "flash4"
        assert name_of("auto", CUDA, BF16, 192) == "flash", "flash-attn-4 takes 128 at most on every GPU"
        monkeypatch.setattr(kernels, "_capability", lambda device: (8, 0))
        kernels._find.cache_clear()
        assert name_of("auto", CUDA, BF16, 64) == "flash", "flash-attn-4 has no backward before Hopper"
        monkeypatch.setattr(kernels, "_capability", lambda device: (7, 5))
        kernels._find.cache_clear()
        assert name_of("auto", CUDA, F16, 64) == "torch_efficient"
        assert name_of("auto", CUDA, BF16, 64) == "math"
    finally:
        object.__setattr__(rows["flash"], "installed", kernels._has_flash)
        object.__setattr__(rows["flash4"], "installed", kernels._has_flash4)


def with_triton(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    row = next(row for row in TABLE if row.name == "short")
    monkeypatch.setitem(row.__dict__, "installed", lambda: has)
    kernels._find.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype", "head", "longest", "expected"),
    [
        (CUDA, BF16, 72, 16, "short"),
        (CUDA, F16, 8, 64, "short"),
        (CUDA, BF16, 72, 65, "cudnn"),
        (CUDA, BF16, 136, 16, "torch_flash"),
        (CUDA, F32, 72, 16, "torch_efficient"),
        (CPU, BF16, 72, 16, "torch_flash"),
        (CPU, F32, 72, 16, "math"),
        (CPU, F32, 72, 17, "torch_flash"),
    ],
)
def test_auto_prefers_the_short_kernel_where_it_fits(
    device: torch.device,
    dtype: torch.dtype,
    head: int,
    longest: int,
    expected: str,
    hopper: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_triton(monkeypatch, True)
    assert name_of("auto", device, dtype, head, longest) == expected
    with_triton(monkeypatch, False)
    assert name_of("auto", device, dtype, head, longest) == expected.replace("short", "cudnn")


def test_the_short_kernel_is_asked_for_in_vain(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with_triton(monkeypatch, True)
    with pytest.raises(ValueError, match="kernel 'short' takes sequences up to 64, not 256; or use auto"):
        choose_kernel("short", CUDA, BF16, 64, True, 256)
    with_triton(monkeypatch, False)
    with pytest.raises(ValueError, match=r"'short' is not installed .*`pip install triton; apt"):
        choose_kernel("short", CUDA, BF16, 64, True, 16)


@pytest.mark.parametrize(
    ("query", "keys", "expected"), [((2, 6), (3, 5), 15), ((4, 16), (1, 1), 64), ((1, 1), (1, 77), 77)]
)
def test_the_longest_sequence_of_an_attention(
    query: tuple[int, int], keys: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queries of a sample may lie end to end, and so may the keys of a segment."""
    seen: list[int] = []

    def spy(*arguments: object) -> kernels.Kernel:
        seen.append(arguments[-1])
        return kernels.MATH

    monkeypatch.setattr(joint, "choose_kernel", spy)
    q, k = torch.zeros(2, *query, 1, 8), torch.zeros(2, *keys, 1, 8)
    attend(q, [Segment(k, k, ((0,),) * query[0])])
    assert seen == [expected]


@pytest.mark.parametrize(
    ("name", "device", "dtype", "head", "grad", "says"),
    [
        ("flash", CPU, F32, 64, True, r"not installed .*`pip install -e \.\[flash\] --no-build-isolation`"),
        ("flash", CUDA, BF16, 64, True, r"not installed .*`pip install -e \.\[flash\]"),
        ("flash4", CUDA, BF16, 64, True, "not installed .*`pip install --pre flash-attn-4`"),
        ("torch_flash", CUDA, F32, 64, True, "takes float16 or bfloat16, not float32; or use auto"),
        ("torch_flash", CUDA, BF16, 12, True, "takes head sizes multiples of 8 from 8 to 256, not 12"),
        ("torch_efficient", CPU, F32, 64, True, "runs on cuda, not on cpu"),
        ("cudnn", CUDA, BF16, 136, True, "takes head sizes multiples of 8 from 8 to 128, not 136"),
        ("torch_efficient", CUDA, F64, 64, True, "takes .*not float64"),
        ("flex", CUDA, BF16, 8, True, "takes head sizes from 16 to 256, not 8"),
        ("flex", CPU, F32, 64, True, "has no backward on cpu"),
        ("auto", CPU, torch.int64, 64, False, "not int64"),
    ],
)
def test_a_kernel_that_cannot_is_an_error_with_the_reason(
    name: str, device: torch.device, dtype: torch.dtype, head: int, grad: bool, says: str, hopper: None
) -> None:
    with pytest.raises(ValueError, match=f"attention kernel '{name}' .*{says}"):
        choose_kernel(name, device, dtype, head, grad)


def test_an_old_gpu_is_named(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8\.0, this one has 7\.5"):
        choose_kernel("torch_flash", CUDA, F16, 64, True)


def test_the_error_reaches_who_asks() -> None:
    q = torch.zeros(1, 1, 4, 2, 16)
    with pytest.raises(ValueError, match=r"attention kernel 'flash' is not installed"):
        attend(q, [Segment(q, q, ((0,),))], "flash")


# ---- PyTorch's kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 256), (1, 1, 8192), (2, 1, 128), (1, 3, 190)])
def test_cpu_backward_gives_every_thread_a_part_of_a_fold(shape: tuple[int, int, int]) -> None:
    b, heads, n = shape
    g = torch.Generator().manual_seed(0)
    q, dout = (torch.randn(b, heads, n, 16, generator=g, dtype=F64) for _ in range(2))
    k, v = (torch.randn(b, heads, 9, 16, generator=g, dtype=F64) for _ in range(2))
    out, lse = torch_ops.cpu_flash_forward(q, k, v, 0.25)
    exact = torch_ops.math_backward(dout, q, k, v, out, lse, 0.25)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = 2 if n % 2 == 0 and n >= 128 and b * heads < 2 else 1
        assert torch_ops._chunks(n, torch_ops._cpu_chunks(q, k), 64) == expected
        for mine, theirs in zip(
            torch_ops.cpu_flash_backward(dout, q, k, v, out, lse, 0.25), exact, strict=True
        ):
            assert (mine - theirs).abs().max() < 1e-11
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("torch_flash", BF16),
        ("cudnn", BF16),
        ("torch_efficient", F32),
        ("torch_efficient", F16),
        ("short", BF16),
    ],
)
@pytest.mark.parametrize(
    ("plan", "batch"),
    [("first+previous", 1), ("first+previous", 2), ("window(2)", 1), ("window(2)", 2), ("all", 1)],
)
def test_cuda_operators_take_our_arguments(
    name: str, dtype: torch.dtype, plan: str, batch: int, hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_triton(monkeypatch, True)
    with FakeTensorMode():
        q, k, v, dout = (torch.empty(batch, 6, 5, 2, 16, dtype=dtype, device=CUDA) for _ in range(4))
        image = [torch.empty(batch, 1, 7, 2, 16, dtype=dtype, device=CUDA) for _ in range(2)]
        tensors = [q, k, v, *image]
        calls = build_calls(
            (FramePlan(plan).frames(6), seen_by_all(6)),
            ((0, 1, 2), (0, 3, 4)),
            (0.2, 0.3),
            (SizeClass.LARGE, SizeClass.LIGHT),
            (3, 3) if batch == 1 else (UNLIMITED_FRAMES, UNLIMITED_FRAMES),
            CUDA_POLICY,
        )
        kernel = choose_kernel(name, CUDA, dtype, 16, True, 30)
        assert isinstance(kernel, kernels.Kernel)
        out, lse = joint._forward(calls, kernel, tensors)
        assert out.shape == q.shape
        assert out.dtype == dtype
        assert lse.shape == (batch, 6, 5, 2, 1)
        assert lse.dtype == F32
        grads = joint._backward(calls, kernel, [True] * 5, *tensors, out, lse, dout)
        for grad, tensor in zip(grads, tensors, strict=True):
            assert grad is not None
            assert (grad.shape, grad.dtype) == (tensor.shape, dtype)


def test_batches_larger_than_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "MAX_LAUNCH_ROWS", 3)
    seen: list[int] = []

    @torch_ops.in_launches
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        seen.append(len(q))
        return torch_ops.math_forward(q, k, v, scale)

    q, k, v = torch.randn(3, 8, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    for mine, whole in zip(forward(q, k, v, 0.5), torch_ops.math_forward(q, k, v, 0.5), strict=True):
        assert torch.allclose(mine, whole, atol=1e-6)
    assert seen == [3, 3, 2]


# ---- the packages ------------------------------------------------------------------------------------------


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    return [t.transpose(1, 2) for t in tensors]


def flash_attn_forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    """Signature of flash-attn 2.8.3, mathematics for tensors (b n k d)."""
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes, return_softmax) == (0.0, None, False)
    out, lse = torch_ops.math_forward(*tokens_first(q, k, v), softmax_scale)
    return *tokens_first(out), lse, torch.empty(0), torch.empty(2)


def flash_attn_backward(  # type: ignore[no-untyped-def]
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
    window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, causal, window_size_left, window_size_right) == (0.0, False, -1, -1)
    assert (softcap, alibi_slopes, deterministic) == (0.0, None, False)
    assert softmax_lse.is_contiguous()
    assert softmax_lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    parts = torch_ops.math_backward(*tokens_first(dout, q, k, v, out), softmax_lse, softmax_scale)
    for given, part in zip((dq, dk, dv), tokens_first(*parts), strict=True):
        given.copy_(part)
    return torch.empty(0)


def flash4_fwd(q, k, v, qv=None, *, softmax_scale=None, return_lse=False):  # type: ignore[no-untyped-def]
    """The arguments of flash-attn-4 4.0.0b36 that are used."""
    assert return_lse
    out, lse = torch_ops.math_forward(*tokens_first(q, k, v), softmax_scale)
    return *tokens_first(out), lse, None, None, None


def flash4_bwd(q, k, v, out, dout, lse, softmax_scale=None, *, deterministic=False):  # type: ignore[no-untyped-def]
    assert lse.is_contiguous()
    return tuple(
        tokens_first(*torch_ops.math_backward(*tokens_first(dout, q, k, v, out), lse, softmax_scale))
    )


@pytest.mark.parametrize("name", ["flash", "flash4"])
@pytest.mark.parametrize("seed", range(3))
def test_the_packages_adapters(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    two = SimpleNamespace(
        _wrapped_flash_attn_forward=flash_attn_forward, _wrapped_flash_attn_backward=flash_attn_backward
    )
    four = (flash4_fwd, flash4_bwd)
    monkeypatch.setattr(packages, "_flash", lambda: two)
    monkeypatch.setattr(packages, "_flash4", lambda: four)
    kernel = kernels.FLASH if name == "flash" else kernels.FLASH4
    monkeypatch.setattr(joint, "choose_kernel", lambda *_: kernel)
    assert max(errors(lambda q, s: attend(q, s), random_case(seed))) < 1e-10


# ---- FlexAttention -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "n", "m"),
    [("first+previous", 128, 256), ("window(2)", 96, 40), ("all", 200, 7), ("first", 64, 0)],
)
def test_the_block_mask_is_the_visibility(plan: str, n: int, m: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    frames = (FramePlan(plan).frames(4), ((0,), (), (), (0,)))
    mask = flex.block_mask(frames, n, ((4, n), (1, m)), CPU)
    visible = torch.zeros(4 * n, 4 * n + m, dtype=torch.bool)
    for i in range(4):
        for g in frames[0][i]:
            visible[i * n : (i + 1) * n, g * n : (g + 1) * n] = True
        if frames[1][i]:
            visible[i * n : (i + 1) * n, 4 * n :] = True
    i, j = torch.meshgrid(torch.arange(4 * n), torch.arange(4 * n + m), indexing="ij")
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), i, j), visible)
    theirs = create_block_mask(lambda b, h, q, kv: visible[q, kv], 1, 1, 4 * n, 4 * n + m, device="cpu")
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    assert torch.equal(mask.full_kv_num_blocks, theirs.full_kv_num_blocks)
    assert mask.seq_lengths == theirs.seq_lengths


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_oracle_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)  # as it is: the same mask, no compiler
    for seed in range(4):
        case = random_case(seed, own_queries=False, sizes=(16, 32))
        case = case.to(F64)
        with torch.no_grad():
            q, segments = (
                case.q.detach(),
                [Segment(s.k.detach(), s.v.detach(), s.frames, None, s.scale) for s in case.segments],
            )
            tensors = [q, *(t for s in segments for t in (s.k, s.v))]
            positions = tuple((0, 1 + 2 * i, 2 + 2 * i) for i in range(len(segments)))
            scales = tuple(0.2 if s.scale is None else s.scale for s in segments)
            ours = flex.flex_attend(tensors, positions, tuple(s.frames for s in segments), scales)
            assert (ours - dense(q, segments, 0.2)).abs().max() < 1e-10


def test_flex_takes_one_query() -> None:
    q = torch.zeros(1, 1, 4, 2, 16)
    with pytest.raises(ValueError, match="'flex' takes one query per frame, but a segment has its own"):
        attend(q, [Segment(q, q, ((0,),), query=q)], "flex")
