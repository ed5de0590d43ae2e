"""Every registered strategy under ZeRO-2 and ZeRO-3 on two CPU ranks, which check one after the other.

In sums that train all of their members in one stage: every parameter is partitioned and compared, and an engine costs
more than the members.
"""

from __future__ import annotations

from typing import Any

import pytest

from dit_booth.config import STAGES
from dit_booth.strategy import find, registered

pytestmark = pytest.mark.slow
SUMS = (
    "token_replacement+kv_concat+adaln+decoupled_attention+token_bank+query_projection+spatial_concat",
    "in_context+channel_concat+elite_local+image_to_video+lvdm+vace",
    "lora+textual_inversion",
)
BACKBONES = ("dit-factorised", "unet", "wan")


def test_partitioned_over_two_ranks_every_strategy_trains_as_in_one_piece(program: Any) -> None:
    ended = program.two_ranks(*SUMS, "--backbones", *BACKBONES, program="dit_booth.testing.zero")
    assert [rank.code for rank in ended] == [0, 0], "".join(rank.output[-4000:] for rank in ended)
    for backbone in BACKBONES:
        for name in SUMS:
            assert f"{name} on {backbone}, ranks 2: ZeRO 2 and 3 as one piece" in ended[0].output


def test_the_sums_leave_no_strategy_out() -> None:
    """The check takes a sum's last stage, so that has to be the last of each member, too."""
    members = [cls for names in SUMS for cls in find(names).values()]
    assert {cls.name for cls in members} == {name for name, cls in registered().items() if cls.stages()}
    for names in SUMS:
        assert len({max(map(STAGES.index, cls.stages())) for cls in find(names).values()}) == 1, names
