"""`attend` against a dense oracle in float64: results, gradients, precisions, errors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_oracle import dense, errors, random_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dit_booth.attention import FramePlan, Frames, Segment, attend
from dit_booth.attention import joint_softmax as joint
from dit_booth.attention.calls import SizeClass, build_calls
from dit_booth.attention.kernels import choice as kernels
from dit_booth.attention.kernels.choice import check_kernel_name
from dit_booth.attention.plans import UNLIMITED_FRAMES, seen_by_all, with_context
from dit_booth.attention.policy import CPU, CUDA, OTHER

torch.set_num_threads(1)
LARGE = (SizeClass.LARGE,)
KERNEL = pytest.mark.parametrize("kernel", ["math", "torch_flash"])
PLANS = (
    "self",
    "first",
    "first+previous",
    "self+first",
    "window(3)",
    "keyframes(3)",
    "sink(2)+window(2)",
    "all",
)


# ---- exactness ---------------------------------------------------------------------------------------------


@KERNEL
@settings(deadline=None, max_examples=120)
@given(seed=st.integers(0, 10**9))
def test_attend_and_its_gradients_equal_the_dense_oracle(seed: int, kernel: str) -> None:
    policy = replace(CPU, shifts=bool(seed % 2))
    out, gradient = errors(lambda q, s: attend(q, s, kernel, policy=policy), random_case(seed))
    assert max(out, gradient) < 1e-10


@KERNEL
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("batch", "shifts"), [(1, False), (2, False), (3, True)])
def test_named_plans_with_a_reference_for_some_frames(
    plan: str, batch: int, shifts: bool, kernel: str
) -> None:
    """A batch is attended sample by sample, as a large one is on the CPU, or in shifts, as on CUDA."""
    policy = replace(CPU, copy_below=0, shifts=shifts)
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
        for s in [(batch, 9, 7, 2, 16)] * 3 + [(batch, 1, 5, 2, 16)] * 2
    ]
    q, k, v, image_k, image_v = leaves
    frames = FramePlan(plan).frames(9)
    segments = [
        Segment(k, v, frames),
        Segment(image_k, image_v, ((0,), (), (), (0,), (), (), (0,), (), ())),
    ]
    ours, theirs = attend(q, segments, kernel, policy=policy), dense(q, segments)
    assert (ours - theirs).abs().max() < 1e-12
    for mine, oracle in zip(
        *(torch.autograd.grad(y.square().sum(), leaves) for y in (ours, theirs)), strict=True
    ):
        assert (mine - oracle).abs().max() < 1e-11
    moved = (ours - attend(q, segments[:1], kernel, policy=policy)).abs().amax((0, 2, 3, 4))
    assert [i for i in range(9) if moved[i] > 1e-3] == [0, 3, 6]
    assert not moved[[1, 2, 4, 5, 7, 8]].any()


@KERNEL
@pytest.mark.parametrize("frames", [1, 2])
def test_in_pieces(frames: int, kernel: str) -> None:
    case = random_case(11)
    policy = replace(CPU, call_elements=frames * case.q[0, 0].numel())
    for plan in PLANS:
        k, v = case.segments[0].k[:, :1].expand(-1, case.q.shape[1], -1, -1, -1), case.segments[0].v[:, :1]
        v = v.expand_as(k)
        case.segments = [Segment(k, v, FramePlan(plan).frames(case.q.shape[1]))]
        assert max(errors(lambda q, s: attend(q, s, kernel, policy=policy), case)) < 1e-10


@KERNEL
def test_gradcheck(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 2, 1, 8)] * 4 + [(1, 1, 3, 1, 8)] * 2
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).mul_(0.5).requires_grad_() for s in shapes
    ]

    def run(q: Tensor, query: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        image = Segment(image_k, image_v, ((0,), (), (0,)), query, 0.4)
        return attend(q, (Segment(k, v, FramePlan("first+previous").frames(3)), image), kernel, 0.7)

    assert torch.autograd.gradcheck(run, leaves, atol=1e-6)


@KERNEL
def test_large_scores_do_not_overflow_in_the_merge(kernel: str) -> None:
    case = random_case(3, loud=1000.0)
    ours = attend(case.q, case.segments, kernel)
    assert ours.isfinite().all()
    assert (ours - dense(case.q, case.segments)).abs().max() < 1e-10


@KERNEL
def test_scales_are_used(kernel: str) -> None:
    case = random_case(5)
    bare = [replace(s, scale=None) for s in case.segments]
    default = attend(case.q, bare, kernel)
    assert (attend(case.q, bare, kernel, 0.3) - dense(case.q, bare, 0.3)).abs().max() < 1e-10
    assert (attend(case.q, bare, kernel, 0.3) - default).abs().max() > 1e-4
    own = [replace(bare[0], scale=0.3), *bare[1:]]
    assert (attend(case.q, own, kernel) - default).abs().max() > 1e-4
    head = case.q.shape[-1] ** -0.5
    assert torch.equal(attend(case.q, [replace(s, scale=head) for s in bare], kernel), default)


@KERNEL
@pytest.mark.parametrize("own_query", [False, True])
def test_a_softmax_over_one_key_is_its_value(own_query: bool, kernel: str) -> None:
    """Attention along the time of one frame: queries and keys get no gradient, so nothing is projected back."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 2, 8)] * 2 + [(2, 4, 1, 2, 8)] * 2
    q, query, k, v = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )
    segments = [Segment(k, v, ((0,), (3,), (3,)), query if own_query else None)]
    ours, theirs = attend(q, segments, kernel), dense(q, segments)
    assert ours.shape == q.shape and (ours - theirs).abs().max() < 1e-12
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad((ours * weight).sum(), (v, q, query, k), allow_unused=True)
    (oracle,) = torch.autograd.grad((theirs * weight).sum(), v)
    assert (mine[0] - oracle).abs().max() < 1e-12 and not any(g is not None for g in mine[1:])


def test_a_frozen_tensor_costs_no_gradient() -> None:
    case = random_case(8)
    for s in case.segments:
        frozen = [replace(t, k=t.k.detach(), v=t.v.detach()) if t is s else t for t in case.segments]
        out = attend(case.q, frozen)
        oracle = torch.autograd.grad(
            dense(case.q, case.segments).sum(), case.leaves, allow_unused=True, retain_graph=True
        )
        ours = torch.autograd.grad(out.sum(), case.leaves, allow_unused=True, retain_graph=True)
        assert sum(g is None for g in ours) == 2
        for mine, theirs in zip(ours, oracle, strict=True):
            if mine is not None and theirs is not None:
                assert (mine - theirs).abs().max() < 1e-10


# ---- precision, autocast, checkpointing ---------------------------------------------------------------------


@KERNEL
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.12), (torch.float16, 0.015)]
)
def test_lower_precisions_are_as_good_as_they_are(
    dtype: torch.dtype, limit: float, seed: int, kernel: str
) -> None:
    case = random_case(seed, sizes=(16, 40, 64)).to(dtype)
    out, gradient = errors(lambda q, s: attend(q, s, kernel), case, case.to(torch.float64))
    assert max(out, gradient) < limit
    assert attend(case.q, case.segments, kernel).dtype == dtype


@KERNEL
def test_autocast_runs_in_bfloat16(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 3, 5, 2, 16, generator=generator).requires_grad_()
    segments = [Segment(k, v, FramePlan("first+previous").frames(3))]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, segments, kernel)
    assert out.dtype == torch.bfloat16
    assert attend(q, segments, kernel).dtype == torch.float32
    assert (out.float() - dense(q, segments)).abs().max() < 0.05
    (ours,), (theirs,) = (torch.autograd.grad(y.float().square().sum(), q) for y in (out, dense(q, segments)))
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


def test_mixed_precision_promotes() -> None:
    case = random_case(2, own_queries=False)
    assert attend(case.q.float(), case.segments).dtype == torch.float64
    low = [replace(s, k=s.k.float()) for s in case.segments]
    assert attend(case.q.float(), low).dtype == torch.float64, "whichever tensor is the widest"


@KERNEL
def test_checkpointing_recomputes_the_same(kernel: str) -> None:
    case = random_case(13)
    weight = torch.randn(case.q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(q: Tensor) -> Tensor:
        return attend(q * 1.5, case.segments, kernel)

    plain = torch.autograd.grad(
        (run(case.q) * weight).sum(), case.leaves, allow_unused=True, retain_graph=True
    )
    again = checkpoint(run, case.q, use_reentrant=False)
    assert isinstance(again, Tensor)
    kept = torch.autograd.grad((again * weight).sum(), case.leaves, allow_unused=True, retain_graph=True)
    for a, b in zip(plain, kept, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_nothing_is_kept_for_the_backward_but_the_inputs_the_output_and_its_log_sum_exp() -> None:
    q, k, v = (torch.randn(1, 8, 32, 2, 16, requires_grad=True) for _ in range(3))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attend(q, [Segment(k, v, FramePlan("first+previous").frames(8))])
    assert sorted(t.numel() for t in saved) == [q.numel() // 16] + [q.numel()] * 4


# ---- errors ------------------------------------------------------------------------------------------------


def one(
    frames: Frames,
    k: tuple[int, ...] = (1, 2, 4, 2, 8),
    v: tuple[int, ...] | None = None,
    query: tuple[int, ...] | None = None,
) -> Segment:
    return Segment(torch.zeros(k), torch.zeros(v or k), frames, None if query is None else torch.zeros(query))


@pytest.mark.parametrize(
    ("segments", "says"),
    [
        ([one(((0,), (), (1,)))], "query frame 1 reads no key"),
        ([one(((0,), (), (1,))), one(((), (), (0,)))], "query frame 1 reads no key"),
        ([one(((0,), (0,), (1,)), k=(1, 2, 0, 2, 8))], "query frame 0 reads no key"),
        ([], "query frame 0 reads no key"),
        ([one(((0,), (1,)))], "what 2 query frames read, but there are 3"),
        ([one(((0,), (2,), (0,)))], "query frame 1 reads group 2, but the segment has 2"),
        ([one(((0,), (-1,), (0,)))], "query frame 1 reads group -1, but the segment has 2"),
        ([one(((0,),) * 3, v=(1, 2, 5, 2, 8))], r"v \(1, 2, 5, 2, 8\) do not fit q \(1, 3, 4, 2, 8\)"),
        ([one(((0,),) * 3, k=(1, 2, 4, 2, 16))], r"k \(1, 2, 4, 2, 16\)"),
        ([one(((0,),) * 3, k=(1, 2, 4, 1, 8))], r"k \(1, 2, 4, 1, 8\)"),
        ([one(((0,),) * 3, k=(2, 2, 4, 2, 8))], r"k \(2, 2, 4, 2, 8\)"),
        ([one(((0,),) * 3, query=(1, 3, 5, 2, 8))], r"own query \(1, 3, 5, 2, 8\)"),
    ],
)
def test_what_cannot_be_attended_is_an_error(segments: list[Segment], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attend(torch.zeros(1, 3, 4, 2, 8), segments)


def test_an_empty_segment_is_no_error_where_others_are_read() -> None:
    case = random_case(4, own_queries=False)
    first = case.segments[0]
    nothing = Segment(first.k[:, :, :0], first.v[:, :, :0], ((0,),) * case.q.shape[1])
    assert torch.equal(attend(case.q, [*case.segments, nothing]), attend(case.q, case.segments))


def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"attention kernel 'flesh' is unknown.*auto.*math.*torch_flash"):
        attend(torch.zeros(1, 3, 4, 2, 8), [one(((0,),) * 3)], "flesh")
    check_kernel_name("auto")


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    q = torch.zeros(1, 3, 6, 2, 72)
    with caplog.at_level(logging.INFO, "dit_booth.attention.kernels"):
        for _ in range(2):
            attend(q, [one(((0,),) * 3, k=(1, 2, 4, 2, 72))])
    assert [r.getMessage() for r in caplog.records] == [
        "attention kernel on cpu, float32, head size 72: torch_flash"
    ]


# ---- few keys are joined to a read of the same frames ------------------------------------------------------


@pytest.mark.parametrize("plan", ["first+previous", "self", "all", "sink(2)+window(2)"])
@pytest.mark.parametrize("own_query", [False, True])
def test_a_bank_is_read_exactly_joined_or_not(plan: str, own_query: bool) -> None:
    """A token bank for all frames beside the frames' own keys: in one call with frame 0's where it can be."""
    g = torch.Generator().manual_seed(1)
    shapes = [(2, 5, 70, 2, 8)] * 3 + [(2, 1, 6, 2, 8)] * 2 + [(2, 5, 70, 2, 8)]
    tensors = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    q, k, v, bank_k, bank_v, other = tensors
    bank = Segment(bank_k, bank_v, ((0,),) * 5, query=other if own_query else None)
    segments = [Segment(k, v, FramePlan(plan).frames(5)), bank]
    wanted = tensors if own_query else tensors[:5]
    exact = dense(q, segments)
    grads = torch.autograd.grad(exact.square().sum(), wanted)
    calls = []
    for join_below, light in ((0, 10**9), (0, CPU.light_ratio), (CPU.join_below, 10**9)):
        policy = replace(CPU, join_below=join_below, light_ratio=light)
        sizes = tuple(joint._size_class(q, s, policy) for s in segments)
        positions = joint._positions((False, own_query))
        calls.append(
            len(
                build_calls(
                    tuple(s.frames for s in segments), positions, (1.0, 1.0), sizes, (9, 9), policy
                ).forward
            )
        )
        out = attend(q, segments, policy=policy)
        assert (out - exact).abs().max() < 1e-12
        for mine, theirs in zip(torch.autograd.grad(out.square().sum(), wanted), grads, strict=True):
            assert (mine - theirs).abs().max() < 1e-11
    joins = plan != "self" and not own_query
    assert calls[0] - calls[2] == int(joins)
    light = plan == "first+previous" and not own_query  # all read frame 0; of sink(2) that is two groups
    assert calls[0] - calls[1] == int(light)


@pytest.mark.parametrize("own_query", [False, True])
def test_two_groups_that_one_frame_reads_are_one_call(own_query: bool) -> None:
    """VideoBooth's equation 5: frame 0 over the image and itself. Queries of their own need a softmax of their own."""
    g = torch.Generator().manual_seed(1)
    shapes = [(2, 1, 100, 2, 8)] * 4 + [(2, 1, 130, 2, 8)] * 2
    tensors = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    q, other, k, v, image_k, image_v = tensors
    image = Segment(image_k, image_v, ((0,),), query=other if own_query else None)
    segments = [image, Segment(k, v, ((0,),))]
    assert all(joint._key_count(s) >= CPU.join_below for s in segments)
    calls = build_calls(
        (((0,),),) * 2, joint._positions((own_query, False)), (1.0,) * 2, LARGE * 2, (9, 9), CPU
    )
    assert len(calls.forward) == 1 + own_query
    ours, theirs = attend(q, segments), dense(q, segments)
    assert (ours - theirs).abs().max() < 1e-12
    wanted = tensors if own_query else [q, *tensors[2:]]
    for mine, oracle in zip(
        *(torch.autograd.grad(y.square().sum(), wanted) for y in (ours, theirs)), strict=True
    ):
        assert (mine - oracle).abs().max() < 1e-11


def test_results_are_merged_only_where_a_frame_has_several() -> None:
    """A frame before the video that reads itself alone (in context, along time) shares no result with the others."""
    frames = with_context(seen_by_all(4, 4), 1, True)
    calls = build_calls((frames,), joint._positions((False,)), (1.0,), LARGE, (9, 9), CPU)
    assert [call.fresh for call in calls.forward] == [True, True]
    calls = build_calls((FramePlan("first+previous").frames(4),), ((0, 1, 2),), (1.0,), LARGE, (9, 9), CPU)
    assert [call.fresh for call in calls.forward] == [True, False]


def test_on_the_cpu_calls_are_cut_forward_too_but_for_a_first_whole_result() -> None:
    """What is merged is small beside the output, however long the video; CUDA has the fewest launches.

    Backward so is what is added to the gradients, of which the first result is the beginning.
    """
    q = torch.empty(1, 12, 5, 2, 8)
    cpu, cuda, other = (replace(p, call_elements=4 * q[0, 0].numel()) for p in (CPU, CUDA, OTHER))
    assert joint._max_frames(q, cpu) == (4, 4)
    assert joint._max_frames(q, cuda) == joint._max_frames(q, other) == (UNLIMITED_FRAMES, 4)
    frames = (FramePlan("first+previous").frames(12),)
    for most, sizes in ((4, [12, 4, 4, 2]), (UNLIMITED_FRAMES, [12, 10])):
        calls = build_calls(frames, ((0, 1, 2),), (1.0,), LARGE, (most, 4), CPU)
        assert [call.read.frames for call in calls.forward] == sizes
        assert [call.read.frames for call in calls.backward] == [12, 4, 4, 2]


def test_a_batch_whose_reads_are_shifts_takes_a_call_a_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither sample by sample nor in pieces, and no frame of the queries, keys and values is copied."""
    policy = replace(CPU, shifts=True, copy_below=0, call_elements=1)
    tensors = [torch.randn(3, 8, 70, 2, 8, requires_grad=True) for _ in range(3)]
    memory = {t.untyped_storage().data_ptr() for t in tensors}
    calls = {"forward": 0, "backward": 0}

    def counted(name: str, at: int) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls[name] += 1
            assert {t.untyped_storage().data_ptr() for t in arguments[at : at + 3]} <= memory
            return getattr(kernels.CPU_FLASH, name)(*arguments)

        return run

    spy = kernels.Kernel(counted("forward", 0), counted("backward", 1))
    monkeypatch.setattr(joint, "choose_kernel", lambda *_: spy)
    for plan, forward, backward in (("first+previous", 2, 2), ("self+first", 2, 2), ("window(3)", 3, 5)):
        frames = FramePlan(plan).frames(8)
        calls.update(forward=0, backward=0)
        out = attend(tensors[0], [Segment(*tensors[1:], frames)], policy=policy)
        grads = torch.autograd.grad(out.sum(), tensors)
        assert calls == {"forward": forward, "backward": backward}, plan
        exact = dense(tensors[0], [Segment(*tensors[1:], frames)])
        assert (out - exact).abs().max() < 1e-5
        for mine, theirs in zip(grads, torch.autograd.grad(exact.sum(), tensors), strict=True):
            assert (mine - theirs).abs().max() < 1e-4
