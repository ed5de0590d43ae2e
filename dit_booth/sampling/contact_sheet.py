"""One picture of many results: image prompt, ground truth and generated frames, a row for each video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dit_booth.evaluation.check import check_pictures
from dit_booth.files import replacing

_CELL = 96  # smaller frames are enlarged to at least this height, in whole steps so that pixels stay square
_MARGIN = 24  # around the sheet
_GAP = 3  # between the frames of one video
_GUTTER = 20  # between the columns of the sheet, and between rows
_TEXT = 14  # points
_LINE = 20  # height of a line of text
_PAPER, _INK, _FAINT = (255, 255, 255), (28, 28, 32), (96, 96, 104)
_RULE = (222, 222, 228)


@dataclass(frozen=True, kw_only=True)
class SheetRow:
    """One video of a contact sheet; pictures are floats in [-1, 1], and values beyond are clamped.

    Attributes:
        image: `3 s s`, the image prompt.
        generated: `f 3 h w`.
        caption: the text prompt, written under the row.
        truth: `f 3 h w`, the real video of the same prompts, where there is one.
    """

    image: Tensor
    generated: Tensor
    caption: str
    truth: Tensor | None = None

    def __post_init__(self) -> None:
        check_pictures("image", self.image, axes="3 s s")
        check_pictures("generated", self.generated, axes="f 3 h w")
        if self.truth is not None:
            check_pictures("truth", self.truth, axes="f 3 h w")
        if self.truth is not None and self.truth.shape != self.generated.shape:
            raise ValueError(
                f"truth has shape {tuple(self.truth.shape)} and generated {tuple(self.generated.shape)}; "
                "give both the same frames and size"
            )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Pixels: a frame's size on the sheet, and where the columns stand."""

    height: int
    width: int
    frames: int
    truth: bool

    @property
    def strip(self) -> int:
        """Return the width of a video's column; never narrower than its label."""
        frames = self.frames * self.width + (self.frames - 1) * _GAP
        return max(frames, math.ceil(_font().getlength("ground truth")))

    @property
    def lefts(self) -> dict[str, int]:
        """Return the left edge of every column."""
        generated = _MARGIN + self.height + _GUTTER
        if not self.truth:
            return {"image prompt": _MARGIN, "generated": generated}
        truth, generated = generated, generated + self.strip + _GUTTER
        return {"image prompt": _MARGIN, "ground truth": truth, "generated": generated}

    @property
    def sheet_width(self) -> int:
        return self.lefts["generated"] + self.strip + _MARGIN


def contact_sheet(rows: Sequence[SheetRow], path: str | Path, *, columns: int = 4) -> None:
    """Write `draw_contact_sheet` as a PNG, whole or not at all; folders are made.

    Raises:
        ValueError: as `draw_contact_sheet`, or the path does not end in `.png`.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path is {str(path)!r}; contact_sheet writes .png files: give it that suffix")
    sheet = draw_contact_sheet(rows, columns=columns)
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")


def draw_contact_sheet(rows: Sequence[SheetRow], *, columns: int = 4) -> Image.Image:
    """Draw a row for each video: image prompt | ground truth | generated, and its caption below.

    Small videos are enlarged by a whole factor with square pixels. The column of the ground truth is absent
    if no row has one, and empty in a row that has none.

    Args:
        rows: at least one; all of one video size (`h w`).
        columns: how many evenly spaced frames of a video to show, the first and the last among them.

    Raises:
        ValueError: there are no rows, their sizes differ, or `columns` is below 1.
    """
    if columns < 1:
        raise ValueError(f"columns is {columns}; show at least 1 frame")
    sizes = {tuple(row.generated.shape[-2:]) for row in rows}
    if len(sizes) != 1:
        raise ValueError(f"the rows have the video sizes {sorted(sizes)}; give one or more rows of one size")
    height, width = sizes.pop()
    factor = math.ceil(_CELL / height)
    layout = _Layout(
        height=height * factor,
        width=width * factor,
        frames=min(columns, max(len(row.generated) for row in rows)),
        truth=any(row.truth is not None for row in rows),
    )
    captions = [_wrap(row.caption, layout.sheet_width - 2 * _MARGIN) for row in rows]
    row_heights = [layout.height + 6 + _LINE * len(lines) for lines in captions]
    total = 2 * _MARGIN + _LINE + 10 + sum(row_heights) + _GUTTER * (len(rows) - 1)
    sheet = Image.new("RGB", (layout.sheet_width, total), _PAPER)
    _draw_header(sheet, layout)
    top = _MARGIN + _LINE + 10
    for row, lines, row_height in zip(rows, captions, row_heights, strict=True):
        _draw_row(sheet, layout, row, lines, top)
        top += row_height + _GUTTER
    return sheet


def _draw_header(sheet: Image.Image, layout: _Layout) -> None:
    draw = ImageDraw.Draw(sheet)
    for name, left in layout.lefts.items():
        draw.text((left, _MARGIN), name, fill=_INK, font=_font())
    rule = _MARGIN + _LINE + 1
    draw.line([(_MARGIN, rule), (layout.sheet_width - _MARGIN - 1, rule)], fill=_RULE)


def _draw_row(sheet: Image.Image, layout: _Layout, row: SheetRow, lines: list[str], top: int) -> None:
    draw = ImageDraw.Draw(sheet)
    lefts = layout.lefts
    prompt = _picture(row.image, layout.height, layout.height)
    sheet.paste(prompt, (lefts["image prompt"], top))
    # An image prompt is mostly white on white paper: a hairline around it shows where it ends.
    left, side = lefts["image prompt"], layout.height
    draw.rectangle([left - 1, top - 1, left + side, top + side], outline=_RULE)
    for name, video in (("ground truth", row.truth), ("generated", row.generated)):
        if video is None:
            continue
        shown = np.linspace(0, len(video) - 1, min(layout.frames, len(video))).round().astype(int)
        for place, frame in enumerate(shown):
            picture = _picture(video[int(frame)], layout.height, layout.width)
            sheet.paste(picture, (lefts[name] + place * (layout.width + _GAP), top))
    for number, line in enumerate(lines):
        draw.text((_MARGIN, top + layout.height + 6 + number * _LINE), line, fill=_FAINT, font=_font())


def _picture(values: Tensor, height: int, width: int) -> Image.Image:
    """Resize `3 h w` in [-1, 1] to a picture; nearest-neighbour where that is an integer enlargement."""
    pixels = rearrange((values.detach().cpu().float().clamp(-1, 1) + 1) * 127.5, "c h w -> h w c")
    picture = Image.fromarray(pixels.round().byte().numpy())
    whole = height % picture.height == 0 and width % picture.width == 0
    return picture.resize((width, height), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _wrap(text: str, width: int) -> list[str]:
    """Break a caption into lines of at most `width` pixels, between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and _font().getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_TEXT)
