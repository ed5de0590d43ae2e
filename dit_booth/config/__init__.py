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
from pathlib import Path
from typing import Literal

from dit_booth.config.data import DATA_KINDS, DataConfig, DataKind, ToyworldOptions, TripletsOptions
from dit_booth.config.decisive import PlainDict, decisive
from dit_booth.config.long import LongConfig
from dit_booth.config.pipeline_folder import is_pipeline
from dit_booth.config.stages import STAGES, StageConfig, StageName, StagesConfig
from dit_booth.config.subject import SubjectConfig
from dit_booth.diffusion.clip_sampling import ClipsConfig
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.known_frames import KnownFramesConfig
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.diffusion.start import StartConfig
from dit_booth.errors import SEED, check_ranges
from dit_booth.files import locate
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.dit.model import DiTConfig
from dit_booth.models.text.config import TextConfig
from dit_booth.models.unet.model import UNetConfig
from dit_booth.models.wan.model import WanConfig
from dit_booth.strategy import StrategyConfig, names_in

SampleReference = Literal["own", "shuffled", "none"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    batch_size: int = 16
    """Videos in an optimizer step, over all ranks and accumulation steps."""
    accumulation: int = 1
    """Micro-batches in an optimizer step, on each rank."""
    clip: float = 0.1
    """Gradient norm is clipped to this (VideoBooth: 0.1); always on, a large bound such as 1e9 never clips."""
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
    validate_every: int = 0
    """Steps between validations: the loss of held-out videos by noise level, samples of held-out prompts; 0: none."""
    validate_examples: int = 16
    """Held-out videos in a validation's loss."""
    validate_prompts: int = 4
    """Held-out prompts that a validation samples, in few steps, and compares with their images; 0: none."""
    seed: int = 0
    """Seed of initialisation, noise and order."""

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "train",
            **dict.fromkeys(("batch_size", "accumulation"), "[1, 1000000]"),
            clip="(0, 1000000000]",
            betas="[0, 1)",
            weight_decay="[0, 1000]",
            ema="[0, 1)",
            ema_width="[0, 0.28)",
            checkpoint_every="[1, 1000000000]",
            validate_every="[0, 1000000000]",
            validate_examples="[1, 1000000]",
            validate_prompts="[0, 1000000]",
            seed=SEED,
        )
        for rule in self.decay_of:
            decay = re.fullmatch(r".+=(\d*\.?\d+(?:e-?\d+)?)", rule)
            if not decay or float(decay[1]) > 1000:
                raise ValueError(
                    f"train.decay_of has {rule!r}; write GLOB=DECAY, such as *.bias=0, with a decay in [0, 1000]"
                )


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    videos: int = 8
    """Prompts to sample videos for; 0: none."""
    split: Literal["dev", "test"] = "dev"
    """Prompts: dev, which settings are chosen on, or test, for published numbers."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the sampling noise: each prompt gets a video of every seed."""
    references: tuple[SampleReference, ...] = ("own",)
    """Image prompts that the videos get: their own, and the floors shuffled (another prompt's) and none."""
    batch_size: int = 8
    """Videos sampled at once on a rank."""
    fps: int = 8
    """Frames per second of the written videos."""
    long: LongConfig = LongConfig()

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "sample",
            videos="[0, 1000000]",
            seeds=SEED,
            batch_size="[1, 100000]",
            fps="[1, 1000]",
        )
        for name in ("seeds", "references"):
            values: tuple[object, ...] = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"sample.{name} is {values}; name at least one, each once")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    strategy: str = "token_replacement+kv_concat"
    """Strategies, joined by +, such as token_replacement+kv_concat (VideoBooth), kv_concat, none."""
    backbone: Literal["dit", "unet", "wan"] = "dit"
    """The network: the video DiT, VideoBooth's U-Net, or Wan 2.1."""
    weights: str = "embedded"
    """Source of the backbone's weights: embedded (the toy world's base), none (random), a run folder, .safetensors,
    a Stable Diffusion 1.x or Wan 2.1 folder (diffusers), DiT's official file (.pt; inflated), or VideoBooth's U-Net
    (.pt), which may hold the strategies' taps."""
    strategy_weights: tuple[str, ...] = ()
    """Sources of the strategies' weights, in order: VideoBooth's or ELITE's mapper (.pt), run folders, .safetensors."""
    schedule: tuple[StageName, ...] = ()
    """Stages in order; empty: coarse and fine, as far as the strategies train in them."""
    out: str = ""
    """Run folder; empty: runs/<strategy>-<backbone>-<hash of the settings>."""
    store: str = ""
    """Folder of stages that runs share: a stage that is finished there is not trained again; empty: the run's own."""
    stop_after: StageName | Literal[""] = ""
    """End after this stage, without samples, as a job does that trains only a stage that others share."""
    plugin: tuple[str, ...] = ()
    """Python files that register further strategies."""
    ds_config: str = "ds_config.json"
    """DeepSpeed's engine settings (ZeRO stage, precision, offload)."""
    data: DataConfig = DataConfig()
    subject: SubjectConfig = SubjectConfig()
    stages: StagesConfig = StagesConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    start: StartConfig = StartConfig()
    known: KnownFramesConfig = KnownFramesConfig()
    clips: ClipsConfig = ClipsConfig()
    dit: DiTConfig = DiTConfig()
    unet: UNetConfig = UNetConfig()
    wan: WanConfig = WanConfig()
    clip: ClipConfig = ClipConfig()
    text: TextConfig = TextConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for numbers of frames or a size that cannot be."""
        if not self.subject.prompts:  # else no video of the data need be read
            self.data.check_toyworld()
        self.autoencoder.latent_frames(self.data.frames, "data.frames")
        for shape in self.data.shapes("train"):
            self.autoencoder.latent_frames(shape.frames, f"the number of frames of {shape} in data.buckets")
        for name in STAGES:
            for length in getattr(self.stages, name).lengths:
                self.autoencoder.latent_frames(length or 1, f"stages.{name}.frames")

    @classmethod
    def create(cls, config: str | Path | Mapping[str, object] = "", **settings: object) -> RunConfig:
        """Return the run of a configuration with `settings` over it, checked by the command line's parser.

        config: name of a packaged configuration (``dreambooth``), path of a YAML file, or its content; default:
            ``demo``, or ``wan`` where `weights` is the folder of a Wan pipeline.
        settings: fields, and mappings for sections, a strategy's options under its name:
        ``create(strategy="kv_concat", kv_concat={"update": "direct"}, stages={"fine": {"steps": 500}})``.
        ValueError: an unknown name (with the nearest), or a value that cannot be.
        """
        from dit_booth.config.parse import create

        return create(config, settings)

    @property
    def network(self) -> DiTConfig | UNetConfig | WanConfig:
        """The section of the chosen backbone."""
        networks: dict[str, DiTConfig | UNetConfig | WanConfig] = {
            "dit": self.dit,
            "unet": self.unet,
            "wan": self.wan,
        }
        return networks[self.backbone]

    @property
    def text_source(self) -> TextConfig:
        """The section `text`, with the pipeline's folder in `weights` in the place of an empty path."""
        return self.text if self.text.path else dataclasses.replace(self.text, path=self._pipeline_folder)

    @property
    def autoencoder_source(self) -> AutoencoderConfig:
        """The section `autoencoder`; kind wan without a path: that of the pipeline's folder in `weights`."""
        section = self.autoencoder
        if section.kind != "wan" or section.path:
            return section
        return dataclasses.replace(section, path=self._pipeline_folder, subfolder=section.subfolder or "vae")

    @property
    def image_states_width(self) -> int:
        """Width of the image states that the backbone's weights read (Wan, image to video); 0: none."""
        return self.wan.image_dim if self.backbone == "wan" else 0

    @property
    def image_encoder_source(self) -> str:
        """The folder of the encoder whose states image-to-video weights read: the pipeline's, where none is set."""
        return self.wan.image_encoder or self._pipeline_folder

    @property
    def _pipeline_folder(self) -> str:
        return self.weights if is_pipeline(self.weights) else ""

    @property
    def latent_frames(self) -> int:
        """Latent frames of a video of `data.frames` frames."""
        return self.autoencoder.latent_frames(self.data.frames)

    def engine_settings(self) -> PlainDict:
        """Read DeepSpeed's settings (`ds_config`). ValueError: there is no such file, or it is not JSON."""
        file = locate(self.ds_config, "configs")
        if not file.is_file():
            raise ValueError(
                f"ds_config is {self.ds_config!r}, which is not a file; give DeepSpeed's JSON settings"
            )
        try:
            settings: PlainDict = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"ds_config {file} is not JSON: {error}") from error
        return settings

    def options(self) -> dict[str, StrategyConfig]:
        """Return the options of the run's strategies, by name (sections that the parser adds for them)."""
        return {name: getattr(self, name) for name in names_in(self.strategy) if hasattr(self, name)}

    def as_dict(self) -> PlainDict:
        """Return plain containers: the content of ``run.yaml``."""
        plain: PlainDict = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def fingerprint(self) -> str:
        """Return eight hex digits that change with every setting but the folder and what only watches the run."""
        settings = decisive(self.as_dict())
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]

    def folder(self) -> str:
        """Return the run folder: the same settings always name the same one, so the same command resumes."""
        return self.out or f"runs/{self.strategy}-{self.backbone}-{self.fingerprint()}"


__all__ = [
    "DATA_KINDS",
    "STAGES",
    "DataConfig",
    "DataKind",
    "LongConfig",
    "PlainDict",
    "RunConfig",
    "SampleConfig",
    "SampleReference",
    "StageConfig",
    "StageName",
    "StagesConfig",
    "SubjectConfig",
    "ToyworldOptions",
    "TrainConfig",
    "TripletsOptions",
    "decisive",
]
