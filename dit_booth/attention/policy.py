"""The tuning of `attend`, one `Policy` for each type of device."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Policy:
    """Tuning that trades speed against memory; results differ only by rounding. The defaults are those of CUDA."""

    call_elements: int = 3 * 2**20
    """Query elements in one kernel call that is merged or accumulated: fewer save memory, more save calls."""
    max_pieces: int | None = 3
    """Split a read into at most this many calls: more save memory, fewer save launches. None sets no limit, but a call
    then has at least one head of a frame for each CPU thread."""
    split_forward: bool = False
    """Split calls in the forward pass too: saves memory (and fits CPU caches) at the price of more calls."""
    copy_below: int = 2**18
    """Copy slices of a batch when a sample has fewer query elements than this; otherwise process samples one by one:
    copies cost memory, samples cost calls."""
    shifts: bool = True
    """Compute a shift (see `cover`) in one call without copies; this computes a few rows that are then dropped."""
    join_below: int = 96
    """Copy the keys of a segment with fewer keys than this behind those of another read: a copy saves a call."""
    light_ratio: int = 4
    """Join groups that every frame reads if all frames together have at least this many queries per key of the group:
    a copy of such keys is cheaper than to merge another result as large as the queries."""


CUDA = Policy()
CPU = Policy(call_elements=2**21, max_pieces=None, split_forward=True, shifts=False)
OTHER = replace(CUDA, shifts=False)
"""For any other type of device, e.g. meta tensors on which FLOPs are counted."""

POLICIES = {"cpu": CPU, "cuda": CUDA}
