"""A sweep's YAML file: what it spans, and what is said of one that is wrong."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_booth.commands.sweep import parse, record
from dit_booth.study.description import Description, read_description, variants
from dit_booth.study.primary import Primary

ROOT = Path(__file__).parents[2]


def described(folder: Path, settings: dict[str, Any], override: dict[str, Any] | None = None) -> Description:
    (folder / "study.yaml").write_text(yaml.safe_dump({"base": "base.yaml", **settings}, sort_keys=False))
    over = None
    if override is not None:
        over = folder / "full.yaml"
        over.write_text(yaml.safe_dump(override, sort_keys=False))
    return read_description(folder / "study.yaml", over)


def spanned(folder: Path, settings: dict[str, Any]) -> list[tuple[str, dict[str, Any], int | None]]:
    return [(v.label, dict(v.options), v.seed) for v in variants(described(folder, settings))]


# ---- what it spans -----------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_seeds_are_innermost(tmp_path: Path) -> None:
    made = spanned(tmp_path, {"grid": {"a.lr": [1, 2], "b.mode": ["x", "y"]}, "seeds": [0, 5]})
    assert [(label, seed) for label, _, seed in made] == [
        ("lr=1, mode=x", 0), ("lr=1, mode=x", 5), ("lr=1, mode=y", 0), ("lr=1, mode=y", 5),
        ("lr=2, mode=x", 0), ("lr=2, mode=x", 5), ("lr=2, mode=y", 0), ("lr=2, mode=y", 5),
    ]  # fmt: skip
    assert made[2][1] == {"a.lr": 1, "b.mode": "y"}


def test_zip_goes_in_step_and_list_one_by_one_and_all_combine(tmp_path: Path) -> None:
    made = spanned(
        tmp_path,
        {
            "zip": {"lr": [1, 2], "steps": [30, 60]},
            "list": [{"label": "none", "strategy": "none"}, {"strategy": "kv", "kv.at": "all"}],
        },
    )
    assert [label for label, _, _ in made] == [
        "none, lr=1, steps=30", "none, lr=2, steps=60", "strategy=kv, at=all, lr=1, steps=30",
        "strategy=kv, at=all, lr=2, steps=60",
    ]  # fmt: skip
    assert made[3][1] == {"strategy": "kv", "kv.at": "all", "lr": 2, "steps": 60}
    assert {seed for _, _, seed in made} == {None}


def test_without_anything_to_vary_there_is_one_point(tmp_path: Path) -> None:
    assert spanned(tmp_path, {"name": "alone"}) == [("alone", {}, None)]


def test_labels_tell_options_of_one_name_apart(tmp_path: Path) -> None:
    (label, *_), *_ = spanned(
        tmp_path, {"grid": {"stages.coarse.lr": [1], "stages.fine.lr": [2], "x.y": [[3, 4]]}}
    )
    assert label == "coarse.lr=1, fine.lr=2, y=3+4"


def test_nested_options_and_dashes_are_dotted_names(tmp_path: Path) -> None:
    read = described(tmp_path, {"options": {"stages": {"fine": {"single-frames": True}}, "a.b": 1}})
    assert read.options == {"stages.fine.single_frames": True, "a.b": 1}
    assert read.base == str(tmp_path / "base.yaml")  # beside the description


def test_an_override_goes_over_all_sweeps_and_its_section_over_this_one(tmp_path: Path) -> None:
    over = {
        "options": {"a": 2, "b": 3},
        "seeds": [7],
        "base": "big.yaml",
        "sweeps": {"study": {"grid": {"x": [9]}, "options": {"b": 4}}, "other": {"grid": {"x": [1]}}},
    }
    read = described(tmp_path, {"options": {"a": 1, "c": 1}, "grid": {"x": [1, 2]}, "seeds": [0]}, over)
    assert read.options == {"a": 2, "b": 4, "c": 1}
    assert (read.grid, read.seeds, read.base) == ({"x": [9]}, (7,), str(tmp_path / "big.yaml"))
    assert read.name == "study-full"  # a folder of its own


def test_sweeps_and_their_bases_are_found_by_name_in_the_package(tmp_path: Path) -> None:
    packaged = read_description(Path("schedule"), Path("full.yaml"))
    assert packaged.name == "schedule-full"
    assert Path(packaged.base).resolve() == ROOT / "experiments/configs/videobooth_unet.yaml"
    for name in ("demo", "demo.yaml"):
        base = described(tmp_path, {"base": name}).base
        assert Path(base).resolve() == ROOT / "experiments/configs/demo.yaml"
    (tmp_path / "demo").write_text("")
    assert described(tmp_path, {"base": "demo"}).base == str(tmp_path / "demo"), (
        "a file beside it comes first"
    )
    with pytest.raises(ValueError, match="scedule is neither a file nor a packaged sweep; nearest: schedule"):
        read_description(Path("scedule"))


def test_training_seeds_and_noise_seeds_are_told_apart(tmp_path: Path) -> None:
    read = described(tmp_path, {"seeds": [0, 1], "noise_seeds": [5, 6, 7]})
    assert (read.seeds, read.noise_seeds) == ((0, 1), (5, 6, 7))
    assert [variant.seed for variant in variants(read)] == [0, 1]
    assert described(tmp_path, {}).noise_seeds == (0,)


def test_floors_are_both_unless_named(tmp_path: Path) -> None:
    assert described(tmp_path, {}).controls == ("shuffled", "none")
    assert described(tmp_path, {"controls": []}).controls == ()
    assert described(tmp_path, {"controls": ["none"]}).controls == ("none",)


LABELS = ["one", "two", "three"]
LIST = [{"label": label, "a": number} for number, label in enumerate(LABELS)]


def test_a_primary_question_is_pairs_of_labels(tmp_path: Path) -> None:
    section = {"metric": "appearance", "contrasts": [["two", "one"], ["two", "three"]], "margin": 1}
    primary = described(tmp_path, {"list": LIST, "primary": section}).primary
    assert primary == Primary(metric="appearance", contrasts=(("two", "one"), ("two", "three")), margin=1.0)
    assert primary.pairs(LABELS, "one") == [("two", "one"), ("two", "three")]


def test_a_primary_question_against_the_baseline_is_every_other_row(tmp_path: Path) -> None:
    settings = {"list": LIST, "baseline": "two", "primary": {"metric": "clip_i"}}
    primary = described(tmp_path, settings).primary
    assert primary == Primary(metric="clip_i", contrasts="baseline", margin=None)
    assert primary.pairs(LABELS, "two") == [("one", "two"), ("three", "two")]
    assert primary.pairs(LABELS, None) == []
    assert described(tmp_path, {}).primary is None


def test_reading_a_primary_question_needs_no_pytorch(tmp_path: Path) -> None:
    """A finished sweep answers at once."""
    described(tmp_path, {"list": LIST, "baseline": "one", "primary": {"metric": "appearance"}})
    code = "import sys; from pathlib import Path; from dit_booth.study.description import read_description;"
    code += f" assert read_description(Path({str(tmp_path / 'study.yaml')!r})).primary; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (["appearance"], r"primary is \['appearance'\]; write metric, contrasts"),
        ({"metrics": "appearance"}, r"'metrics' is no key of primary; nearest: metric"),
        ({}, r"primary\.metric is None, which is no metric"),
        ({"metric": "apearance"}, r"primary\.metric is 'apearance', which is no metric; nearest: appearance"),
        ({"metric": "psnr", "contrasts": "base"}, r"contrasts is 'base'; write baseline, or a list of pairs"),
        ({"metric": "psnr", "contrasts": []}, r"contrasts is \[\]; write baseline"),
        ({"metric": "psnr", "contrasts": [["one"]]}, r"contrasts has \['one'\]; write baseline"),
        ({"metric": "psnr", "contrasts": [["one", "one"]]}, r"contrasts has \['one', 'one'\]"),
        ({"metric": "psnr", "contrasts": [["one", "two"], ["two", "one"]]}, r"'two' and 'one' twice"),
        ({"metric": "psnr", "contrasts": [["one", "tow"]]}, r"names 'tow', which is no point; nearest: two"),
        ({"metric": "psnr"}, r"contrasts is baseline, and the sweep has none; add baseline"),
        ({"metric": "psnr", "margin": 0}, r"primary\.margin is 0; give a positive number"),
        ({"metric": "psnr", "margin": float("inf")}, r"primary\.margin is inf"),
        ({"metric": "psnr", "margin": True}, r"primary\.margin is True"),
    ],
)
def test_a_wrong_primary_question_is_one_line(tmp_path: Path, section: object, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        described(tmp_path, {"list": LIST, "primary": section})
    assert "study.yaml" in str(caught.value) and "\n" not in str(caught.value)


# ---- what is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gird": {"a": [1]}}, r"'gird' is no key of a sweep; nearest: grid.*belong under options"),
        ({"grid": {"a": 1}}, r"grid\.a is 1; write the list of its values"),
        ({"grid": {"a": []}}, r"grid\.a is \[\]"),
        ({"grid": [1]}, r"grid holds a list; write `option: \.\.\.` lines"),
        ({"zip": {"a": [1, 2], "b": [1]}}, r"zip differ in length \(a: 2, b: 1\)"),
        ({"list": [3]}, r"list must hold entries"),
        ({"seeds": [0, 0]}, r"which names a seed twice"),
        ({"seeds": 3}, r"seeds is 3; write a list of whole numbers"),
        ({"seeds": [True]}, r"seeds is \[True\]"),
        ({"noise_seeds": [1, 1]}, r"noise_seeds is \[1, 1\], which names a seed twice"),
        ({"noise_seeds": 0.5}, r"noise_seeds is 0\.5; write a list of whole numbers"),
        ({"controls": "none"}, r"controls is 'none'; write a list of shuffled and none, or \[\]"),
        ({"controls": ["own"]}, r"controls is \['own'\]"),
        ({"controls": ["none", "none"]}, r"controls is \['none', 'none'\]"),
        (
            {"options": {"sample": {"seeds": [1]}}},
            r"sample\.seeds is an option that noise_seeds sets; write it under",
        ),
        ({"grid": {"train.seed": [1]}}, r"train\.seed is an option that seeds sets"),
        ({"list": [{"sample.references": ["none"]}]}, r"sample\.references is an option that controls sets"),
        ({"launcher": "torchrun"}, r"launcher is 'torchrun'; use deepspeed or python"),
        ({"ranks": 2, "launcher": "python"}, r"ranks is 2; use 1 or more, and launcher deepspeed"),
        ({"baseline": [1]}, r"baseline is \[1\]; name the options of a point, or its label"),
        ({"base": ""}, r"has no `base`"),
    ],
)
def test_a_wrong_description_is_one_line(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        described(tmp_path, settings)
    assert "study.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_an_option_in_two_places_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="study: a is in two of grid, zip and list"):
        spanned(tmp_path, {"grid": {"a": [1]}, "list": [{"a": 2}]})


def test_a_file_that_is_not_there_or_no_yaml(tmp_path: Path) -> None:
    described(tmp_path, {})
    with pytest.raises(
        ValueError, match=r"studi\.yaml is neither a file nor a packaged sweep; nearest: study"
    ):
        read_description(tmp_path / "studi.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        read_description(tmp_path / "broken.yaml")
    (tmp_path / "broken.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds a list"):
        read_description(tmp_path / "broken.yaml")
    with pytest.raises(ValueError, match=r"full\.yaml: 'grids' is no key"):
        described(tmp_path, {}, {"grids": {}})


@pytest.mark.parametrize("with_override", [False, True])
def test_the_copy_in_the_sweeps_folder_can_be_read_and_says_how_it_came_about(
    tmp_path: Path, with_override: bool
) -> None:
    settings = {"options": {"train.lr": 1e-5}, "grid": {"a.b": [1, "1e-4"]}, "seeds": [0], "about": "Why?"}
    settings |= {
        "noise_seeds": [2],
        "controls": [],
        "primary": {"metric": "psnr", "contrasts": [["b=1", "b=1e-4"]]},
    }
    read = described(tmp_path, settings, {"base": "other.yaml", "ranks": 2} if with_override else None)
    flags = ["--override", str(tmp_path / "full.yaml")] if with_override else []
    flags += ["--out", str(tmp_path / "my out"), "--store", str(tmp_path / "stages")]
    given = parse([str(tmp_path / "study.yaml"), *flags, "--devices", "0"])
    copy = given.out / "sweep.yaml"
    record(copy, read, given)
    said = yaml.safe_load(copy.read_text())["command"]
    assert shlex.split(said) == ["dit-booth", "sweep", str(tmp_path / "study.yaml"), *flags]
    again = read_description(copy)
    assert Path(again.base).resolve() == Path(read.base).resolve()
    assert replace(again, base=read.base) == read
    record(copy, again, parse([str(copy), "--out", str(given.out)]))
    assert yaml.safe_load(copy.read_text())["command"] == said
