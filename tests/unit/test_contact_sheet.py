"""A contact sheet shows the right pixels in the right places."""

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import repeat
from PIL import Image

from dit_booth.sampling.contact_sheet import SheetRow, contact_sheet

torch.set_num_threads(1)

BLUE = (10, 20, 250)
FIRST_TOP = 24 + 20 + 10  # margin, header and its rule


def numbered(frames: int, *, red: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Frame `i` is of the colour `(red, 10 i, 7)`."""
    colours = torch.tensor([[red, 10 * i, 7] for i in range(frames)]) / 127.5 - 1
    return repeat(colours, "f c -> f c h w", h=height, w=width)


def row(caption: str = "a ball is moving left", *, truth: bool = True, frames: int = 8, **size) -> SheetRow:
    return SheetRow(
        image=repeat(torch.tensor(BLUE) / 127.5 - 1, "c -> c h w", h=32, w=32),
        generated=numbered(frames, red=200, **size),
        truth=numbered(frames, red=100, **size) if truth else None,
        caption=caption,
    )


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def colours_along(sheet: np.ndarray, y: int) -> list[tuple[int, ...]]:
    """The colours of one line of the sheet from left to right, without repeats, paper and hairlines."""
    line = [tuple(int(v) for v in pixel) for pixel in sheet[y]]
    changes = [colour for i, colour in enumerate(line) if i == 0 or colour != line[i - 1]]
    return [colour for colour in changes if min(colour) < 200]


def test_prompt_truth_and_generated_stand_side_by_side(tmp_path: Path):
    contact_sheet([row()], tmp_path / "deep" / "sheet.png")
    shown = colours_along(read(tmp_path / "deep" / "sheet.png"), FIRST_TOP + 48)
    steps = (0, 20, 50, 70)  # frames 0, 2, 5 and 7 of 8
    assert shown == [BLUE, *((100, step, 7) for step in steps), *((200, step, 7) for step in steps)]


def test_small_videos_are_enlarged_with_square_pixels(tmp_path: Path):
    generated = torch.ones(1, 3, 32, 32)
    generated[0, :, 1, 2] = -1  # one black pixel
    contact_sheet(
        [SheetRow(image=torch.ones(3, 32, 32), generated=generated, caption="")], tmp_path / "a.png"
    )
    frame = read(tmp_path / "a.png")[FIRST_TOP : FIRST_TOP + 96, 24 + 96 + 20 :][:, :96]
    expected = np.full((96, 96, 3), 255)
    expected[3:6, 6:9] = 0
    assert np.array_equal(frame, expected)


def test_without_ground_truth_its_column_is_absent(tmp_path: Path):
    contact_sheet([row(truth=False)] * 2, tmp_path / "without.png", columns=2)
    contact_sheet([row(truth=False), row()], tmp_path / "mixed.png", columns=2)
    without, mixed = read(tmp_path / "without.png"), read(tmp_path / "mixed.png")
    only = [BLUE, (200, 0, 7), (200, 70, 7)]
    assert colours_along(without, FIRST_TOP + 48) == only
    assert colours_along(mixed, FIRST_TOP + 48) == only
    assert mixed.shape[1] - without.shape[1] == 2 * 96 + 3 + 20
    second = FIRST_TOP + 96 + 6 + 20 + 20
    assert colours_along(mixed, second + 48) == [BLUE, (100, 0, 7), (100, 70, 7), *only[1:]]


def test_labels_and_captions_are_written(tmp_path: Path):
    contact_sheet([row("a ball")], tmp_path / "short.png")
    contact_sheet([row("a ball " * 60)], tmp_path / "long.png")
    short, long = read(tmp_path / "short.png"), read(tmp_path / "long.png")
    assert (short[24:44] < 100).any()
    assert (short[FIRST_TOP + 96 + 6 : -24] < 150).any()
    assert len(long) > len(short)  # wrapped
    assert (long[:, :23] == 255).all()  # a prompt's hairline is at 23
    assert (long[:, -24:] == 255).all()


@pytest.mark.parametrize("size", [{"height": 16, "width": 24}, {"height": 64, "width": 16}, {"height": 128}])
def test_other_sizes_and_short_videos(tmp_path: Path, size):
    contact_sheet([row(frames=2, **size)], tmp_path / "a.png")
    y = FIRST_TOP + 48
    assert colours_along(read(tmp_path / "a.png"), y)[1:] == [
        (red, green, 7) for red in (100, 200) for green in (0, 10)
    ]


def test_a_failed_write_leaves_the_old_sheet_and_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.png"
    contact_sheet([row()], path)
    before = path.read_bytes()

    def fail(self, target, format):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    with pytest.raises(OSError, match="disk full"):
        contact_sheet([row()], path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_what_cannot_be_shown_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\.png"):
        contact_sheet([row()], tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="one or more rows of one size"):
        contact_sheet([], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\(16, 32\), \(32, 32\)"):
        contact_sheet([row(), row(height=16)], tmp_path / "a.png")
    with pytest.raises(ValueError, match="columns is 0"):
        contact_sheet([row()], tmp_path / "a.png", columns=0)
    video = numbered(2, red=0)
    with pytest.raises(ValueError, match="same frames and size"):
        SheetRow(image=video[0], generated=video, truth=video[:1], caption="")
    with pytest.raises(ValueError, match="generated contains NaN"):
        SheetRow(image=video[0], generated=video * torch.nan, caption="")
