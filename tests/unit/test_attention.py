"""`attend` against a dense oracle in float64; how visibilities are cut into reads; the plan language."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_booth.attention import FramePlan, Frames, Segment, attend
from dit_booth.attention.kernels import KERNELS
from dit_booth.attention.plans import seen_by_all
from dit_booth.attention.segments import Read, reads

torch.set_num_threads(1)
KERNEL = pytest.mark.parametrize("kernel", sorted(KERNELS))


def dense(q: Tensor, segments: Sequence[Segment], scale: float | None = None) -> Tensor:
    """One frame after the other, all the keys it may read in one tensor, one softmax."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for i in range(q.shape[1]):
        scores, values = [], []
        for s in segments:
            query = (q if s.query is None else s.query)[:, i]
            for g in s.frames[i]:
                scores.append(torch.einsum("bnkd,bmkd->bknm", query, s.k[:, g]) * scale)
                values.append(s.v[:, g])
        weights = torch.cat(scores, dim=-1).softmax(-1)
        out.append(torch.einsum("bknm,bmkd->bnkd", weights, torch.cat(values, dim=1)))
    return torch.stack(out, dim=1)


def random_case(seed: int, loud: float = 1.0) -> tuple[Tensor, list[Segment], list[Tensor]]:
    """q, segments of random shapes and visibilities (some groups unread, some frames blind), and all leaves."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, f, n, heads = rng.randint(1, 2), rng.randint(1, 5), rng.choice([1, 3, 5, 7, 17]), rng.randint(1, 3)
    d = rng.choice([8, 12, 16, 24, 32])
    leaves: list[Tensor] = []

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(b, heads, *shape, d, generator=generator, dtype=torch.float64)  # b k f n d
        leaves.append(x.requires_grad_())
        return x.permute(0, 2, 3, 1, 4)  # the views that projections give are not contiguous either

    q, segments = leaf(f, n) * loud, []
    for index in range(rng.randint(1, 3)):
        groups, m = rng.randint(1, 5), rng.choice([1, 3, 5, 9, 13])
        frames = tuple(
            tuple(sorted(rng.sample(range(groups), rng.randint(index == 0, groups)))) for _ in range(f)
        )
        query = leaf(f, n) * loud if rng.random() < 0.4 else None
        segments.append(Segment(leaf(groups, m), leaf(groups, m), frames, query))
    rng.shuffle(segments)
    return q, segments, leaves


# ---- exactness ---------------------------------------------------------------------------------------------


@KERNEL
@pytest.mark.parametrize("seed", range(16))
def test_attend_and_its_gradients_equal_the_dense_oracle(seed: int, kernel: str) -> None:
    q, segments, leaves = random_case(seed)
    ours, theirs = attend(q, segments, kernel), dense(q, segments)
    assert (ours - theirs).abs().max() < 1e-10
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [
        torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True, retain_graph=True)
        for y in (ours, theirs)
    ]
    for mine, oracle in zip(*gradients, strict=True):
        assert (mine - oracle).abs().max() < 1e-10
    assert any(gradient.any() for gradient in gradients[1]), "an oracle of zeros would prove nothing"


@KERNEL
@pytest.mark.parametrize(
    "plan", ["self", "first", "first+previous", "self+first", "window(2)", "keyframes(2)", "all"]
)
def test_named_plans_with_a_reference_for_the_first_frame(plan: str, kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 7, 2, 16, generator=generator, dtype=torch.float64)
    image_k, image_v = torch.randn(2, 2, 1, 9, 2, 16, generator=generator, dtype=torch.float64)
    segments = [
        Segment(k, v, FramePlan(plan).frames(5)),
        Segment(image_k, image_v, ((0,), (), (), (), ())),
    ]
    together = attend(q, segments, kernel)
    assert (together - dense(q, segments)).abs().max() < 1e-10
    alone = attend(q, segments[:1], kernel)
    moved = (together - alone).abs().amax((0, 2, 3, 4))
    assert moved[0] > 1e-3
    assert not moved[1:].any()


@KERNEL
def test_large_scores_do_not_overflow_in_the_merge(kernel: str) -> None:
    q, segments, _ = random_case(3, loud=1000.0)
    ours = attend(q, segments, kernel)
    assert ours.isfinite().all()
    assert (ours - dense(q, segments)).abs().max() < 1e-10


@KERNEL
def test_gradcheck(kernel: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 2, 1, 8)] * 4 + [(1, 1, 3, 1, 8)] * 2
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).mul_(0.5).requires_grad_() for s in shapes
    ]

    def run(q: Tensor, query: Tensor, k: Tensor, v: Tensor, image_k: Tensor, image_v: Tensor) -> Tensor:
        frames = FramePlan("first+previous").frames(3)
        return attend(
            q, (Segment(k, v, frames), Segment(image_k, image_v, ((0,), (), (0,)), query)), kernel, 0.7
        )

    assert torch.autograd.gradcheck(run, leaves, atol=1e-6)


@KERNEL
def test_scale_is_used(kernel: str) -> None:
    q, segments, _ = random_case(5)
    assert (attend(q, segments, kernel, 0.3) - dense(q, segments, 0.3)).abs().max() < 1e-10
    assert (attend(q, segments, kernel, 0.3) - attend(q, segments, kernel)).abs().max() > 1e-4


@KERNEL
def test_single_precision_is_as_good_as_single_precision(kernel: str) -> None:
    q, segments, _ = random_case(7)
    low = [
        Segment(s.k.float(), s.v.float(), s.frames, None if s.query is None else s.query.float())
        for s in segments
    ]
    ours = attend(q.float(), low, kernel)
    assert ours.dtype == torch.float32
    assert (ours - dense(q, segments)).abs().max() < 1e-5


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
    q, segments, _ = random_case(2)
    segments = [replace(s, query=None) for s in segments]
    assert attend(q.float(), segments).dtype == torch.float64


# ---- errors ------------------------------------------------------------------------------------------------


def one(frames: Frames, k: tuple[int, ...] = (1, 2, 4, 2, 8), v: tuple[int, ...] | None = None) -> Segment:
    return Segment(torch.zeros(k), torch.zeros(v or k), frames)


@pytest.mark.parametrize(
    ("segments", "says"),
    [
        ([one(((0,), (), (1,)))], "query frame 1 reads no key"),
        ([one(((0,), (), (1,))), one(((), (), (0,)))], "query frame 1 reads no key"),
        ([one(((0,), (1,)))], "what 2 query frames read, but there are 3"),
        ([one(((0,),) * 3, v=(1, 2, 5, 2, 8))], r"v \(1, 2, 5, 2, 8\) do not fit q \(1, 3, 4, 2, 8\)"),
        ([one(((0,),) * 3, k=(1, 2, 4, 2, 16))], r"k \(1, 2, 4, 2, 16\)"),
        ([one(((0,),) * 3, k=(1, 2, 4, 1, 8))], r"k \(1, 2, 4, 1, 8\)"),
        ([one(((0,),) * 3, k=(2, 2, 4, 2, 8))], r"k \(2, 2, 4, 2, 8\)"),
    ],
)
def test_what_cannot_be_attended_is_an_error(segments: list[Segment], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attend(torch.zeros(1, 3, 4, 2, 8), segments)


def test_an_unknown_kernel_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"attention kernel 'flesh' is unknown.*auto.*math.*torch_flash"):
        attend(torch.zeros(1, 3, 4, 2, 8), [one(((0,),) * 3)], "flesh")


# ---- reads -------------------------------------------------------------------------------------------------

visibilities = st.integers(1, 6).flatmap(
    lambda groups: st.lists(
        st.sets(st.integers(0, groups - 1)).map(lambda s: tuple(sorted(s))), min_size=1, max_size=7
    ).map(tuple)
)


@settings(deadline=None, max_examples=150)
@given(visibilities)
def test_reads_cover_a_visibility_exactly_once(frames: Frames) -> None:
    covered: Counter[tuple[int, int]] = Counter()
    for read in reads(frames):
        assert len(set(read.queries)) == len(read.queries) > 0
        assert len(set(read.groups)) == len(read.groups) > 0
        pairs = (
            [(i, g) for i in read.queries for g in read.groups]
            if read.folded
            else list(zip(read.queries, read.groups, strict=True))
        )
        covered.update(pairs)
    assert covered == Counter((i, g) for i, groups in enumerate(frames) for g in groups)


def test_common_plans_take_few_reads() -> None:
    every = tuple(range(16))
    assert reads(FramePlan("first").frames(16)) == (Read(every, (0,), True),)
    assert reads(FramePlan("self").frames(16)) == (Read(every, every, False),)
    assert reads(FramePlan("all").frames(16)) == (Read(every, every, True),)
    assert reads(seen_by_all(16, 2)) == (Read(every, (0, 1), True),)
    first, previous = reads(FramePlan("first+previous").frames(16))
    assert first == Read(every, (0,), True), "frame 0 is read once, by all frames"
    assert previous == Read(every[2:], every[1:15], False)
    assert len(reads(FramePlan("window(3)").frames(16))) == 3


# ---- plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "frames"),
    [
        ("self", "0 1 2 3"),
        ("first", "0 0 0 0"),
        ("previous", "0 0 1 2"),
        ("first+previous", "0 0 01 02"),
        ("all", "0123 0123 0123 0123"),
        ("window(1)", "0 1 2 3"),
        ("window(2)", "0 01 12 23"),
        ("window(9)", "0 01 012 0123"),
        ("sink(2)", "01 01 01 01"),
        ("sink(9)", "0123 0123 0123 0123"),
        ("keyframes(2)", "0 0 12 2"),
        ("keyframes(3)", "0 0 01 23"),
        ("keyframes(1)", "0 01 12 23"),
        ("self+first", "0 01 02 03"),
        ("sink(1)+window(2)", "0 01 012 023"),
        (" first + previous ", "0 0 01 02"),
        ("self+self", "0 1 2 3"),
    ],
)
def test_terms_and_sums_for_four_frames(text: str, frames: str) -> None:
    expected = tuple(tuple(map(int, groups)) for groups in frames.split())
    assert FramePlan(text).frames(4) == expected
    assert all(g == (0,) for g in FramePlan(text).frames(1)), "one frame reads itself, whatever the plan"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown term ''"),
        ("frist", "unknown term 'frist'; use a sum of self, first, .*window\\(k\\)"),
        ("first+", "unknown term ''"),
        ("first previous", "unknown term 'first previous'"),
        ("window", r"write window\(k\) with k >= 1"),
        ("window(0)", r"write window\(k\) with k >= 1"),
        ("window(-1)", "unknown term"),
        ("window(1.5)", "unknown term"),
        ("self+keyframes(0)", r"plan 'self\+keyframes\(0\)': write keyframes\(k\)"),
        ("self(2)", "self takes no argument"),
    ],
)
def test_bad_plans_are_errors(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FramePlan(text)
