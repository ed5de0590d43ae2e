"""The budget of every system for one subject, in FLOPs; seconds are converted once, at a measured throughput."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dit_booth.files import write_text

FILE = "budget.json"
PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """FLOPs for one subject; `throughput` in FLOPs per second where `text` is in seconds, else None."""

    text: str
    flops: float
    throughput: float | None = None


def parse_budget(text: str) -> tuple[float | None, float | None]:
    """Return (FLOPs, None) of ``2PFLOP`` or (None, seconds) of ``60s``. ValueError: it is neither, or not positive."""
    number = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*"
    value: float | None = None
    flops = re.fullmatch(rf"{number}([KMGTPE]?)FLOPs?", text.strip(), re.IGNORECASE)
    seconds = re.fullmatch(rf"{number}(s|min|h)", text.strip())
    if flops:
        value = float(flops[1]) * PREFIXES[flops[2].upper()]
    elif seconds:
        value = float(seconds[1]) * UNITS[seconds[2]]
    if value is None or not 0 < value < math.inf:
        raise ValueError(f"--budget is {text!r}; write FLOPs or seconds per subject, such as 2PFLOP or 60s")
    return (value, None) if flops else (None, value)


def resolve(text: str, folder: Path, measure: Callable[[], float]) -> Budget:
    """Return the budget, as the folder has it (`keep`): a resumed comparison has the same steps.

    measure: returns FLOPs per second; called for seconds that the folder does not have. ValueError: it has others.
    """
    flops, seconds = parse_budget(text)
    file = folder / FILE
    if file.is_file():
        kept = Budget(**json.loads(file.read_text()))
        if parse_budget(kept.text) != (flops, seconds):
            raise ValueError(
                f"--budget is {text!r}, and {folder} holds a comparison at {kept.text!r}; choose another --out"
            )
        return kept
    if flops is not None:
        return Budget(text=text, flops=flops)
    assert seconds is not None
    measured = measure()
    return Budget(text=text, flops=seconds * measured, throughput=measured)


def keep(budget: Budget, folder: Path) -> None:
    """Write the budget into the folder, which then has no other."""
    write_text(folder / FILE, json.dumps(asdict(budget), indent=1) + "\n")


def throughput(step: Callable[[], object], flops: float, repeats: int = 3) -> float:
    """Return FLOPs per second of `step`, which takes `flops`: the best of some repetitions, after one to warm up."""
    step()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds)


def flops_text(flops: float) -> str:
    """Write FLOPs as `parse_budget` reads them, rounded up to three digits: 643210000 -> 644MFLOP."""
    name, scale = next(((n, s) for n, s in reversed(PREFIXES.items()) if flops >= s), ("", 1.0))
    digits = max(0, 2 - int(math.log10(max(flops / scale, 1.0))))
    return f"{math.ceil(flops / scale * 10**digits) / 10**digits:.{digits}f}{name}FLOP"
