"""List the strategies: their ports, what they need, their stages, and how many parameters they train.

    dit-booth strategies
    dit-booth strategies "*kv*"
    dit-booth strategies mine --plugin path/to/mine.py

An installed plug-in that fails to import is named at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class StrategiesArguments:
    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """Glob over the strategies' names."""
    plugin: tuple[str, ...] = ()
    """Python files that register further strategies."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: listed; 1: a plug-in that cannot be loaded, or nothing that matches."""
    arguments = tyro.cli(StrategiesArguments, args=argv, description=__doc__, prog=prog)
    from dit_booth.config.parse import load_plugin
    from dit_booth.cost.catalogue import describe_strategies
    from dit_booth.errors import suggest
    from dit_booth.strategy import registered

    try:
        known = registered()  # the installed ones first, as in a run
        for path in arguments.plugin:
            load_plugin(path)
        entries = describe_strategies(arguments.pattern)
        if not entries:
            raise ValueError(f"no strategy matches {arguments.pattern!r}{suggest(arguments.pattern, known)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(entries))
    return 0
