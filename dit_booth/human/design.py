"""The design of a human study: which pairs are compared, and each rater's list of them, balanced and by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
Design = Literal["all", "baseline", "blocks"]
Kind = Literal["pair", "repeat", "planted"]
_SUBSETS = 4096  # candidates for a block, at most: more are drawn


@dataclass(frozen=True, order=True)
class Cell:
    """Two systems' videos of one prompt: indices, with `first < second`."""

    prompt: int
    first: int
    second: int


@dataclass(frozen=True)
class Slot:
    """One trial of a rater: `index` is that of a cell or of a planted pair; `swapped`: the second is on the left."""

    kind: Kind
    index: int
    swapped: bool


def draw_cells(
    design: Design, systems: int, prompts: int, *, block: int, rng: np.random.Generator
) -> list[Cell]:
    """Return the cells of a design.

    all: every pair of systems for every prompt. baseline: every system with the first one. blocks: `block` of the
    systems for each prompt, all pairs of them: a balanced incomplete block design where `prompts` permits one
    (Yates, Annals of Eugenics 7, 1936), else the nearest that greedy choice finds.

    Raises:
        ValueError: `block` is not in [2, systems].
    """
    if design == "baseline":
        return [Cell(prompt, 0, other) for prompt in range(prompts) for other in range(1, systems)]
    if design == "all":
        pairs = list(combinations(range(systems), 2))
        return [Cell(prompt, a, b) for prompt in range(prompts) for a, b in pairs]
    if not 2 <= block <= systems:
        raise ValueError(f"block is {block}; use a number of systems in [2, {systems}]")
    return [
        Cell(prompt, a, b)
        for prompt, chosen in enumerate(_draw_blocks(systems, prompts, block, rng))
        for a, b in combinations(chosen, 2)
    ]


def _draw_blocks(systems: int, prompts: int, block: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Choose each prompt's block so that pairs of systems occur together as equally often as possible."""
    together = np.zeros((systems, systems), dtype=int)
    blocks = []
    for _ in range(prompts):
        candidates = _subsets(systems, block, rng)
        # The sum of squares of all concurrences grows by 2 x those of the block, plus a constant.
        cost = [sum(together[a, b] for a, b in combinations(chosen, 2)) for chosen in candidates]
        best = np.flatnonzero(np.array(cost) == min(cost))
        chosen = candidates[int(rng.choice(best))]
        for a, b in combinations(chosen, 2):
            together[a, b] += 1
        blocks.append(chosen)
    return blocks


def _subsets(systems: int, block: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Return all subsets of `block` systems, or as many drawn ones as are looked at."""
    found = []
    for chosen in combinations(range(systems), block):
        found.append(chosen)
        if len(found) > _SUBSETS:
            drawn = (rng.permutation(systems)[:block] for _ in range(_SUBSETS))
            return sorted({tuple(sorted(map(int, subset))) for subset in drawn})
    return found


def draw_lists(
    cells: Sequence[Cell], *, raters: int, pairs: int, planted: int, repeats: int, rng: np.random.Generator
) -> list[list[Slot]]:
    """Draw each rater's list: `pairs` cells, `planted` checks, and `repeats` of cells with their sides swapped.

    Cells are shown equally often (their counts differ by 1 at most), and so, as far as that permits, is each prompt
    and each pair of systems to one rater. Sides are balanced within a cell and within a rater. A repeat comes at least
    a third of the list after its first showing.

    Raises:
        ValueError: a number is out of its range.
    """
    _check_numbers(len(cells), raters, pairs, planted, repeats)
    shown, leaning = np.zeros(len(cells), dtype=int), np.zeros(len(cells), dtype=int)
    prompt = np.array([cell.prompt for cell in cells])
    pair = np.unique([(cell.first, cell.second) for cell in cells], axis=0, return_inverse=True)[1]
    lists = []
    for _ in range(raters):
        chosen = _draw_rater(prompt, pair, shown, pairs, rng)
        own = 0  # the rater's count of swapped minus not swapped
        slots = []
        for cell in rng.permutation(chosen):
            shown[cell] += 1
            lean = leaning[cell] or own
            swapped = bool(lean < 0) if lean else bool(rng.random() < 0.5)
            leaning[cell] += 1 if swapped else -1
            own += 1 if swapped else -1
            slots.append(Slot("pair", int(cell), swapped))
        lists.append(_insert_checks(slots, planted, repeats, rng))
    return lists


def _draw_rater(prompt: Index, pair: Index, shown: Index, count: int, rng: np.random.Generator) -> list[int]:
    """Choose a rater's cells: the least shown first, then those whose prompt and pair the rater has least."""
    prompts, both = np.zeros(prompt.max() + 1, dtype=int), np.zeros(pair.max() + 1, dtype=int)
    taken = np.zeros(len(prompt), dtype=bool)
    chosen = []
    for _ in range(count):
        order = np.lexsort((rng.random(len(prompt)), both[pair], prompts[prompt], shown, taken))
        cell = int(order[0])
        taken[cell] = True
        prompts[prompt[cell]] += 1
        both[pair[cell]] += 1
        chosen.append(cell)
    return chosen


def _insert_checks(slots: list[Slot], planted: int, repeats: int, rng: np.random.Generator) -> list[Slot]:
    """Insert planted pairs anywhere and repeats late, each with the side that its first showing did not have."""
    third = (len(slots) + planted + repeats) // 3
    again = rng.permutation(max(1, len(slots) - third))[:repeats]
    out = list(slots)
    for index in sorted(map(int, again), reverse=True):
        first = slots[index]
        at = int(rng.integers(index + 1 + third, len(out) + 1)) if index + 1 + third <= len(out) else len(out)
        out.insert(at, Slot("repeat", first.index, not first.swapped))
    sides = rng.permutation([n % 2 == 0 for n in range(planted)])
    for number, swapped in zip(rng.permutation(planted), sides, strict=True):
        out.insert(int(rng.integers(0, len(out) + 1)), Slot("planted", int(number), bool(swapped)))
    return out


def _check_numbers(cells: int, raters: int, pairs: int, planted: int, repeats: int) -> None:
    if not 1 <= pairs <= cells:
        raise ValueError(
            f"pairs is {pairs}; the design has {cells} pairs of videos: use a number in [1, {cells}]"
        )
    if raters < 1:
        raise ValueError(f"raters is {raters}; use at least 1")
    if planted < 0:
        raise ValueError(f"planted is {planted}; use 0 or more")
    most = pairs - (pairs + planted) // 2 if pairs > 1 else 0
    if not 0 <= repeats <= most:
        raise ValueError(
            f"repeats is {repeats}; with {pairs} pairs and {planted} planted use a number in [0, {most}]"
        )
