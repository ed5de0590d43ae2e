"""Cover a visibility with few *reads*: plain batched attentions whose operands are views of the tensors.

A *read* is a batch of equal blocks; in block j the frames ``queries[j]`` read all the groups ``groups[j]``. Three
shapes matter. One block of many frames is a *fold*: the frames' queries are laid end to end against one copy of the
keys, so frame 0 is never repeated. One frame and one group per block is a *pairing*: frames go to the batch. One
frame and several consecutive groups per block is a *window*: blocks overlap in memory instead of being copied.

In a batch of videos, blocks of all frames but the first few are not a view of (batch x frames). But where every frame's
groups are at one distance from it, they are so across all videos laid end to end: a *shift*. Rows whose frame belongs
to one video and whose group to another are computed, too, and dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from dit_booth.attention.plans import Frames
from dit_booth.attention.tracing import constant

Index = tuple[tuple[int, ...], ...]
"""Frames or groups of every block: one row for each block, all of one length."""


@dataclass(frozen=True)
class Read:
    """One batched plain attention: block j lets ``queries[j]`` read ``groups[j]``; no frame is in two blocks."""

    queries: Index
    groups: Index

    @property
    def frames(self) -> int:
        """Number of query frames."""
        return len(self.queries) * len(self.queries[0])

    @property
    def area(self) -> int:
        """Number of (frame, group) pairs."""
        return self.frames * len(self.groups[0])

    def pairs(self) -> Iterator[tuple[int, int]]:
        for queries, groups in zip(self.queries, self.groups, strict=True):
            yield from ((i, g) for i in queries for g in groups)

    def is_shift(self, frames: int) -> bool:
        """Return True if over half of `frames` are consecutive one-frame blocks at one distance from their groups."""
        queries, groups = _strided_run(self.queries), _strided_run(self.groups)
        if len(self.queries) == 1 or queries is None or groups is None:
            return False
        return queries[2:] == (1, 1) and groups[3] == 1 and 2 * len(self.queries) > frames

    def split_overlaps(self) -> tuple[Read, ...]:
        """Split into reads whose blocks share no group: a window becomes pairings.

        The backward pass uses these, because the gradient of overlapping keys would need a copy of each overlap.
        """
        if len({g for row in self.groups for g in row}) == len(self.groups) * len(self.groups[0]):
            return (self,)
        return tuple(
            Read(self.queries, tuple((g,) for g in column)) for column in zip(*self.groups, strict=True)
        )

    def blocks(self, start: int, stop: int) -> Read:
        """Return the read of some of the blocks."""
        return Read(self.queries[start:stop], self.groups[start:stop])

    def pieces(self, max_frames: int) -> list[Read]:
        """Split into the fewest reads of at most `max_frames` query frames each (at least one block)."""
        length = len(self.queries[0])
        if len(self.queries) == 1:
            queries = self.queries[0]
            step = _even(length, max_frames)
            return [Read((queries[i : i + step],), self.groups) for i in range(0, length, step)]
        step = _even(len(self.queries), max(1, max_frames // length))
        return [self.blocks(i, i + step) for i in range(0, len(self.queries), step)]


def _even(count: int, largest: int) -> int:
    """Return the part size that splits `count` evenly into the fewest parts of at most `largest`."""
    return -(-count // -(-count // largest))


# ---- covers ------------------------------------------------------------------------------------------------

Candidates = Callable[[list[set[int]]], list[Read]]
"""Finds reads for the pairs that are not covered yet: ``left[i]`` are the groups that frame i still has to read."""


@lru_cache(maxsize=512)
def compute_cover(frames: Frames) -> tuple[Read, ...]:
    """Cover a visibility exactly once with few reads, those with most query frames first.

    Greedy, by the largest read. Where that leaves reads whose operands are copies, a second cover, which begins with
    the longest diagonal and cuts folds into runs of frames, may have fewer reads and copies; remaining copies may be
    split into views. A round takes time linear in the pairs left; the number of rounds of a frame plan does not depend
    on the number of frames.
    """
    cover = _cover(frames, [_folds, _wide_folds, _windows])
    assert cover is not None
    if _cost(cover) > len(cover):
        runs = _cover(frames, [_diagonals, _runs, _windows], first=_diagonals, at_most=_cost(cover) - 1)
        cover = runs if runs is not None and _cost(runs) < _cost(cover) else cover
    cover = [part for read in cover for part in _in_views(read)]
    return tuple(sorted(cover, key=lambda read: -read.frames))


def _cost(cover: list[Read]) -> int:
    """Count the kernel calls of a cover; one with copied operands counts three times."""
    return sum(1 if _is_view(read) else 3 for read in cover)


def _is_view(read: Read) -> bool:
    return is_view(read.queries) and is_view(read.groups)


def _in_views(read: Read) -> list[Read]:
    """Split a read into reads with a constant distance from block to block if those cost less."""
    starts = [(queries[0], groups[0]) for queries, groups in zip(read.queries, read.groups, strict=True)]
    distances = [(q - p, h - g) for (p, g), (q, h) in pairwise(starts)]
    common = Counter(distances).most_common(1)
    cuts = [i for i, distance in enumerate(distances, 1) if distance != common[0][0]]
    parts = [read.blocks(i, j) for i, j in pairwise([0, *cuts, len(starts)])]
    return parts if _cost(parts) < _cost([read]) else [read]


def _cover(
    frames: Frames, candidates: list[Candidates], first: Candidates | None = None, at_most: int | None = None
) -> list[Read] | None:
    """Cover greedily; return None if that takes more than `at_most` reads."""
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
    """Find blocks of groups with the same reading frames; blocks of one shape without common frames form a read."""
    return _batches([(tuple(who), g) for g, who in _readers(left)])


def _wide_folds(left: list[set[int]]) -> list[Read]:
    """Find blocks as `_folds` does, but with all groups that the frames share, including those other frames read."""
    readers = {g: frozenset(who) for g, who in _readers(left)}
    blocks = [
        (tuple(sorted(who)), g)
        for who in dict.fromkeys(readers.values())
        for g in sorted(left[min(who)])
        if who <= readers[g]
    ]
    return _batches(blocks)


def _runs(left: list[set[int]]) -> list[Read]:
    """Find blocks as `_folds` does, but of consecutive frames."""
    blocks = []
    for g, who in _readers(left):
        starts = [i for i, frame in enumerate(who) if i == 0 or who[i - 1] != frame - 1]
        blocks += [(tuple(who[a:b]), g) for a, b in zip(starts, [*starts[1:], len(who)], strict=True)]
    return _batches(blocks)


def _readers(left: list[set[int]]) -> list[tuple[int, list[int]]]:
    """Return every group, in order, with the frames that have to read it."""
    readers: dict[int, list[int]] = {}
    for i, groups in enumerate(left):
        for g in groups:
            readers.setdefault(g, []).append(i)
    return sorted(readers.items())


def _batches(parts: list[tuple[tuple[int, ...], int]]) -> list[Read]:
    """Collect (frames, group) into blocks with the same frames, then blocks of one shape into reads."""
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
    """Find the frames that read several consecutive groups, all at one distance from the frame."""
    windows: dict[tuple[int, int], list[int]] = {}
    for i, groups in enumerate(left):
        if len(groups) > 1 and max(groups) - min(groups) + 1 == len(groups):
            windows.setdefault((min(groups) - i, len(groups)), []).append(i)
    return [_at_distance(who, offset, length) for (offset, length), who in windows.items()]


def _diagonals(left: list[set[int]]) -> list[Read]:
    """Find the frames that read a group at one distance from the frame, among others."""
    diagonals: dict[int, list[int]] = {}
    for i, groups in enumerate(left):
        for g in groups:
            diagonals.setdefault(g - i, []).append(i)
    return [_at_distance(who, offset, 1) for offset, who in diagonals.items()]


def _at_distance(who: list[int], offset: int, length: int) -> Read:
    return Read(tuple((i,) for i in who), tuple(tuple(range(i + offset, i + offset + length)) for i in who))


# ---- views: without einops, which is slow to run and to compile at a dozen calls per read ------------------


@constant
def _strided_run(index: Index) -> tuple[int, int, int, int] | None:
    """Return (start, stop, length, step) if the blocks are consecutive frames at equal distances, else None."""
    return _cached_strided_run(index)


@lru_cache(maxsize=2048)
def _cached_strided_run(index: Index) -> tuple[int, int, int, int] | None:
    start, length = index[0][0], len(index[0])
    step = index[1][0] - start if len(index) > 1 else length
    regular = step > 0 and all(
        row == tuple(range(start + j * step, start + j * step + length)) for j, row in enumerate(index)
    )
    return (start, index[-1][-1] + 1, length, step) if regular else None


def is_whole(index: Index, count: int) -> bool:
    """Return True if the blocks contain all `count` frames in order."""
    return [i for row in index for i in row] == list(range(count))


def is_view(index: Index) -> bool:
    """Return True if `take` returns a view, so that writing to it writes to the tensor."""
    return _strided_run(index) is not None


def take(x: Tensor, index: Index) -> Tensor:
    """Select frames of x (b f ...): (b frames ...), or (b blocks length ...) for several blocks of several frames.

    A view if the index is regular.
    """
    run = _strided_run(index)
    if run is None:
        return _by_block(x[:, [i for row in index for i in row]], index)
    start, stop, length, step = run
    if _is_flat(index):
        return x[:, start : stop : step if length == 1 else 1]
    return x[:, start:stop].unfold(1, length, step).movedim(-1, 2)


def put(x: Tensor, index: Index, y: Tensor) -> None:
    """Write y to the frames that `take` selects."""
    if is_view(index):
        take(x, index).copy_(y)
    else:
        x[:, [i for row in index for i in row]] = y if _is_flat(index) else y.flatten(1, 2)


def add(x: Tensor, index: Index, y: Tensor) -> None:
    """Add y to the frames that `take` selects; blocks share no frame."""
    if is_view(index):
        take(x, index).add_(y)
    else:
        where = torch.tensor([i for row in index for i in row], device=x.device)
        x.index_add_(1, where, (y if _is_flat(index) else y.flatten(1, 2)).to(x.dtype))


def lay_out(x: Tensor, index: Index, shift: int = 0) -> Tensor:
    """Lay out x (b f n k d) as an operand of plain attention ((b j) k (f n) d): tokens of a block's frames end to end.

    shift: frames of a video if the read is taken as a shift, else 0. The batch then has a row for every frame from the
    first block of the first video to the last block of the last.
    """
    if shift:
        run = _strided_run(index)
        assert run is not None
        start, _, length, _ = run
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
    """View a result of plain attention ((b j) k (f n) d) in the shape that `take` returns. shift: as for `lay_out`."""
    blocks, length = len(index), len(index[0])
    x = x.transpose(1, 2)
    if shift:
        x = x.unfold(0, blocks, shift).movedim(-1, 1)  # b j n k d
    elif blocks == 1:
        x = torch.unflatten(x, 1, (length, -1))  # b f n k d
    elif length == 1:
        x = torch.unflatten(x, 0, (-1, blocks))  # b j n k d
    else:
        x = torch.unflatten(torch.unflatten(x, 0, (-1, blocks)), 2, (length, -1))  # b j f n k d
    return x


def _is_flat(index: Index) -> bool:
    return len(index) == 1 or len(index[0]) == 1


def _by_block(x: Tensor, index: Index) -> Tensor:
    return x if _is_flat(index) else torch.unflatten(x, 1, (len(index), len(index[0])))
