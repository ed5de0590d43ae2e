"""Settings of a build. A field's docstring is its help on the command line; docs/data.md shows the filters' effect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_booth.errors import check_ranges

SegmenterName = Literal["masks", "grabcut", "grounded-sam"]


@dataclass(frozen=True, kw_only=True)
class ShotSettings:
    by: Literal["content", "adaptive", "transnet"] = "content"
    """Finder of cuts: change of colour, as PySceneDetect measures it; that in relation to the frames around, so that a
    fast pan is none (adaptive); or TransNet V2, which sees dissolves, too. Extra [shots] has the latter two."""
    cut: float = 27.0
    """content: change of hue, saturation and value between two frames (mean, of 255) that is a cut."""
    ratio: float = 3.0
    """adaptive: this many times the mean change of the frames around is a cut."""
    probability: float = 0.5
    """transnet: probability of a transition that is a cut."""
    split: bool = True
    """Make a clip of each shot; false: one clip of each video, dropped if it has a cut."""

    def __post_init__(self) -> None:
        check_ranges(self, "shots", cut="(0, 255]", ratio="(0, 255]", probability="(0, 1]")

    @property
    def threshold(self) -> float:
        """The value of the chosen measure from which on two frames are of different shots."""
        return {"content": self.cut, "adaptive": self.ratio, "transnet": self.probability}[self.by]


@dataclass(frozen=True, kw_only=True)
class NounSettings:
    tagger: Literal["rules", "spacy"] = "rules"
    """Finder of a caption's nouns: rules of this package, or spaCy (extra [build], and a model of yours)."""
    model: str = "en_core_web_sm"
    """spaCy's model."""
    classes: tuple[str, ...] = ()
    """Nouns that may be subjects, in the singular (VideoBooth has nine); empty: all."""


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    by: SegmenterName = "masks"
    """masks: yours, from --segment.folder. grabcut: OpenCV, from your boxes there. grounded-sam: networks."""
    folder: str = ""
    """Folder with <videoid>/mask.json (a box for each label) and, for masks, <videoid>/mask_<value>.png."""
    detector: str = "IDEA-Research/grounding-dino-tiny"
    """Grounding DINO for grounded-sam: a hub name or a local folder."""
    sam: str = "facebook/sam-vit-base"
    """SAM or SAM 2 for grounded-sam: a hub name (such as facebook/sam2.1-hiera-small) or a local folder."""
    min_score: float = 0.35
    """Lowest score of a box of Grounding DINO."""
    device: str = "cpu"
    """Device of the networks of grounded-sam."""

    def __post_init__(self) -> None:
        check_ranges(self, "segment", min_score="[0, 1]")
        if self.by in ("masks", "grabcut") and not self.folder:
            raise ValueError(
                f"segment.folder is empty; segment.by={self.by} needs the folder with <videoid>/mask.json"
            )


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    min_area: float = 0.01
    """Smallest share of the first frame that the mask may cover."""
    max_area: float = 0.6
    """Largest share of the first frame that the mask may cover."""
    max_sides: int = 1
    """Sides of the frame that the subject's box may touch."""
    min_motion: float = 0.005
    """Smallest motion of the subject against the background, in diagonals of the frame per second (optical flow)."""
    min_change: float = 0.5
    """Smallest change between sampled frames, mean over the pixels, of 255: below, the clip is a still."""
    min_sharpness: float = 18.0
    """Smallest steepness of the subject's edges in percent of its contrast (Laplacian, first frame at 256 pixels)."""
    min_frames: int = 61
    """Smallest number of frames of a clip (16 frames at interval 4 need 61)."""
    max_distance: int = 6
    """Bits of 128 in which the perceptual hashes of two clips of one video set may differ to be duplicates; -1: off."""
    watermark: str = ""
    """Image of a watermark, grey on black, of the size that it has in a frame; empty: not looked for."""
    max_watermark: float = 0.5
    """Highest correlation with the watermark's edges."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "filters",
            min_area="[0, 1]",
            max_area="[0, 1]",
            max_sides="[0, 4]",
            min_motion="[0, 100]",
            min_change="[0, 255]",
            min_sharpness="[0, 1000]",
            min_frames="[1, 1000000]",
            max_distance="[-1, 128]",
            max_watermark="[-1, 1]",
        )


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    videos: str
    """Folder of the videos, at any depth."""
    captions: str
    """CSV file with the columns video,caption (a path within the folder) or videoid,page_dir,name; maybe subject."""
    out: str
    """Folder of the data set. A build that was stopped goes on; changed settings redo only what depends on them."""
    workers: int = 0
    """Processes; 0: one for each core."""
    shots: ShotSettings = ShotSettings()
    nouns: NounSettings = NounSettings()
    segment: SegmentSettings = SegmentSettings(folder=".")
    filters: FilterSettings = FilterSettings()
    cross_pair: bool = False
    """Take a clip's image prompt from another shot of the same video and subject, against copying its pose."""

    def __post_init__(self) -> None:
        check_ranges(self, "", workers="[0, 1024]")
