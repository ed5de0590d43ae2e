"""Videos with captions and masks on disk as a data set, in VideoBooth's format or another that `formats` knows.

The image prompt is cut from frame 0, so a clip always begins there: only then do mask, prompt and video
agree.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from torch import Tensor

from dit_booth.data.example import Example
from dit_booth.data.image_prompt import Augment
from dit_booth.data.readers.formats import FORMATS, FormatName
from dit_booth.data.readers.item import (
    Check,
    Escapes,
    Item,
    Row,
    check_caption,
    check_row,
    cut_prompts,
    load_item,
    read_clip,
)
from dit_booth.data.shapes import Shape
from dit_booth.data.subject import template_from

logger = logging.getLogger(__name__)

NAMED_IN_MESSAGES = 5  # broken examples that a message lists


@dataclass(frozen=True, kw_only=True)
class TripletsConfig:
    """Options of a data set on disk.

    Attributes:
        root: the folder of the data set.
        format: how the folder lists its examples (`dit_booth.data.readers.formats`).
        csv: files of `root` that list examples, a name or a glob; empty: the format's own.
        frames: frames per example.
        stride: distance between the frames read (VideoBooth: 16 frames at 4).
        vary_stride: in training, draw the stride from 1 to `stride`.
        size: height and width in pixels, or the side of a square. The video is scaled to cover it and
            cropped.
        buckets: shapes of which each video has the one that fits it; empty: `frames` and `size`.
        image_size: side of the image prompt; the smaller side of `size` where it is None.
        image_prompts: image prompts of an example: as many of those that it has, in order, then zero images.
        augment: variation of the image prompt in training.
        cross_pair: cut an image prompt from another clip where the data name one (column `image_from`).
        max_broken: number of broken examples that are left out with a warning; more are an error.
        variations: number of variations of an example in training, in turn by epoch; 0: a new one in every epoch.
        seed: seed of all random draws.
    """

    root: str
    format: FormatName = "videobooth"
    csv: str = ""
    frames: int = 8
    stride: int = 4
    vary_stride: bool = False
    size: int | tuple[int, int] = 256
    buckets: tuple[Shape, ...] = ()
    image_size: int | None = None
    image_prompts: int = 1
    augment: Augment = field(default_factory=Augment)
    cross_pair: bool = True
    max_broken: int = 0
    variations: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = [(name, getattr(self, name), 1) for name in ("frames", "stride")]
        bounds += [("size", min(self.height_width), 8), ("image_size", self.prompt_size, 8)]
        for name, value, low in (
            *bounds,
            ("image_prompts", self.image_prompts, 1),
            ("max_broken", self.max_broken, 0),
            ("variations", self.variations, 0),
            ("seed", self.seed, 0),
        ):
            if value < low:
                raise ValueError(f"data.{name} is {value}; it must be at least {low}")

    @property
    def height_width(self) -> tuple[int, int]:
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return self.buckets or (Shape(self.frames, *self.height_width),)

    @property
    def prompt_size(self) -> int:
        return min(self.height_width) if self.image_size is None else self.image_size


class Triplets:
    """Videos with captions and masks on disk as a data set.

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
        self.prompts = {item.row.key: item for item in self.items}
        if len(config.shapes) > 1:
            counts = Counter(item.shape for item in self.items)
            found = ", ".join(f"{shape}: {counts[shape]}" for shape in config.shapes)
            logger.info("examples by shape: %s", found)

    @property
    def buckets(self) -> Sequence[int]:
        """The number of each example's shape."""
        return [self.config.shapes.index(item.shape) for item in self.items]

    def only(self, frames: int) -> Self:
        """Leave out the examples with another number of frames. ValueError: none is left."""
        self.items = [item for item in self.items if item.shape.frames == frames]
        if not self.items:
            raise ValueError(
                f"data.triplets.root is {self.config.root!r}, and no video to sample prompts of has {frames} frames at"
                " data.triplets.stride; lower data.frames, or name longer ones in data.triplets.dev_csv"
            )
        return self

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        """Example `index` as it is on disk."""
        return self._load(index, None)

    def at(self, index: int, epoch: int) -> Example:
        """Example `index` as varied for training in `epoch`."""
        return self._load(index, self._draws(index, epoch))

    def images_at(self, index: int, epoch: int) -> list[Tensor]:
        """Image prompts of example `index` in `epoch`, `3 s s` each, as `at` gives them, without reading the video."""
        rng, item = self._draws(index, epoch), self.items[index]
        self._stride(rng)  # drawn before the image is
        try:
            return cut_prompts(
                self._prompt_of(item),
                None,
                self.config.prompt_size,
                self.config.image_prompts,
                self.config.augment,
                rng,
            )
        except (ValueError, OSError) as error:
            raise ValueError(f"example {item.row.key}: {error}") from error

    def another_clip(self, index: int) -> tuple[Tensor, str] | None:
        """Read another clip of example `index`'s subject (f 3 h w in [-1, 1]); return it with {} in its caption.

        It is the clip that the image prompt is cut from, else what follows the example in its own video. None: that is
        too short, or the example is a picture, or has no subject.
        """
        item = self.items[index]
        other, shape = self._prompt_of(item), item.shape
        start = shape.frames * self.config.stride if other is item else 0
        clip = read_clip(other, start, shape, self.config.stride) if other.subject else None
        return None if clip is None else (clip, template_from(other.row.caption, other.subject))

    def _load(self, index: int, rng: np.random.Generator | None) -> Example:
        if not 0 <= index < len(self.items):
            raise IndexError(f"index is {index}; the data set holds 0 to {len(self.items) - 1}")
        config, item = self.config, self.items[index]
        return load_item(
            item,
            self._prompt_of(item),
            stride=self._stride(rng),
            image_size=config.prompt_size,
            image_prompts=config.image_prompts,
            augment=None if rng is None else config.augment,
            rng=rng,
        )

    def _draws(self, index: int, epoch: int) -> np.random.Generator:
        number = epoch % self.config.variations if self.config.variations else epoch
        return np.random.default_rng((self.config.seed, index, number))

    def _stride(self, rng: np.random.Generator | None) -> int:
        varied = rng is not None and self.config.vary_stride
        return (
            int(rng.integers(1, self.config.stride + 1)) if rng is not None and varied else self.config.stride
        )

    def _prompt_of(self, item: Item) -> Item:
        if item.row.references or not self.config.cross_pair:
            return item
        return self.prompts.get(item.row.image_from, item)


def scan(config: TripletsConfig, check: Check = check_caption) -> tuple[list[Item], dict[str, str]]:
    """Check every example of a data set without decoding videos.

    Returns:
        The valid examples in the order of the files, and the reason for each broken one by its key.

    Raises:
        ValueError: see `Triplets`.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise ValueError(
            f"data.triplets.root is {config.root!r}, which is not a folder; give that of the data set"
        )
    rows = FORMATS[config.format].rows(root, config.csv)
    work = partial(_check, root=root, config=config, check=check)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(work, rows))
    items: list[Item] = []
    broken: dict[str, str] = {}
    seen: set[str] = set()
    for row, result in zip(rows, results, strict=True):
        if row.key in seen:
            broken[f"{row.key} (again)"] = "its name occurs twice; keep one of the two"
        elif isinstance(result, str):
            broken[row.key] = result
        else:
            items.append(result)
        seen.add(row.key)
    known = {item.row.key for item in items}
    for item in items:
        if config.cross_pair and item.row.image_from not in ("", *known):
            broken[item.row.key] = (
                f"image_from is {item.row.image_from!r}, which is no sound example of the set"
            )
    items = [item for item in items if item.row.key not in broken]
    _report(broken, len(rows), config)
    if not items:
        raise ValueError(
            f"data.triplets.root is {config.root!r}, which holds no examples; check data.triplets.csv={config.csv!r}"
        )
    return items, broken


def _check(row: Row, root: Path, config: TripletsConfig, check: Check) -> Item | str:
    """Return the item, or the reason why it is broken; raise an error for a path that leaves the root."""
    try:
        return check_row(row, root, shapes=config.shapes, stride=config.stride, check=check)
    except Escapes:
        raise
    except (ValueError, OSError) as error:
        return str(error)


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
