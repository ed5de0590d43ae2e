"""The `data` section of a run: common fields, and one nested section for each kind of data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_booth.data.example import VideoDataset
from dit_booth.data.image_prompt import Augment
from dit_booth.data.readers.triplets import Check, Triplets, TripletsConfig, check_caption
from dit_booth.data.toyworld import Describe, Scene, Split, Toyworld, ToyworldConfig
from dit_booth.errors import SEED, check_ranges

DataKind = Literal["toyworld", "triplets"]
DATA_KINDS: tuple[DataKind, ...] = ("toyworld", "triplets")


@dataclass(frozen=True, kw_only=True)
class ToyworldOptions:
    describe: Describe = "none"
    """Looks of the subject that a caption names; none leaves them to the image."""
    scene: Scene = "short"
    """short: one motion; long, for 128 frames and more: motion that reverses, drifting light, a bar that passes."""


@dataclass(frozen=True, kw_only=True)
class TripletsOptions:
    root: str = ""
    """Folder with the CSV files, videos/ and masks/."""
    csv: str = "*.csv"
    """CSV files of the folder to train on."""
    dev_csv: str = ""
    """CSV files whose image prompts are sampled from while settings are chosen; empty: those trained on."""
    test_csv: str = ""
    """CSV files whose image prompts are sampled from for published numbers; empty: those of dev_csv."""
    stride: int = 4
    """Distance between the frames read (VideoBooth: 16 frames, every 4th)."""
    augment: bool = True
    """Flip, rotate and trim the image prompt in training, as VideoBooth does."""
    max_broken: int = 0
    """Broken videos that may be left out, with a warning; one more is an error."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.triplets", stride="[1, 10000]", max_broken="[0, 1000000000]")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    kind: DataKind = "toyworld"
    """toyworld: procedural, no files. triplets: a folder in VideoBooth's format."""
    frames: int = 8
    """Frames of a video."""
    size: int = 32
    """Side of the videos in pixels."""
    image_size: int = 0
    """Side of the image prompt in pixels; 0: the videos' side."""
    workers: int = 0
    """Processes that read the data, on each rank."""
    seed: int = 0
    """Seed of the data."""
    toyworld: ToyworldOptions = ToyworldOptions()
    triplets: TripletsOptions = TripletsOptions()

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "data",
            frames="[1, 10000]",
            size="[8, 8192]",
            image_size="[0, 8192]",
            workers="[0, 256]",
            seed=SEED,
        )
        if 0 < self.image_size < 8:
            raise ValueError(f"data.image_size is {self.image_size}; use 8 or more, or 0 for data.size")
        if self.kind == "triplets" and not self.triplets.root:
            raise ValueError(
                "data.triplets.root is empty; data.kind=triplets needs the folder of the data set"
            )

    def build(self, split: Split = "train", check: Check = check_caption) -> VideoDataset:
        """Return the data set of a split: to train on, or one whose image prompts are sampled from (dev, test).

        check: raises ValueError at a caption of a file without its subject (`Triplets`).
        """
        return self._toyworld(split) if self.kind == "toyworld" else self._triplets(split, check)

    def _toyworld(self, split: Split) -> Toyworld:
        return Toyworld(
            ToyworldConfig(
                frames=self.frames,
                size=self.size,
                image_size=self.image_size or None,
                seed=self.seed,
                split=split,
                scene=self.toyworld.scene,
                describe=self.toyworld.describe,
            )
        )

    def _triplets(self, split: Split, check: Check) -> Triplets:
        options = self.triplets
        varied = options.augment and split == "train"
        dev = options.dev_csv or options.csv
        return Triplets(
            TripletsConfig(
                root=options.root,
                csv={"train": options.csv, "dev": dev, "test": options.test_csv or dev}[split],
                frames=self.frames,
                stride=options.stride,
                size=self.size,
                image_size=self.image_size or None,
                augment=Augment() if varied else Augment(flip=False, degrees=0.0, trim=0.0),
                max_broken=options.max_broken,
                seed=self.seed,
            ),
            check,
        )
