"""List the models that ``create_model`` knows: parameters, latents, encoders, weights.

    dit-booth models
    dit-booth models "dit-*"

Embedded weights are the toy world's; all others are random until you load your own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True, kw_only=True)
class ModelsArguments:
    pattern: Annotated[str, tyro.conf.Positional] = "*"
    """Glob over the models' names."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: listed; 1: nothing matches."""
    arguments = tyro.cli(ModelsArguments, args=argv, description=__doc__, prog=prog)
    from dit_booth.cost.catalogue import describe_models
    from dit_booth.errors import suggest
    from dit_booth.models.registry import MODELS

    lines = describe_models(arguments.pattern)
    if not lines:
        hint = suggest(arguments.pattern, MODELS)
        print(f"error: no model matches {arguments.pattern!r}{hint}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0
