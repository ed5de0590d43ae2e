"""VideoBooth's data set format: videos, captions, and the subject's mask in the first frame of each video.

    root/*.csv                          columns videoid,page_dir,name (the caption)
    root/videos/<page_dir>/<videoid>.mp4
    root/masks/<videoid>/mask.json      and mask_<value>.png, of the video's frame 0

The image prompt is cut from frame 0, so a clip always begins there: only then do mask, prompt and video
agree.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from dit_booth.data.example import Example
from dit_booth.data.image_files import Mask, MaskEntry, read_entries, read_mask
from dit_booth.data.image_prompt import Augment, pixel_box, prepare
from dit_booth.data.video import check_length, probe, read_video
from dit_booth.files import read_table, within

logger = logging.getLogger(__name__)

COLUMNS = ("videoid", "page_dir", "name")
ROOT = "data.triplets.root"
NAMED_IN_MESSAGES = 5  # broken examples that a message lists

Check = Callable[[str, str], object]
"""Raises ValueError, with the reason, if a caption lacks a subject."""


def check_caption(caption: str, subject: str) -> None:
    """Raise an error if a caption does not contain `subject` as whole words (case-insensitive).

    VideoBooth's coarse stage replaces the embeddings of the subject's words, so the caption must have them.

    Raises:
        ValueError: naming both.
    """
    words = subject.split()
    pattern = r"\s+".join(re.escape(word) for word in words)
    if not words or re.search(rf"(?<!\w){pattern}(?!\w)", caption, flags=re.IGNORECASE) is None:
        raise ValueError(f"the caption {caption!r} does not contain the subject {subject!r} as whole words")


@dataclass(frozen=True, kw_only=True)
class TripletsConfig:
    """Options of a data set in VideoBooth's format.

    Attributes:
        root: the folder that holds the CSV files, `videos/` and `masks/`.
        csv: CSV files of `root` to read; a name or a glob.
        frames: frames per example.
        stride: distance between the frames read (VideoBooth: 16 frames at 4).
        vary_stride: in training, draw the stride from 1 to `stride`.
        size: height and width in pixels, or the side of a square. The video is scaled to cover it and
            cropped.
        image_size: side of the image prompt; the smaller side of `size` where it is None.
        augment: variation of the image prompt in training.
        max_broken: number of broken examples that are left out with a warning; more are an error.
        seed: seed of all random draws.
    """

    root: str
    csv: str = "*.csv"
    frames: int = 8
    stride: int = 4
    vary_stride: bool = False
    size: int | tuple[int, int] = 256
    image_size: int | None = None
    augment: Augment = field(default_factory=Augment)
    max_broken: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = [(name, getattr(self, name), 1) for name in ("frames", "stride")]
        bounds += [("size", min(self.height_width), 8), ("image_size", self.prompt_size, 8)]
        for name, value, low in (*bounds, ("max_broken", self.max_broken, 0), ("seed", self.seed, 0)):
            if value < low:
                raise ValueError(f"data.{name} is {value}; it must be at least {low}")

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def prompt_size(self) -> int:
        return min(self.height_width) if self.image_size is None else self.image_size


@dataclass(frozen=True, kw_only=True)
class TripletRow:
    """One line of a CSV file, with the paths of its files."""

    key: str
    caption: str
    video: Path
    masks: Path


@dataclass(frozen=True, kw_only=True)
class TripletItem:
    """A row that passed the scan, and its subject: the entry of `mask.json` whose label is in the caption."""

    row: TripletRow
    entry: MaskEntry


class Triplets:
    """A data set in VideoBooth's format.

    `dataset[i]` is example `i` unvaried, for evaluation; `dataset.at(i, epoch)` varies the image prompt (and
    the stride) purely by `(seed, i, epoch)`, for training.

    The constructor scans every example (headers, masks and captions; no video is decoded). Broken ones are left
    out and counted in one warning, up to `max_broken`. The rest is fixed: a file that breaks later is an
    error that names it, as replacing the example would change the data silently.

    An example's subject is the label with the highest logit that passes `check` with the caption.

    Raises:
        ValueError: a CSV file is malformed, a path leaves `root`, or more than `max_broken` examples are
        broken.
    """

    def __init__(self, config: TripletsConfig, check: Check = check_caption) -> None:
        self.config = config
        self.items, self.broken = scan(config, check)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        """Example `index` as it is on disk."""
        return self._load(index, None)

    def at(self, index: int, epoch: int) -> Example:
        """Example `index` as varied for training in `epoch`."""
        return self._load(index, np.random.default_rng((self.config.seed, index, epoch)))

    def _load(self, index: int, rng: np.random.Generator | None) -> Example:
        if not 0 <= index < len(self.items):
            raise IndexError(f"index is {index}; the data set holds 0 to {len(self.items) - 1}")
        config, row, entry = self.config, self.items[index].row, self.items[index].entry
        try:
            stride = config.stride
            if rng is not None and config.vary_stride:
                stride = int(rng.integers(1, config.stride + 1))
            pictures = read_video(row.video, frames=config.frames, stride=stride)
            _, height, width, _ = pictures.shape
            mask = read_mask(row.masks / f"mask_{entry.value}.png", height=height, width=width)
            augment = None if rng is None else config.augment
            image = prepare(
                pictures[0], size=config.prompt_size, mask=mask, box=entry.box, augment=augment, rng=rng
            )
            box = pixel_box(entry.box, mask, height=height, width=width)
            video, small = fit(torch.from_numpy(pictures), mask, box=box, size=config.height_width)
        except ValueError as error:
            raise ValueError(f"example {row.key}: {error}") from error
        masks = torch.zeros(video.shape[0], *small.shape, dtype=torch.bool)
        masks[0] = small
        return Example(
            key=row.key,
            video=video,
            caption=row.caption,
            subject=entry.label,
            image=image,
            mask=masks,
            mask_frames=1,
        )


def fit(
    pictures: Tensor, mask: Mask, *, box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Scale a video to cover `size`, and crop it to `size` about the subject.

    The crop is central, moved as little as needed for the subject's box (in frame 0) to be inside; a box
    larger than the crop is centred. Every frame is cropped alike.

    Args:
        pictures: `f h w 3` uint8.
        mask: `h w`, of frame 0.
        box: `(x0, y0, x1, y1)` of the subject in frame 0, in pixels.
        size: height and width of the result.

    Returns:
        The video, `f 3 h w` float32 in [-1, 1], and the mask, `h w` bool.
    """
    _, height, width, _ = pictures.shape
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    x0, y0, x1, y1 = (scale * edge for edge in box)
    top = _offset(scaled[0], size[0], y0, y1)
    left = _offset(scaled[1], size[1], x0, x1)
    window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    # Resizing uint8 is faster than float.
    video = F.interpolate(
        rearrange(pictures, "f h w c -> f c h w"),
        size=scaled,
        mode="bicubic",
        antialias=True,
        align_corners=False,
    )[window]
    soft = rearrange(torch.from_numpy(mask).float(), "h w -> 1 1 h w")
    small = F.interpolate(soft, size=scaled, mode="bilinear", antialias=True, align_corners=False)[window]
    return video.float().div(127.5).sub(1).contiguous(), small[0, 0] > 0.5


def _offset(length: int, window: int, start: float, end: float) -> int:
    """Start of a window of `window` pixels on an axis of `length`, moved to contain [start, end] if possible."""
    offset = (length - window) / 2
    offset = (start + end - window) / 2 if end - start > window else min(max(offset, end - window), start)
    return min(max(round(offset), 0), length - window)


def scan(config: TripletsConfig, check: Check = check_caption) -> tuple[list[TripletItem], dict[str, str]]:
    """Check every example of a data set without decoding videos.

    Returns:
        The valid examples in the order of the files, and the reason for each broken one by its key.

    Raises:
        ValueError: see `Triplets`.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise ValueError(
            f"data.triplets.root is {config.root!r}, which is not a folder; give the folder with the CSV files"
        )
    files = sorted(root.glob(config.csv))
    if not files:
        raise ValueError(
            f"data.triplets.csv is {config.csv!r}, and {root} has no such file; give a CSV file or a glob"
        )
    rows = [row for file in files for row in read_rows(file, root=root)]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda row: _check(row, root, config, check), rows))
    items: list[TripletItem] = []
    broken: dict[str, str] = {}
    seen: set[str] = set()
    for row, result in zip(rows, results, strict=True):
        if row.key in seen:
            broken[f"{row.key} (again)"] = "the videoid occurs twice; keep one of the lines"
        elif isinstance(result, str):
            broken[row.key] = result
        else:
            items.append(result)
        seen.add(row.key)
    _report(broken, len(rows), config)
    if not items:
        raise ValueError(
            f"data.triplets.root is {config.root!r}, which holds no examples; check data.triplets.csv={config.csv!r}"
        )
    return items, broken


def read_rows(file: Path, *, root: Path) -> list[TripletRow]:
    """Read one CSV file, and check that its paths stay in `root`.

    Raises:
        ValueError: a column or a value is missing, the file is not UTF-8 text, or a path leaves `root`.
    """
    rows: list[TripletRow] = []
    for number, line in read_table(file, COLUMNS, f"must be {','.join(COLUMNS)}"):
        videoid, page_dir, name = (line[column] for column in COLUMNS)
        if not videoid or page_dir is None or not name or None in line:
            raise ValueError(
                f"{file}, line {number}: must have the values {', '.join(COLUMNS)}; "
                "fill them in, and quote a caption that has commas"
            )
        video = within(ROOT, root, Path("videos", page_dir, f"{videoid}.mp4"))
        masks = within(ROOT, root, Path("masks", videoid))
        rows.append(TripletRow(key=videoid, caption=name, video=video, masks=masks))
    return rows


def _check(row: TripletRow, root: Path, config: TripletsConfig, check: Check) -> TripletItem | str:
    """Return the item, or the reason why it is broken; raise an error for a path that leaves the root."""
    folder = row.masks.relative_to(root)
    entries = within(ROOT, root, folder / "mask.json")
    try:
        entry = subject_of(row, read_entries(entries), check)
    except ValueError as error:
        return str(error)
    file = within(ROOT, root, folder / f"mask_{entry.value}.png")
    try:
        info = probe(row.video)
        check_length(row.video, info, start=0, frames=config.frames, stride=config.stride)
        mask = read_mask(file, height=info.height, width=info.width)
        pixel_box(entry.box, mask, height=info.height, width=info.width)
    except ValueError as error:
        return str(error)
    return TripletItem(row=row, entry=entry)


def subject_of(row: TripletRow, entries: Sequence[MaskEntry], check: Check = check_caption) -> MaskEntry:
    """Return the entry with the highest logit whose label passes `check` with the caption.

    Raises:
        ValueError: the caption has none of the labels.
    """
    reasons = []
    for entry in sorted(entries, key=lambda entry: -entry.logit):
        try:
            check(row.caption, entry.label)
        except ValueError as error:
            reasons.append(str(error))
            continue
        return entry
    labels = ", ".join(repr(entry.label) for entry in entries)
    raise ValueError(
        f"the caption has none of the mask's labels ({labels}): {reasons[0]}; "
        "write the label into the caption, or correct mask.json"
    )


def _report(broken: dict[str, str], total: int, config: TripletsConfig) -> None:
    if not broken:
        return
    first = [f"\n  {key}: {reason}" for key, reason in list(broken.items())[:NAMED_IN_MESSAGES]]
    more = f"\n  and {len(broken) - len(first)} more" if len(broken) > len(first) else ""
    listing = "".join(first) + more
    if len(broken) > config.max_broken:
        raise ValueError(
            f"{len(broken)} of {total} examples in {config.root} are broken, and "
            f"data.triplets.max_broken is {config.max_broken}; repair or remove them, or raise it "
            f"to leave them out:{listing}"
        )
    logger.warning(
        "%d of %d examples in %s are broken and left out:%s", len(broken), total, config.root, listing
    )
