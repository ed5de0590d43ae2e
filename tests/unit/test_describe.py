"""What `dit-booth describe` counts: the paper's figures, and those of a run."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch

from dit_booth.commands.describe import main
from dit_booth.config.parse import parse
from dit_booth.cost.describe import ForwardCost, image_cost, table_of_run
from dit_booth.strategy import registered

torch.set_num_threads(1)
PAPER = {  # DiT, table 1 and section 4: million parameters, and "Gflops", which are multiply-adds, at 32 x 32 x 4
    ("S", 8): (33, 0.36),
    ("S", 4): (33, 1.41),
    ("S", 2): (33, 6.06),
    ("B", 2): (130, 23.0),
    ("L", 2): (458, 80.7),
    ("XL", 2): (675, 118.6),
}


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, int], ForwardCost]:
    """What ``dit-booth describe`` prints of DiT's sizes."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([]) == 0
    line = r"DiT-(\w+)/(\d) +([\d.]+) M parameters +([\d.]+) G multiply-adds +([\d.]+) GFLOPs"
    out = {}
    for size, patch, parameters, gigas, flops in re.findall(line, said.getvalue()):
        out[size, int(patch)] = ForwardCost(round(float(parameters) * 1e6), round(float(gigas) * 1e9))
        assert float(flops) == pytest.approx(2 * float(gigas), abs=0.011)
    return out


@pytest.mark.parametrize(("size", "patch"), PAPER)
def test_images_cost_what_the_paper_says(size, patch, table) -> None:  # type: ignore[no-untyped-def]
    parameters, gigas = PAPER[size, patch]
    cost = table[size, patch]
    assert round(cost.parameters / 1e6) == parameters
    assert round(cost.multiply_adds / 1e9, 1 if gigas > 10 else 2) == gigas


def test_the_table_has_every_size_and_its_digits(table: dict[tuple[str, int], ForwardCost]) -> None:
    assert len(table) == 15
    assert table["XL", 2] == ForwardCost(674_830_000, 118_620_000_000)


def test_512_pixels_cost_525_giga_multiply_adds() -> None:
    """DiT-XL/2 at 64 x 64 latents (table 2)."""
    assert round(image_cost("XL", 2, (4, 64, 64)).multiply_adds / 1e9) == 525


def costs(*arguments: str) -> list[ForwardCost]:
    """The lines of a run's table."""
    out = []
    for line in table_of_run(parse(arguments), (4, 8, 8))[1:]:
        found = re.search(r"([\d.]+) M parameters +([\d.]+) G multiply-adds +([\d.]+) GFLOPs", line)
        assert found, line
        parameters, gigas, flops = map(float, found.groups())
        assert flops == pytest.approx(2 * gigas, abs=0.011)
        out.append(ForwardCost(round(parameters * 1e6), round(gigas * 1e9)))
    return out


def test_frames_by_themselves_cost_as_many_images() -> None:
    flags = (
        "--strategy",
        "none",
        "--dit.size",
        "S",
        "--dit.depth",
        "4",
        "--dit.layout",
        "image",
        "--dit.plan",
        "self",
    )
    one, eight = (costs(*flags, "--data.frames", str(n))[0] for n in (1, 8))
    assert eight.multiply_adds == pytest.approx(8 * one.multiply_adds, rel=0.05)
    assert eight.parameters == one.parameters


@pytest.mark.parametrize("backbone", ["dit", "unet"])
@pytest.mark.parametrize("name", sorted(registered()))
def test_every_strategy_is_counted(name: str, backbone: str) -> None:
    flags = ("--strategy", name, "--backbone", backbone, "--dit.size", "S", "--data.frames", "2")
    small = ("--dit.depth", "2", "--unet.channels", "32", "64", "--unet.layers-per-block", "1")
    found = costs(*flags, *small, "--unet.down-attention", "True", "True")
    assert len(found) == (1 if name == "none" else 2)
    if name != "none":
        alone, together = found
        assert together.parameters >= alone.parameters and together.multiply_adds >= alone.multiply_adds


def test_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--strategy", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("error: strategy 'nonsense' is unknown")
