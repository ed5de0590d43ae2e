"""The plan language, and the cover of visibilities with reads."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_booth.attention import FramePlan, Frames
from dit_booth.attention.cover import Read, add, compute_cover, is_view, lay_back, lay_out, put, take
from dit_booth.attention.plans import seen_by_all, with_context

torch.set_num_threads(1)

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


terms = st.one_of(
    st.sampled_from(["self", "first", "previous", "all"]),
    st.builds("{}({})".format, st.sampled_from(["window", "sink", "keyframes"]), st.integers(1, 9)),
)
plans = st.lists(terms, min_size=1, max_size=3).map("+".join)


@settings(deadline=None, max_examples=200)
@given(plans, st.integers(1, 20))
def test_a_plan_reads_its_own_frames_sorted_and_once(text: str, count: int) -> None:
    frames = FramePlan(text).frames(count)
    assert frames is FramePlan(text).frames(count), "compiled once"
    assert len(frames) == count
    parts = [FramePlan(part).frames(count) for part in text.split("+")]
    for i, groups in enumerate(frames):
        assert groups == tuple(sorted(set().union(*(part[i] for part in parts))))
        assert groups
        assert set(groups) <= set(range(count))


# ---- reads -------------------------------------------------------------------------------------------------

visibilities = st.integers(1, 6).flatmap(
    lambda groups: st.lists(
        st.sets(st.integers(0, groups - 1)).map(lambda s: tuple(sorted(s))), min_size=1, max_size=7
    ).map(tuple)
)


def blocks_are_equal(read: Read) -> bool:
    return all(len(row) == len(index[0]) for index in (read.queries, read.groups) for row in index)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(visibilities, st.builds(lambda text, f: FramePlan(text).frames(f), plans, st.integers(1, 40)))
)
def test_reads_cover_a_visibility_exactly_once(frames: Frames) -> None:
    wanted = Counter((i, g) for i, groups in enumerate(frames) for g in groups)
    cover = compute_cover(frames)
    assert Counter(pair for read in cover for pair in read.pairs()) == wanted
    for read in cover:
        assert blocks_are_equal(read)
        queries = [i for row in read.queries for i in row]
        assert len(set(queries)) == len(queries), "the results of two blocks cannot be merged into one frame"
    apart = [part for read in cover for part in read.split_overlaps()]
    assert Counter(pair for read in apart for pair in read.pairs()) == wanted
    for read in apart:
        groups = [g for row in read.groups for g in row]
        assert len(set(groups)) == len(groups), "the gradients of two blocks cannot be written to one group"
    for most in (1, 3):
        pieces = [piece for read in apart for piece in read.pieces(most)]
        assert Counter(pair for piece in pieces for pair in piece.pairs()) == wanted
        assert all(blocks_are_equal(piece) for piece in pieces)
        assert all(piece.frames <= most or len(piece.queries) == 1 < most for piece in pieces if most > 1)


def fold(frames: range, *groups: int) -> Read:
    return Read((tuple(frames),), (groups,))


def pairing(frames: range, distance: int) -> Read:
    return Read(tuple((i,) for i in frames), tuple((i + distance,) for i in frames))


def test_common_plans_take_few_reads() -> None:
    every = range(16)
    assert compute_cover(FramePlan("first").frames(16)) == (fold(every, 0),)
    assert compute_cover(FramePlan("self").frames(16)) == (pairing(every, 0),)
    assert compute_cover(FramePlan("all").frames(16)) == (fold(every, *every),)
    assert compute_cover(seen_by_all(16, 2)) == (fold(every, 0, 1),)
    assert compute_cover(FramePlan("first+previous").frames(16)) == (
        fold(every, 0),
        pairing(range(2, 16), -1),
    )
    assert compute_cover(FramePlan("self+first").frames(16)) == (fold(every, 0), pairing(range(1, 16), 0))
    window, *start = compute_cover(FramePlan("window(3)").frames(16))
    assert window == Read(tuple((i,) for i in range(2, 16)), tuple((i - 2, i - 1, i) for i in range(2, 16)))
    assert sum(read.area for read in start) == 3, "the first two frames have shorter windows"


def test_a_frame_before_the_video_takes_few_reads() -> None:
    """In context: a block has all the groups that its frames share, and what would be copied falls into views."""
    video, alone = range(1, 17), fold(range(1), 0)
    along_time = with_context(seen_by_all(16, 16), 1, True)
    assert compute_cover(along_time) == (fold(video, *range(17)), alone)
    across = with_context(FramePlan("first+previous").frames(16), 1, True)
    assert compute_cover(across) == (fold(video, 0, 1), pairing(range(3, 17), -1), alone)


PLANS = {
    "self": 1,
    "first": 1,
    "first+previous": 2,
    "self+first": 2,
    "previous": 2,
    "window(2)": 2,
    "window(8)": 6,
    "keyframes(4)": 4,
    "keyframes(7)": 4,
    "sink(1)+window(3)": 4,
    "sink(4)+window(8)": 5,
    "self+keyframes(8)": 4,
    "all": 1,
}


@pytest.mark.parametrize("plan", PLANS)
def test_the_reads_of_a_plan_do_not_grow_with_the_frames_and_copy_nothing(plan: str) -> None:
    for count in (8, 16, 17, 64, 129, 256):
        cover = compute_cover(FramePlan(plan).frames(count))
        assert len(cover) <= PLANS[plan]
        assert all(is_view(read.queries) and is_view(read.groups) for read in cover)


def test_long_videos_are_compiled_fast() -> None:
    start = time.process_time()
    for plan in PLANS:
        compute_cover(FramePlan(plan).frames(487))
    assert time.process_time() - start < 5, "about a third of a second; it was minutes with a quadratic cover"


# ---- views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "view"),
    [
        (((2, 3, 4),), True),
        (((1,), (2,), (3,)), True),
        (((0,), (4,), (8,)), True),
        (((0, 1), (3, 4), (6, 7)), True),
        (((0, 1, 2), (1, 2, 3)), True),
        (((5,),), True),
        (((0, 4, 8),), False),
        (((0,), (1,), (5,)), False),
        (((3,), (2,)), False),
        (((0, 2), (4, 6)), False),
    ],
)
def test_taking_and_laying_out(index: tuple[tuple[int, ...], ...], view: bool) -> None:
    x = torch.arange(2.0 * 9 * 3 * 2 * 4).reshape(2, 9, 3, 2, 4)
    flat = [i for row in index for i in row]
    tokens = torch.stack([x[:, list(row)].flatten(1, 2) for row in index], dim=1).flatten(0, 1)  # b j, f n
    laid = lay_out(x, index)
    assert torch.equal(laid, tokens.transpose(1, 2))
    assert torch.equal(lay_back(laid, index), take(x, index))
    assert is_view(index) == view
    shares = take(x, index).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shares == view
    if len(set(flat)) == len(flat):
        written, added = x.clone(), x.clone()
        put(written, index, take(x, index) * 2)
        add(added, index, take(x, index))
        expected = x.clone()
        expected[:, flat] *= 2
        assert torch.equal(written, expected)
        assert torch.equal(added, expected)


@pytest.mark.parametrize("videos", [1, 3])
def test_a_shift_of_a_batch_is_laid_out_in_place(videos: int) -> None:
    """Rows in which a frame meets another video's are computed, and none of them comes back."""
    x = torch.arange(1.0 * videos * 9 * 3 * 2 * 4).reshape(videos, 9, 3, 2, 4)
    frames = tuple((i,) for i in range(2, 9))
    for groups in (tuple((i - 1,) for i in range(2, 9)), tuple((i - 2, i - 1, i) for i in range(2, 9))):
        read = Read(frames, groups)
        assert read.is_shift(9) and read.is_shift(13) and not read.is_shift(14)
        q, k = lay_out(x, frames, shift=9), lay_out(x, groups, shift=9)
        assert len(q) == len(k) == 9 * videos - 2
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == x.data_ptr()
        assert torch.equal(lay_back(q, frames, shift=9), take(x, frames))
        for b in range(videos):
            for j, row in enumerate(groups):
                assert torch.equal(k[9 * b + j], x[b, list(row)].flatten(0, 1).transpose(0, 1))
    assert not Read(((0, 1, 2),), ((0,),)).is_shift(3)  # a fold
    assert not Read(((0,), (2,), (4,)), ((0,), (2,), (4,))).is_shift(5)
    assert not Read(((0,), (1,), (2,)), ((0,), (2,), (4,))).is_shift(3)


def test_no_keys_are_copied_for_a_video() -> None:
    x = torch.zeros(1, 16, 5, 2, 8)
    for plan in PLANS:
        for read in compute_cover(FramePlan(plan).frames(16)):
            for index in (read.queries, read.groups):
                assert lay_out(x, index).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
