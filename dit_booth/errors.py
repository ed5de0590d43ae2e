"""Checks and hints for error messages, which name the field, its value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


class HasShape(Protocol):
    """A tensor, as far as its shape matters."""

    @property
    def shape(self) -> tuple[int, ...]: ...


SEED = "[0, 9223372036854775807]"
"""Range of a seed: what fits into the 63 bits that every random generator takes."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``; nearest: a, b`` for an error message; up to six known names if none is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:6]
    return f"; nearest: {', '.join(near)}" if near else ""


def list_mismatches(
    own: Mapping[str, HasShape], given: Mapping[str, HasShape], required: Iterable[str], most: int
) -> str:
    """List weights that are missing, unexpected or of another shape than a network's; empty if none is.

    own: the network's. given: a file's. required: names that the file must have. most: names of each kind to list.
    """
    shapes = [
        f"{name}: {tuple(tensor.shape)} in the file, {tuple(own[name].shape)} here"
        for name, tensor in given.items()
        if name in own and tensor.shape != own[name].shape
    ]
    kinds = {
        "missing": [name for name in required if name not in given],
        "unexpected": [name for name in given if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:most])}{', ...' if len(names) > most else ''})"
        for kind, names in kinds.items()
        if names
    )


def check_ranges(config: DataclassInstance, section: str, **ranges: str) -> None:
    """Raise ValueError for a numeric field of `config` that is no finite number in its range.

    section: the fields' section, as in ``train.lr``, or none. ranges: an interval for each field, such as ``(0, 1]``.
    A field whose annotation has no float takes whole numbers only; each element of a tuple is checked.
    """
    annotations = {field.name: str(field.type) for field in dataclasses.fields(config)}
    for name, interval in ranges.items():
        value: object = getattr(config, name)
        annotation = annotations[name]
        if value is None and "None" in annotation:
            continue
        check_number(f"{section}.{name}".lstrip("."), value, interval, whole="float" not in annotation)


def check_number(field: str, value: object, interval: str, *, whole: bool = True) -> None:
    """Raise ValueError for a value, or an element of a tuple, that is no finite (whole) number in an interval."""
    if not all(_contains(interval, x, whole) for x in (value if isinstance(value, tuple) else (value,))):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"{field} is {value!r}; use {kind} in {interval}")


def _contains(interval: str, value: object, whole: bool) -> bool:
    """Return whether `value` is a finite number, no bool, in an interval such as ``[0, 1)``."""
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    low, high = (int(bound) if bound.isdigit() else float(bound) for bound in interval[1:-1].split(", "))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return above and below and math.isfinite(value)
