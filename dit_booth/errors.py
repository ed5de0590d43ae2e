"""Checks and hints for error messages, which name the field, its value and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``; nearest: a, b`` for an error message; up to six known names if none is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names[:6]
    return f"; nearest: {', '.join(near)}" if near else ""
