"""The study of drift: its pieces, and the page of scores whose drift is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_booth.attention import FramePlan
from dit_booth.config import RunConfig
from dit_booth.evaluation.scores import Score, write_scores
from dit_booth.models.weights import ASSETS
from dit_booth.pipeline import EMBEDDED
from experiments.bench.drift import VARIANTS, DriftArguments, Piece, Study, real_videos
from experiments.bench.drift_page import (
    FINDINGS,
    PRIMARY,
    TRUTH,
    contrasts,
    read_results,
    table,
    write_page,
)
from experiments.bench.drift_pictures import CELL, GAP, LABEL, TEXT, draw_sheet, moving_average

NAMES = [TRUTH, *VARIANTS]


def write(folder: Path, name: str, seeds: int, drift: float) -> None:
    """Write scores of videos of 8 frames, whose appearance rises by `drift`, a bit more by seed and by prompt."""
    for seed in range(seeds):
        scores = []
        for prompt in range(3):
            last = 10 + drift + 0.01 * (seed % 2) + 0.02 * prompt
            scores += [
                Score(
                    metric="appearance",
                    value=(10.0, 10.0, *[99.0] * 4, last, last),
                    prompt=f"p{prompt}",
                    seed=seed,
                ),
                Score(metric="speed", value=(float("nan"), *[0.01] * 7), prompt=f"p{prompt}", seed=seed),
            ]
        write_scores(folder / f"{name}-seed{seed}" / "scores" / "000.jsonl", scores)


def test_the_page_tells_levels_drift_and_the_primary_contrast(tmp_path: Path) -> None:
    write(tmp_path, "keyframes-8", 5, 1.0)
    write(tmp_path, "first", 5, 3.0)
    write(tmp_path, "window", 1, 5.0)
    file, results = tmp_path / "long.md", read_results(tmp_path, NAMES)
    file.write_text(f"# Old\n\n{FINDINGS}\n\nBy hand.\n\n## Figures\n\nEarlier ones.\n")
    write_page(file, results)
    page = file.read_text()
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in page.splitlines() if " x 3 |" in line
    }
    assert rows["keyframes-8"][1:4] == ["5 x 3", "10.0", "11.0"] and rows["keyframes-8"][5] == "-"
    assert rows["keyframes-8"][4].startswith("+1.02 ±") and rows["first"][4].startswith("+3.02 ±")
    assert rows["first"][5].startswith("+2.00") and rows["window"][5].startswith("+4.00")
    assert rows["window"][1] == "1 x 3" and rows["window"][7] == "1.00" and rows["window"][6] == "-"
    (said,) = [line for line in page.splitlines() if line.startswith("**keyframes-8 minus first**")]
    assert (
        "5 training seeds, 3 prompts: drift of appearance -2.00" in said and "keyframes-8 drifts less" in said
    )
    assert page.count(FINDINGS) == page.count("By hand.") == 1 and "Earlier" not in page
    scores = tmp_path / "long.scores.jsonl.gz"
    again = read_results(scores, NAMES)
    assert again.keys() == results.keys() and table(again) == table(results), "the page can be made of it"


def test_pictures_are_averages_of_frames_with_a_value(tmp_path: Path) -> None:
    values = np.full((2, 32), np.nan)
    values[0, :16], values[1, 4:] = 1.0, 3.0
    smooth = moving_average(values)
    assert smooth.shape == (32,) and smooth[0] == pytest.approx((8 * 1 + 4 * 3) / 12) and smooth[31] == 3
    assert np.isnan(moving_average(np.full((1, 40), np.nan))).all()
    videos = {name: np.full((20, 8, 8, 3), shade, np.uint8) for name, shade in (("a", 10), ("b", 200))}
    draw_sheet([videos, videos], tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (LABEL + 3 * (CELL + GAP), TEXT + 4 * (CELL + GAP)), "frames 0, 16 and 19"
        shades = [sheet.getpixel((LABEL + CELL // 2, TEXT + row * (CELL + GAP) + 9)) for row in range(4)]
    assert shades == [(10,) * 3, (200,) * 3] * 2


def test_a_contrast_of_few_seeds_is_exploratory_and_half_of_one_is_none(tmp_path: Path) -> None:
    write(tmp_path, PRIMARY[0], 3, 1.0)
    assert contrasts(read_results(tmp_path, NAMES)) == []
    write(tmp_path, PRIMARY[1], 2, 3.0)
    (said,) = contrasts(read_results(tmp_path, NAMES))
    assert "2 training seeds" in said and "exploratory" in said and "drifts less" not in said
    write_page(tmp_path / "long.md", {})
    assert "There are no scores yet" in (tmp_path / "long.md").read_text()


def test_pieces_go_seed_by_seed_through_the_primary_contrast_first() -> None:
    pieces = DriftArguments(out=Path("x"), seeds=2, prompts=24, fewer=8).pieces
    primary = [Piece(name, seed, 24) for seed in (0, 1) for name in PRIMARY]
    assert pieces[:5] == [Piece(TRUTH, 0, 24), *primary]
    assert pieces[5:] == [Piece(name, 0, 8) for name in VARIANTS if name not in PRIMARY]


def test_a_variant_is_a_run_from_the_embedded_pipeline_and_of_one_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.run", lambda command, check: None)
    Study(tmp_path, {"stages": {"fine": {"steps": 3}}}, 4).trained("diffusion_forcing", 1)
    config = RunConfig.create(tmp_path / "diffusion_forcing-seed1" / "settings.yaml")
    assert (config.stages.fine.steps, config.train.seed, config.sample.videos) == (3, 1, 0)
    assert config.schedule == ("fine",) and config.strategy_weights == (str(ASSETS / EMBEDDED["toyworld"]),)
    assert config.sample.long.kind == "chunks" and config.objective.per_frame
    with pytest.raises(ValueError, match=r"seed1/settings\.yaml has other settings; choose another --out"):
        Study(tmp_path, {}, 4).trained("diffusion_forcing", 1)
    for variant in VARIANTS.values():
        assert FramePlan(variant.training["dit"]["plan"]).causal
        assert not variant.weights_of or VARIANTS[variant.weights_of].training == variant.training


def test_the_real_videos_are_those_of_the_test_prompts() -> None:
    requests = real_videos(2, {"data": {"frames": 4}})
    assert [one.truth.shape[0] for one in requests if one.truth is not None] == [4, 4]
    assert len({one.prompt for one in requests}) == 2
