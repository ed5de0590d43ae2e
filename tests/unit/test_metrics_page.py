"""The page of metrics names every metric of the catalogue."""

from pathlib import Path

from dit_booth.evaluation.catalogue import CATALOGUE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_every_metric_is_on_the_page():
    text = PAGE.read_text()
    assert [name for name in CATALOGUE if f"`{name}`" not in text] == []
