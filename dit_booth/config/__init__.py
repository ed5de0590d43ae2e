"""The configuration of a run: frozen dataclasses, validated where they are built.

A field's docstring is its help on the command line. Every ValueError names the field, its value and the fix.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dit_booth.data.example import VideoDataset
from dit_booth.data.image_prompt import Augment
from dit_booth.data.readers.triplets import Check, Triplets, TripletsConfig, check_caption
from dit_booth.data.toyworld.world import Describe, Toyworld, ToyworldConfig
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.objectives import ObjectiveConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.unet.model import UNetConfig
from dit_booth.strategy import StrategyConfig, names_in

StageName = Literal["images", "base", "coarse", "fine", "joint"]
STAGES: tuple[StageName, ...] = ("images", "base", "coarse", "fine", "joint")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    kind: Literal["toyworld", "triplets"] = "toyworld"
    """toyworld: procedural, no files. triplets: a folder in VideoBooth's format."""
    root: str = ""
    """triplets: the folder with the CSV files, videos/ and masks/."""
    csv: str = "*.csv"
    """triplets: which CSV files of the folder to train on."""
    heldout_csv: str = ""
    """triplets: the CSV files whose image prompts are sampled from; empty: those trained on."""
    frames: int = 8
    """Frames of a video."""
    stride: int = 4
    """triplets: distance of the frames read (VideoBooth: 16 frames, every 4th)."""
    size: int = 32
    """Side of the videos in pixels."""
    image_size: int = 0
    """Side of the image prompt in pixels; 0: the videos' side."""
    describe: Describe = "none"
    """toyworld: what a caption says of the subject's looks; none leaves them to the image."""
    augment: bool = True
    """triplets: flip, rotate and trim the image prompt in training, as VideoBooth does."""
    max_broken: int = 0
    """triplets: how many broken videos may be left out, with a warning, before that is an error."""
    workers: int = 0
    """Processes that read the data, on each rank."""
    seed: int = 0
    """Seed of the data."""

    def __post_init__(self) -> None:
        if self.kind == "triplets" and not self.root:
            raise ValueError("data.root is empty; data.kind=triplets needs the folder of the data set")
        for name, low in (("frames", 1), ("stride", 1), ("size", 8), ("workers", 0), ("max_broken", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"data.{name} is {getattr(self, name)}; use {low} or more")

    def build(self, *, heldout: bool, check: Check = check_caption) -> VideoDataset:
        """The data set to train on, or the one whose image prompts are sampled from.

        check: raises ValueError at a caption of a file without its subject (`Triplets`).
        """
        image_size = self.image_size or None
        if self.kind == "toyworld":
            split: Literal["train", "heldout"] = "heldout" if heldout else "train"
            return Toyworld(
                ToyworldConfig(
                    frames=self.frames,
                    size=self.size,
                    image_size=image_size,
                    seed=self.seed,
                    split=split,
                    describe=self.describe,
                )
            )
        return Triplets(
            TripletsConfig(
                root=self.root,
                csv=(self.heldout_csv or self.csv) if heldout else self.csv,
                frames=self.frames,
                stride=self.stride,
                size=self.size,
                image_size=image_size,
                augment=Augment()
                if self.augment and not heldout
                else Augment(flip=False, degrees=0.0, trim=0.0),
                max_broken=self.max_broken,
                seed=self.seed,
            ),
            check,
        )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    steps: int = 200
    """Optimizer steps; 0: this stage's strategies take part as `weights` and `strategy_weights` have them."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: int = 20
    """Steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up."""
    strategies: tuple[str, ...] = ()
    """Strategies that are active; empty: those that this stage or an earlier one trains."""
    train: tuple[str, ...] = ()
    """Globs over parameter names to train; empty: what the strategies declare, or the backbone (images, base)."""
    finetune_coarse: bool = False
    """Also train what the coarse stage trains (VideoBooth's released fine stage does)."""
    drop: float = 0.0
    """Share of rows that lose text and reference together, for guidance (VideoBooth's fine stage: 0.1)."""
    drop_image: float = 0.0
    """Further rows that lose the reference only, for guidance by text and image apart (InstructPix2Pix: 0.05 each)."""
    drop_text: float = 0.0
    """Further rows that lose the text only."""
    frames: int = 0
    """Train on at most so many frames of a video, in a row from a random one: more subjects in the time; 0: all."""
    single_frames: bool = False
    """Train on every frame as a video of its own: cheap pretraining on images."""

    def __post_init__(self) -> None:
        for name in ("steps", "frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 or more")
        for name in ("drop", "drop_image", "drop_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share of the rows, 0 to 1")
        if self.drop + self.drop_image + self.drop_text > 1:
            raise ValueError(
                f"drop {self.drop} + drop_image {self.drop_image} + drop_text {self.drop_text} is more than all rows;"
                " lower one of them"
            )
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}; use a positive learning rate")

    def frames_of(self, video: int) -> int:
        """How many frames of a video of so many the stage trains on."""
        return min(self.frames or video, video)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    images: StageConfig = StageConfig(single_frames=True)
    """Pretraining of the backbone on single frames, text only: far cheaper than on videos."""
    base: StageConfig = StageConfig()
    """Pretraining of the backbone on videos, text only."""
    coarse: StageConfig = StageConfig()
    """VideoBooth's first stage."""
    fine: StageConfig = StageConfig(drop=0.1)
    """VideoBooth's second stage."""
    joint: StageConfig = StageConfig(drop=0.1)
    """Everything at once (the paper's `unified`)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch_size: int = 16
    """Videos in an optimizer step, over all ranks and accumulation steps."""
    accumulation: int = 1
    """Micro-batches in an optimizer step, on each rank."""
    clip: float = 0.1
    """Gradient norm is clipped to this (VideoBooth: 0.1)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    decay_of: tuple[str, ...] = ()
    """Weight decay of parameters by glob, such as *.bias=0; the last that matches counts, weight_decay for the rest."""
    ema: float = 0.999
    """Decay of the exponential moving average that a stage ends with; 0: none."""
    ema_width: float = 0.0
    """Average by a power function of this width instead (EDM2, arXiv 2312.02696, section 3: 0.05 or 0.1); 0: ema."""
    compile: bool = False
    """torch.compile the DiT's blocks: the first step takes a minute more, the others less time and memory."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of initialisation, noise and order."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}; use 1 or more")
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema is {self.ema}; it is a decay, 0 to 1 (exclusive)")
        if not 0 <= self.ema_width < 0.28:
            raise ValueError(f"train.ema_width is {self.ema_width}; use 0 (none) to 0.28, such as 0.1")
        for rule in self.decay_of:
            if not re.fullmatch(r".+=\d*\.?\d+(e-?\d+)?", rule):
                raise ValueError(f"train.decay_of has {rule!r}; write GLOB=DECAY, such as *.bias=0")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    videos: int = 8
    """Held-out image prompts to sample videos from; 0: none."""
    seed: int = 0
    """Seed of the sampling noise."""
    batch_size: int = 8
    """Videos sampled at once on a rank."""
    fps: int = 8
    """Frames per second of the written videos."""
    reference: Literal["own", "shuffled", "none"] = "own"
    """The image prompt that a video gets: its own, another one's (a control), or none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    strategy: str = "token_replacement+kv_concat"
    """Strategies, joined by +, such as token_replacement+kv_concat (VideoBooth), kv_concat, none."""
    backbone: Literal["dit", "unet"] = "dit"
    """Which network."""
    weights: str = "embedded"
    """Where the backbone starts: embedded (the toy world's base), none (random), a run folder, a .safetensors file, a
    Stable Diffusion 1.x folder (diffusers), DiT's official file (.pt; inflated), or VideoBooth's U-Net (.pt), which may
    bring the strategies' taps."""
    strategy_weights: tuple[str, ...] = ()
    """Where the strategies start, read in order: VideoBooth's or ELITE's mapper (.pt), run folders, .safetensors."""
    schedule: tuple[StageName, ...] = ()
    """Stages in order; empty: coarse and fine, as far as the strategies train in them."""
    out: str = ""
    """Run folder; empty: runs/<strategy>-<backbone>-<hash of the settings>."""
    store: str = ""
    """Folder of stages that runs share: a stage that is finished there is not trained again; empty: the run's own."""
    stop_after: StageName | Literal[""] = ""
    """End after this stage, without samples: what a job does that only trains a stage that others share."""
    plugin: tuple[str, ...] = ()
    """Python files that register further strategies."""
    ds_config: str = "ds_config.json"
    """DeepSpeed's engine settings (ZeRO stage, precision, offload)."""
    data: DataConfig = DataConfig()
    stages: StagesConfig = StagesConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    dit: DiTConfig = DiTConfig()
    unet: UNetConfig = UNetConfig()
    clip: ClipConfig = ClipConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()

    def options(self) -> dict[str, StrategyConfig]:
        """The options of the run's strategies, by name (sections that `cli` adds for the chosen strategies)."""
        return {name: getattr(self, name) for name in names_in(self.strategy) if hasattr(self, name)}

    def as_dict(self) -> dict[str, Any]:
        """Plain containers: what ``run.yaml`` holds."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def fingerprint(self) -> str:
        """Eight hex digits that change with every setting but the folder and what only watches the run."""
        settings = decisive(self.as_dict())
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def folder(self) -> str:
        """The run folder: the same settings always name the same one, so the same command resumes."""
        return self.out or f"runs/{self.strategy}-{self.backbone}-{self.fingerprint()}"


LATER = {
    "dit": (
        *(
            "depth",
            "hidden",
            "heads",
            "layout",
            "conditioning",
            "classes",
            "head_text",
            "positions",
            "qk_norm",
        ),
        *("mlp", "conv", "init", "checkpoint_every"),
    ),
    "train": ("decay_of", "ema_width", "compile"),
    "objective": ("min_snr",),
}
"""Fields that a run.yaml from before may lack; their default is what there was."""


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings (`RunConfig.as_dict`, or a ``run.yaml``) that change a run's result: two runs differ if these do."""
    out = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for name in ("out", "store", "stop_after"):
        out.pop(name, None)
    if not out.get("strategy_weights"):  # as in a run.yaml from before there was this field
        out.pop("strategy_weights", None)
    for section, default in (
        ("dit", DiTConfig()),
        ("train", TrainConfig()),
        ("objective", ObjectiveConfig()),
    ):
        for name in LATER[section]:
            if name in out.get(section, {}) and out[section][name] == json.loads(
                json.dumps(getattr(default, name))
            ):
                del out[section][name]
    out.get("data", {}).pop("workers", None)
    out.get("train", {}).pop("checkpoint_every", None)
    return out


__all__ = [
    "STAGES",
    "DataConfig",
    "RunConfig",
    "SampleConfig",
    "StageConfig",
    "StageName",
    "StagesConfig",
    "TrainConfig",
    "decisive",
]
