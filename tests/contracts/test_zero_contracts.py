"""Every registered strategy under ZeRO-2 and ZeRO-3 on two CPU ranks, which check one after the other.

Each by itself on the DiT; on the U-Net and Wan, to save engines, in sums that train all of their members in one stage.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from dit_booth.config import STAGES
from dit_booth.strategy import find, registered

pytestmark = pytest.mark.slow
SUMS = (
    "token_replacement+kv_concat+adaln+decoupled_attention+token_bank+query_projection+spatial_concat",
    "in_context+elite_local+lvdm",
    "lora+textual_inversion",
)


def test_partitioned_over_two_ranks_every_strategy_trains_as_in_one_piece(program: Any) -> None:
    trained = [name for name, cls in registered().items() if cls.stages()]
    check(program, ["dit-factorised"], trained)


def test_partitioned_over_two_ranks_sums_of_every_strategy_train_as_in_one_piece(program: Any) -> None:
    check(program, ["unet", "wan"], SUMS)


def check(program: Any, backbones: list[str], strategies: tuple[str, ...] | list[str]) -> None:
    first, second = program.two_ranks(
        *strategies, "--backbones", *backbones, program="dit_booth.testing.zero"
    )
    assert (first.code, second.code) == (0, 0), first.output[-4000:] + second.output[-4000:]
    for name, backbone in product(strategies, backbones):
        assert f"{name} on {backbone}, ranks 2: ZeRO 2 and 3 as one piece" in first.output


def test_the_sums_leave_no_strategy_out() -> None:
    """The check takes a sum's last stage, so that has to be the last of each member, too."""
    members = [cls for names in SUMS for cls in find(names).values()]
    assert {cls.name for cls in members} == {name for name, cls in registered().items() if cls.stages()}
    for names in SUMS:
        assert len({max(map(STAGES.index, cls.stages())) for cls in find(names).values()}) == 1, names
