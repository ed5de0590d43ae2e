"""Learned metrics by name."""

from pathlib import Path

import pytest
import torch

from dit_booth.evaluation.case import Case
from dit_booth.evaluation.catalogue import CATALOGUE
from dit_booth.evaluation.learned import SCORERS, SET_SCORERS, build, build_set

torch.set_num_threads(1)
FAMILIES = {**SCORERS, **SET_SCORERS}
OTHERS = ("match_i", "match_found", "nexus", "nexus_released")
PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_every_metric_is_described():
    page = PAGE.read_text()
    for name in [*(name for family in FAMILIES.values() for name in family.metrics), *OTHERS]:
        assert name in CATALOGUE
        assert f"`{name}`" in page, name
    assert all(CATALOGUE[name].level == "set" for family in SET_SCORERS.values() for name in family.metrics)


def test_the_page_names_every_option_of_weights():
    page = PAGE.read_text()
    assert all(f"`{family.weights}`" in page for family in FAMILIES.values() if family.weights)


def test_families_without_weights_score_a_video():
    video = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    case = Case(video=video, image=video[0], caption="")
    for name in ("vbench_flickering", "lite0"):
        scores = build(name, {})(case)
        assert set(scores) == set(SCORERS[name].metrics)
    assert scores["lite0_i"][0] == pytest.approx(1, abs=1e-6)


# dreamsim's package comes first, and is not among those of the tests
@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if family.weights and name != "dreamsim"]
)
def test_families_without_their_weights_name_the_option(name):
    make = build_set if name in SET_SCORERS else build
    with pytest.raises(ValueError, match=f"--weights {FAMILIES[name].weights}=FILE"):
        make(name, {})


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="no learned metric 'dinov3'; nearest: dinov2"):
        build("dinov3", {})
    with pytest.raises(ValueError, match="no learned metric 'jed'; nearest: jedi"):
        build_set("jed", {})
