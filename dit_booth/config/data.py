"""The `data` section of a run: common fields, and one nested section for each kind of data set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_booth.data.example import VideoDataset
from dit_booth.data.image_prompt import Augment
from dit_booth.data.readers.formats import FormatName
from dit_booth.data.readers.item import Check, check_caption
from dit_booth.data.readers.triplets import Triplets, TripletsConfig
from dit_booth.data.shapes import Shape, parse_shape
from dit_booth.data.toyworld import Describe, Scene, Split, Toyworld, ToyworldConfig
from dit_booth.errors import SEED, check_ranges

CACHE_INDEX = "index.json"
"""File that tells what a folder of encoded data holds."""
DataKind = Literal["toyworld", "triplets", "images"]
DATA_KINDS: tuple[DataKind, ...] = ("toyworld", "triplets", "images")


@dataclass(frozen=True, kw_only=True)
class ToyworldOptions:
    describe: Describe = "none"
    """Looks of the subject that a caption names; none leaves them to the image."""
    scene: Scene = "short"
    """short: one motion; long, for 128 frames and more: motion that reverses, drifting light, a bar that passes."""


@dataclass(frozen=True, kw_only=True)
class TripletsOptions:
    root: str = ""
    """Folder of the data set."""
    format: Literal["videobooth", "webvid", "folder", "metadata", "shards"] = "videobooth"
    """Format of the folder; docs/data.md describes them."""
    csv: str = ""
    """Files of the folder that list the examples to train on, a glob; empty: the format's, such as *.csv."""
    dev_csv: str = ""
    """Files whose image prompts are sampled from while settings are chosen; empty: those trained on."""
    test_csv: str = ""
    """Files whose image prompts are sampled from for published numbers; empty: those of dev_csv."""
    stride: int = 4
    """Distance between the frames read (VideoBooth: 16 frames, every 4th)."""
    augment: bool = True
    """Flip, rotate and trim the image prompt in training, as VideoBooth does."""
    cross_pair: bool = True
    """Cut an image prompt from another clip of the subject where the data name one (column image_from)."""
    max_broken: int = 0
    """Broken videos that may be left out, with a warning; one more is an error."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.triplets", stride="[1, 10000]", max_broken="[0, 1000000000]")


@dataclass(frozen=True, kw_only=True)
class ImagesOptions:
    root: str = ""
    """Folder with picture.jpg, picture.txt (caption; second line: subject) and maybe picture.mask.png."""
    augment: bool = True
    """Flip, rotate and trim the image prompt in training, as VideoBooth does."""
    max_broken: int = 0
    """Broken pictures that may be left out, with a warning; one more is an error."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.images", max_broken="[0, 1000000000]")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    kind: DataKind = "toyworld"
    """toyworld: procedural, no files. triplets: a folder of videos with captions and masks. images: one of pictures,
    which are videos of one frame."""
    frames: int = 8
    """Frames of a video."""
    size: int | tuple[int, int] = 32
    """Side of the videos in pixels, or height and width, such as 480 832 (the toy world has squares alone)."""
    buckets: tuple[str, ...] = ()
    """Shapes to train on, HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, such as 256x256 192x320 192x320x4: a video has the one
    that fits it, a batch one alone. Empty: size and frames. Data on disk only; samples have size and frames."""
    image_size: int = 0
    """Side of the image prompt in pixels; 0: the videos' shorter side."""
    image_prompts: int = 1
    """Image prompts of an example, in the data's order; absent ones are zero images. Some strategies read the first."""
    workers: int = 0
    """Processes that read the data, on each rank."""
    seed: int = 0
    """Seed of the data."""
    variations: int = 0
    """Variations of each image prompt in training, in turn by epoch; 0: a new one in every epoch. Data on disk only."""
    cache: str = ""
    """Folder of these data encoded once (dit-booth data cache); empty: read and encode the files in every step."""
    toyworld: ToyworldOptions = ToyworldOptions()
    triplets: TripletsOptions = TripletsOptions()
    images: ImagesOptions = ImagesOptions()

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "data",
            frames="[1, 10000]",
            size="[8, 8192]",
            image_size="[0, 8192]",
            image_prompts="[1, 4]",
            workers="[0, 256]",
            variations="[0, 1000000]",
            seed=SEED,
        )
        if 0 < self.image_size < 8:
            raise ValueError(f"data.image_size is {self.image_size}; use 8 or more, or 0 for data.size")
        if self.kind != "toyworld" and not self.on_disk.root:
            raise ValueError(
                f"data.{self.kind}.root is empty; data.kind={self.kind} needs the folder of the data set"
            )

        self._check_buckets()
        if self.cache and self.kind == "toyworld":
            raise ValueError(
                f"data.cache is {self.cache!r}, and data.kind toyworld has no files; leave it empty"
            )

    def _check_buckets(self) -> None:
        shapes = [parse_shape(text, self.frames) for text in self.buckets]
        if shapes and self.kind == "toyworld":
            raise ValueError("data.buckets is set, and data.kind toyworld has one size; leave it empty")
        if len(set(shapes)) < len(shapes):
            raise ValueError(f"data.buckets is {' '.join(self.buckets)}; name each shape once")
        for shape in shapes:
            if min(shape[1:]) < 8 or max(shape[1:]) > 8192 or shape.frames < 1:
                raise ValueError(f"data.buckets has {shape}; use sides from 8 to 8192, and 1 frame or more")
        longest = max((shape.frames for shape in shapes), default=self.frames)
        if longest != self.frames:
            raise ValueError(
                f"data.frames is {self.frames}, and the longest of data.buckets has {longest}; make them equal"
            )

    def shapes(self, split: Split) -> tuple[Shape, ...]:
        """Return the shapes of a split; all that are sampled from have `size`, so that their videos are alike."""
        if self.kind == "images":
            shapes = [parse_shape(text, 1)._replace(frames=1) for text in self.buckets]
        else:
            shapes = [parse_shape(text, self.frames) for text in self.buckets]
        if split != "train":
            height, width = self.height_width
            shapes = [shape._replace(height=height, width=width) for shape in shapes]
        return tuple(dict.fromkeys(shapes))

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of the videos in pixels."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    @property
    def side(self) -> int:
        """The shorter side of the videos in pixels."""
        return min(self.height_width)

    @property
    def prompt_side(self) -> int:
        """Side of the image prompts in pixels."""
        return self.image_size or self.side

    @property
    def on_disk(self) -> TripletsOptions | ImagesOptions:
        """The section of the chosen kind of data on disk."""
        return self.images if self.kind == "images" else self.triplets

    @property
    def format(self) -> FormatName:
        """The format of data on disk."""
        return "images" if self.kind == "images" else self.triplets.format

    def build(self, split: Split = "train", check: Check = check_caption) -> VideoDataset:
        """Return the data set of a split: to train on, or one whose image prompts are sampled from (dev, test).

        check: raises ValueError at a caption of a file without its subject (`Triplets`).
        """
        return self._toyworld(split) if self.kind == "toyworld" else self._on_disk(split, check)

    def check_toyworld(self) -> None:
        """Raise ValueError for a size that the toy world's videos cannot have, if they are what is read."""
        if self.kind == "toyworld" and len(set(self.height_width)) > 1:
            raise ValueError(f"data.size is {self.size}, and data.kind toyworld has squares; give one side")

    def _toyworld(self, split: Split) -> Toyworld:
        self.check_toyworld()
        return Toyworld(
            ToyworldConfig(
                frames=self.frames,
                size=self.side,
                image_size=self.image_size or None,
                image_prompts=self.image_prompts,
                seed=self.seed,
                split=split,
                scene=self.toyworld.scene,
                describe=self.toyworld.describe,
            )
        )

    def read_cache(self) -> dict[str, Any]:
        """Return the index of the encoded data. ValueError: the folder has none."""
        file = Path(self.cache, CACHE_INDEX)
        if not file.is_file():
            raise ValueError(
                f"data.cache is {self.cache!r}, which has no {CACHE_INDEX}; make it: dit-booth data cache"
            )
        index: dict[str, Any] = json.loads(file.read_text())
        return index

    def lists(self, split: Split) -> str:
        """Return the glob of the files that list a split; empty: all that the format has."""
        if self.kind == "images":
            return ""
        dev = self.triplets.dev_csv or self.triplets.csv
        return {"train": self.triplets.csv, "dev": dev, "test": self.triplets.test_csv or dev}[split]

    def _on_disk(self, split: Split, check: Check) -> Triplets:
        options = self.on_disk
        varied = options.augment and split == "train"
        frames = 1 if self.kind == "images" else self.frames
        dataset = Triplets(
            TripletsConfig(
                root=options.root,
                format=self.format,
                csv=self.lists(split),
                frames=frames,
                stride=self.triplets.stride,
                size=self.size,
                buckets=self.shapes(split),
                image_size=self.image_size or None,
                image_prompts=self.image_prompts,
                augment=Augment() if varied else Augment(flip=False, degrees=0.0, trim=0.0),
                cross_pair=self.triplets.cross_pair,
                max_broken=options.max_broken,
                variations=self.variations,
                seed=self.seed,
            ),
            check,
        )
        return dataset if split == "train" else dataset.only(frames)
