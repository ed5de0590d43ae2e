"""Every registered strategy under ZeRO-2 and ZeRO-3 on two CPU ranks, which check one after the other."""

from __future__ import annotations

from typing import Any

import pytest

from dit_booth.strategy import registered


@pytest.mark.slow
def test_partitioned_over_two_ranks_every_strategy_trains_as_in_one_piece(program: Any) -> None:
    first, second = program.two_ranks(program="dit_booth.testing.zero")
    assert (first.code, second.code) == (0, 0), first.output[-4000:] + second.output[-4000:]
    for name, cls in registered().items():
        for backbone in ("dit-factorised", "unet"):
            line = f"{name} on {backbone}, ranks 2: ZeRO 2 and 3 as one piece"
            assert (line in first.output) == bool(cls.stages()), line  # `none` trains nothing
