"""Reads: a visibility cut into few plain attentions, whose operands are views of the tensors.

A *read* is a batch of equal blocks; in block j the frames ``queries[j]`` read all the groups ``groups[j]``. Three
shapes matter. One block of many frames is a *fold*: the frames' queries are laid end to end against one copy of the
keys, so frame 0 is never repeated. One frame and one group per block is a *pairing*: frames go to the batch. One
frame and several consecutive groups per block is a *window*: blocks overlap in memory instead of being copied.

Of a batch of videos, a block of every frame but the first few is no view of (batch x frames). But where a frame's
groups are at one distance from it, they are so in all videos laid end to end: a *shift*. The rows whose frame is in one
video and whose group in another are computed, too, and never looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from dit_booth.attention.plans import Frames, constant

Index = tuple[tuple[int, ...], ...]
"""Frames or groups of every block: as many blocks as rows, equally long."""


@dataclass(frozen=True)
class Read:
    """One batched plain attention; no frame stands in two blocks."""

    queries: Index
    groups: Index

    @property
    def frames(self) -> int:
        """How many query frames take part."""
        return len(self.queries) * len(self.queries[0])

    @property
    def area(self) -> int:
        """How many (frame, group) pairs it covers."""
        return self.frames * len(self.groups[0])

    def pairs(self) -> Iterator[tuple[int, int]]:
        for queries, groups in zip(self.queries, self.groups, strict=True):
            yield from ((i, g) for i in queries for g in groups)

    def is_shift(self, frames: int) -> bool:
        """Whether most of `frames` have a block of their own, one after the other, each with the groups beside it."""
        queries, groups = _stretch(self.queries), _stretch(self.groups)
        if len(self.queries) == 1 or queries is None or groups is None:
            return False
        return queries[2:] == (1, 1) and groups[3] == 1 and 2 * len(self.queries) > frames

    def apart(self) -> tuple[Read, ...]:
        """The same pairs in reads whose blocks share no group: a window falls into pairings.

        Backward takes these, because the gradient of overlapping keys would need a copy of each overlap.
        """
        if len({g for row in self.groups for g in row}) == len(self.groups) * len(self.groups[0]):
            return (self,)
        return tuple(
            Read(self.queries, tuple((g,) for g in column)) for column in zip(*self.groups, strict=True)
        )

    def blocks(self, start: int, stop: int) -> Read:
        """Some of the blocks."""
        return Read(self.queries[start:stop], self.groups[start:stop])

    def pieces(self, most: int) -> list[Read]:
        """The same pairs in as few reads of at most `most` query frames each (or one block of one frame) as may be."""
        length = len(self.queries[0])
        if len(self.queries) == 1:
            queries = self.queries[0]
            step = _even(length, most)
            return [Read((queries[i : i + step],), self.groups) for i in range(0, length, step)]
        step = _even(len(self.queries), max(1, most // length))
        return [self.blocks(i, i + step) for i in range(0, len(self.queries), step)]


def _even(count: int, most: int) -> int:
    """The largest part where `count` is cut into as few parts of at most `most` as may be, about equal ones."""
    return -(-count // -(-count // most))


# ---- covers ------------------------------------------------------------------------------------------------

Candidates = Callable[[list[set[int]]], list[Read]]
"""Reads that would cover pairs which are left: ``left[i]`` are the groups that frame i still has to read."""


@lru_cache(maxsize=512)
def reads(frames: Frames) -> tuple[Read, ...]:
    """Cover a visibility exactly once by few reads; those of most query frames come first.

    Greedy, by the largest read. Where that leaves reads whose operands are copies, a second cover, which begins with
    the longest diagonal and cuts folds into runs of frames, may have fewer reads and copies; what copies are left may
    be views in parts. A round costs time linear in the pairs left, and the rounds of a frame plan do not grow with the
    frames.
    """
    cover = _cover(frames, [_folds, _wide_folds, _windows])
    assert cover is not None
    if _cost(cover) > len(cover):
        runs = _cover(frames, [_diagonals, _runs, _windows], first=_diagonals, at_most=_cost(cover) - 1)
        cover = runs if runs is not None and _cost(runs) < _cost(cover) else cover
    cover = [part for read in cover for part in _in_views(read)]
    return tuple(sorted(cover, key=lambda read: -read.frames))


def _cost(cover: list[Read]) -> int:
    """A read is a call of a kernel; one whose operands are copied counts for three."""
    return sum(1 if _is_view(read) else 3 for read in cover)


def _is_view(read: Read) -> bool:
    return is_view(read.queries) and is_view(read.groups)


def _in_views(read: Read) -> list[Read]:
    """A read, or its blocks in reads of one distance from block to block, where those cost less."""
    starts = [(queries[0], groups[0]) for queries, groups in zip(read.queries, read.groups, strict=True)]
    steps = [(q - p, h - g) for (p, g), (q, h) in pairwise(starts)]
    common = Counter(steps).most_common(1)
    cuts = [i for i, step in enumerate(steps, 1) if step != common[0][0]]
    parts = [read.blocks(i, j) for i, j in pairwise([0, *cuts, len(starts)])]
    return parts if _cost(parts) < _cost([read]) else [read]


def _cover(
    frames: Frames, candidates: list[Candidates], first: Candidates | None = None, at_most: int | None = None
) -> list[Read] | None:
    """Greedy cover; None where it takes more than `at_most` reads."""
    left = [set(groups) for groups in frames]
    cover: list[Read] = []
    while any(left):
        if len(cover) == at_most:
            return None
        finders = [first] if first is not None and not cover else candidates
        best = max((read for find in finders for read in find(left)), key=_preference)
        cover.append(best)
        for i, g in best.pairs():
            left[i].remove(g)
    return cover


def _preference(read: Read) -> tuple[int, int]:
    return read.area, -len(read.queries)


def _folds(left: list[set[int]]) -> list[Read]:
    """Groups with the same reading frames make a block; blocks of one shape without common frames make a read."""
    return _batches([(tuple(who), g) for g, who in _readers(left)])


def _wide_folds(left: list[set[int]]) -> list[Read]:
    """As `_folds`, but a block has all the groups that its frames have in common, also those that others read, too."""
    readers = {g: frozenset(who) for g, who in _readers(left)}
    blocks = [
        (tuple(sorted(who)), g)
        for who in dict.fromkeys(readers.values())
        for g in sorted(left[min(who)])
        if who <= readers[g]
    ]
    return _batches(blocks)


def _runs(left: list[set[int]]) -> list[Read]:
    """As `_folds`, of consecutive frames."""
    blocks = []
    for g, who in _readers(left):
        starts = [i for i, frame in enumerate(who) if i == 0 or who[i - 1] != frame - 1]
        blocks += [(tuple(who[a:b]), g) for a, b in zip(starts, [*starts[1:], len(who)], strict=True)]
    return _batches(blocks)


def _readers(left: list[set[int]]) -> list[tuple[int, list[int]]]:
    """Every group, in order, with the frames that have to read it."""
    readers: dict[int, list[int]] = {}
    for i, groups in enumerate(left):
        for g in groups:
            readers.setdefault(g, []).append(i)
    return sorted(readers.items())


def _batches(parts: list[tuple[tuple[int, ...], int]]) -> list[Read]:
    """(frames, group) -> blocks of the groups that have frames in common -> reads of blocks of one shape."""
    blocks: dict[tuple[int, ...], list[int]] = {}
    for who, g in parts:
        blocks.setdefault(who, []).append(g)
    batches: dict[
        tuple[int, int], tuple[set[int], set[int], list[tuple[int, ...]], list[tuple[int, ...]]]
    ] = {}
    for who, what in sorted(blocks.items()):
        frames, groups, queries, keys = batches.setdefault((len(who), len(what)), (set(), set(), [], []))
        if frames.isdisjoint(who) and groups.isdisjoint(what):
            frames.update(who)
            groups.update(what)
            queries.append(who)
            keys.append(tuple(what))
    return [Read(tuple(queries), tuple(keys)) for _, _, queries, keys in batches.values()]


def _windows(left: list[set[int]]) -> list[Read]:
    """Frames that read several consecutive groups, all at one distance from the frame."""
    windows: dict[tuple[int, int], list[int]] = {}
    for i, groups in enumerate(left):
        if len(groups) > 1 and max(groups) - min(groups) + 1 == len(groups):
            windows.setdefault((min(groups) - i, len(groups)), []).append(i)
    return [_at_distance(who, offset, length) for (offset, length), who in windows.items()]


def _diagonals(left: list[set[int]]) -> list[Read]:
    """Frames that read a group at one distance from the frame, whatever else they read."""
    diagonals: dict[int, list[int]] = {}
    for i, groups in enumerate(left):
        for g in groups:
            diagonals.setdefault(g - i, []).append(i)
    return [_at_distance(who, offset, 1) for offset, who in diagonals.items()]


def _at_distance(who: list[int], offset: int, length: int) -> Read:
    return Read(tuple((i,) for i in who), tuple(tuple(range(i + offset, i + offset + length)) for i in who))


# ---- views: without einops, which a dozen calls per read would make slow to run and slower to compile ------------


@constant
def _stretch(index: Index) -> tuple[int, int, int, int] | None:
    """(start, stop, length, step) where blocks are runs of consecutive frames at equal distances: a view."""
    return _compiled_stretch(index)


@lru_cache(maxsize=2048)
def _compiled_stretch(index: Index) -> tuple[int, int, int, int] | None:
    start, length = index[0][0], len(index[0])
    step = index[1][0] - start if len(index) > 1 else length
    regular = step > 0 and all(
        row == tuple(range(start + j * step, start + j * step + length)) for j, row in enumerate(index)
    )
    return (start, index[-1][-1] + 1, length, step) if regular else None


def is_whole(index: Index, count: int) -> bool:
    """Whether the blocks are all of `count` frames in order."""
    return [i for row in index for i in row] == list(range(count))


def is_view(index: Index) -> bool:
    """Whether `take` returns a view, so that writing to it writes to the tensor."""
    return _stretch(index) is not None


def take(x: Tensor, index: Index) -> Tensor:
    """Frames of x (b f ...): (b frames ...), or (b blocks length ...) where there are blocks of many frames.

    A view where the index is regular.
    """
    stretch = _stretch(index)
    if stretch is None:
        return _by_block(x[:, [i for row in index for i in row]], index)
    start, stop, length, step = stretch
    if _is_flat(index):
        return x[:, start : stop : step if length == 1 else 1]
    return x[:, start:stop].unfold(1, length, step).movedim(-1, 2)


def put(x: Tensor, index: Index, y: Tensor) -> None:
    """Write y to where `take` read it."""
    if is_view(index):
        take(x, index).copy_(y)
    else:
        x[:, [i for row in index for i in row]] = y if _is_flat(index) else y.flatten(1, 2)


def add(x: Tensor, index: Index, y: Tensor) -> None:
    """Add y to where `take` read it; blocks share no frame."""
    if is_view(index):
        take(x, index).add_(y)
    else:
        where = torch.tensor([i for row in index for i in row], device=x.device)
        x.index_add_(1, where, (y if _is_flat(index) else y.flatten(1, 2)).to(x.dtype))


def lay_out(x: Tensor, index: Index, shift: int = 0) -> Tensor:
    """Operand of a plain attention ((b j) k (f n) d) from (b f n k d): the tokens of a block's frames end to end.

    shift: where the read is one, of how many frames the videos are. The batch then has a row for every frame from the
    first video's first block to the last one's last.
    """
    if shift:
        stretch = _stretch(index)
        assert stretch is not None
        start, _, length, _ = stretch
        rows = len(x) * shift - (shift - len(index))
        x = x.flatten(0, 1)[start : start + rows + length - 1]
        x = x if length == 1 else x.unfold(0, length, 1).movedim(-1, 1).flatten(1, 2)  # (b j) (f n) k d
        return x.transpose(1, 2)
    x = take(x, index)
    if len(index) == 1:
        x = x.flatten(1, 2)  # b (f n) k d
    elif len(index[0]) == 1:
        x = x.flatten(0, 1)  # (b j) n k d
    else:
        x = x.flatten(2, 3).flatten(0, 1)  # (b j) (f n) k d
    return x.transpose(1, 2)


def lay_back(x: Tensor, index: Index, shift: int = 0) -> Tensor:
    """Result of a plain attention ((b j) k (f n) d) in the shape that `take` returns; a view. shift: as `lay_out`."""
    blocks, length = len(index), len(index[0])
    x = x.transpose(1, 2)
    if shift:
        x = x.unfold(0, blocks, shift).movedim(-1, 1)  # b j n k d
    elif blocks == 1:
        x = x.unflatten(1, (length, -1))  # b f n k d
    elif length == 1:
        x = x.unflatten(0, (-1, blocks))  # b j n k d
    else:
        x = x.unflatten(0, (-1, blocks)).unflatten(2, (length, -1))  # b j f n k d
    return x


def _is_flat(index: Index) -> bool:
    return len(index) == 1 or len(index[0]) == 1


def _by_block(x: Tensor, index: Index) -> Tensor:
    return x if _is_flat(index) else x.unflatten(1, (len(index), len(index[0])))
