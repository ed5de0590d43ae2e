"""`Pipeline`: an image and a sentence in, a video out; loaded from what the package brings, a run, or an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_booth.components import Components, build
from dit_booth.config import LongConfig, RunConfig
from dit_booth.config.long import LongKind
from dit_booth.data.image_input import ImageLike, MaskLike
from dit_booth.data.image_prompt import as_image_prompt, of_number
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.errors import SEED, check_number, suggest
from dit_booth.files import write_text
from dit_booth.models.fingerprint import fingerprint, warn_of_another_base
from dit_booth.models.weights import ASSETS, load_strictly, read
from dit_booth.sampling.generate import FrameSampler
from dit_booth.sampling.stream import hash_of, write_while_sampling
from dit_booth.sampling.video import Video
from dit_booth.training.stage import active_strategies, schedule_of

Images = ImageLike | Sequence[ImageLike] | None
Masks = MaskLike | Sequence[MaskLike | None] | None
EMBEDDED = {"toyworld": "toyworld-dit.safetensors", "toyworld-unet": "toyworld-unet.safetensors"}
"""Adapters that the package brings, by name: VideoBooth's two stages on the toy world (docs/model_card.md)."""


class Pipeline(Components):
    """Components that are ready to sample: ``pipe("cat.png", "a cat runs on sand", subject="cat")``.

    Its `config` is that of the run it comes from; guidance, sampler, frames and size are its defaults for a call.
    """

    @classmethod
    def load(
        cls,
        source: str | Path = "toyworld",
        *,
        base: str = "",
        settings: Mapping[str, object] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a pipeline, with the strategies of its last stage active.

        source: ``toyworld`` or ``toyworld-unet`` (embedded), a finished run's folder, or an adapter: the
            ``strategy.safetensors`` of a run, without the backbone that it was trained on.
        base: for an adapter, where the backbone is (`RunConfig.weights`); default: where the adapter's run had it from.
        settings: of the run to replace, nested: ``{"guidance": {"image": 3}}``.
        device: default: CUDA if there is a GPU.
        dtype: of backbone and strategies (`Injected.to_precision`), such as bfloat16.
        ValueError: there is no such source, the run is not finished, or weights do not fit.
        """
        path = Path(source).expanduser()
        if str(source) in EMBEDDED:
            path = ASSETS / EMBEDDED[str(source)]
        if path.is_dir():
            config, files = _run(path, settings or {})
        elif path.is_file():
            config, files = _adapter(path, base, settings or {})
        else:
            raise ValueError(
                f"{str(source)!r} is no run folder, no adapter file and not embedded{suggest(str(source), EMBEDDED)}"
            )
        built = build(config)
        for file, prefix in files.items():
            state = {prefix + name: value for name, value in read(file).items()}
            load_strictly(built.model, state, str(file), partial=True)
        warn_of_another_base(path, built.model.backbone, built.model.strategy)
        if schedule := schedule_of(config):
            built.model.active = active_strategies(config, schedule, len(schedule) - 1)
        pipeline = cls(**vars(built))
        pipeline.model.to_precision(dtype).requires_grad_(False).eval()
        return pipeline.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    def save(self, folder: str | Path) -> Path:
        """Write the pipeline as a finished run's folder: ``run.yaml``, both files of weights, and the marker."""
        folder = Path(folder)
        write_text(folder / "run.yaml", yaml.safe_dump(self.config.as_dict(), sort_keys=False))
        self.save_weights(folder)
        write_text(folder / "finished", "")
        return folder

    def __call__(self, image: Images, text: str, **options: Unpack[CallOptions]) -> Video:
        """Sample a video of the image's subject.

        image: a path, PIL image, array or tensor (`as_image_prompt`), or a list of at most ``data.image_prompts`` of
            them; None: from the text alone.
        text: what the video shows, with the subject's words in it.
        options: see `CallOptions`.
        ValueError: the text lacks the subject, or a value cannot work.
        """
        call = self._call(image, text, **options)
        video = torch.cat([frames[0] for frames in call.sampler(self)])
        image = None if call.images is None else call.images[0]
        return Video.from_tensor(video, fps=self.config.sample.fps, text=text, image=image)

    def stream(self, image: Images, text: str, **options: Unpack[CallOptions]) -> Iterator[NDArray[np.uint8]]:
        """Iterate over a video's frames (k h w 3) as they are finished, some at a time. Arguments: those of a call.

        Memory does not grow with the video where it is made from its beginning on: chunks, diffusion_forcing, lvdm.
        """
        call = self._call(image, text, **options)
        for frames in call.sampler(self):
            yield Video.from_tensor(frames[0], fps=self.config.sample.fps).frames

    def write(self, path: str | Path, image: Images, text: str, **options: Unpack[CallOptions]) -> Path:
        """Write a video to an .mp4 file while it is made. Arguments: those of a call.

        Ctrl-C leaves what is finished, and the same call goes on from there (`dit_booth.sampling.stream`).
        """
        path = Path(path)
        call = self._call(image, text, **options)
        write_while_sampling(path, call.sampler(self), fps=self.config.sample.fps, key=call.key(self))
        return path

    def image_prompt(self, image: ImageLike, mask: MaskLike | None = None) -> Tensor:
        """Return an image as the networks see it: 3 s s in [-1, 1]."""
        return as_image_prompt(image, size=self.config.data.prompt_side, mask=mask)

    def image_prompts(self, image: ImageLike | Sequence[ImageLike], mask: Masks = None) -> Tensor:
        """Return one image or several as the networks see them: r 3 s s in [-1, 1]. ValueError: too many, or none."""
        images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        masks: list[Any] = [None] * len(images)
        if mask is not None:
            masks = list(mask) if isinstance(mask, list | tuple) else [mask]
        most = self.config.data.image_prompts
        if not 1 <= len(images) <= most:
            raise ValueError(
                f"image has {len(images)} images; give 1 to {most}, as the networks were trained (data.image_prompts)"
            )
        if len(masks) != len(images):
            raise ValueError(
                f"mask has {len(masks)} masks for {len(images)} images; give each image its own, or None"
            )
        return torch.stack([self.image_prompt(*pair) for pair in zip(images, masks, strict=True)])

    def _call(
        self,
        image: Images,
        text: str,
        *,
        subject: str | None = None,
        mask: Masks = None,
        seed: int = 0,
        frames: int | None = None,
        size: int | tuple[int, int] | None = None,
        guidance: float | GuidanceConfig | None = None,
        sampler: SamplerConfig | None = None,
        steps: int | None = None,
        long: LongKind | LongConfig | None = None,
    ) -> _Call:
        """Check the arguments of a call, and fill in the run's defaults."""
        data, config = self.config.data, self.config
        if not text.strip():
            raise ValueError("text is empty; write what the video shows, such as 'a star is spinning'")
        if image is not None and not subject and self.replaces_words:
            raise ValueError(
                f"subject is missing; name the words of {text!r} that the image stands for, such as subject='star'"
            )
        frames, size = data.frames if frames is None else frames, data.size if size is None else size
        height, width = size if isinstance(size, tuple) else (size, size)
        for name, value, interval in (
            ("seed", seed, SEED),
            ("frames", frames, "[1, 10000]"),
            ("size", height, "[1, 65536]"),
            ("size", width, "[1, 65536]"),
        ):
            check_number(name, value, interval)
        if not isinstance(guidance, GuidanceConfig):
            guidance = config.guidance if guidance is None else GuidanceConfig(scale=guidance)
        sampler = sampler or config.sampler
        sampler = sampler if steps is None else replace(sampler, steps=steps)
        if not isinstance(long, LongConfig):
            long = config.sample.long if long is None else replace(config.sample.long, kind=long)
        shown = None if image is None else self.image_prompts(image, mask)
        return _Call(shown, text, subject or None, seed, (frames, height, width), guidance, sampler, long)

    @property
    def replaces_words(self) -> bool:
        """True if an active strategy puts the image in the place of the subject's words."""
        words = {site.name for site in self.model.text.sites()}
        return any(words & self.model.strategy.part(name).attached.keys() for name in self.model.active)


class CallOptions(TypedDict, total=False):
    """Options of a call; default: as in the run."""

    subject: str | None
    """The words of the text that the image stands for; needed by strategies that replace them."""
    mask: Masks
    """Of the subject, one for each image; without one, and without transparency, the whole image is taken."""
    seed: int
    """0 by default."""
    frames: int | None
    size: int | tuple[int, int] | None
    """A side, or height and width, in pixels."""
    guidance: float | GuidanceConfig | None
    """A scale, or all options."""
    sampler: SamplerConfig | None
    steps: int | None
    """Of the sampler."""
    long: LongKind | LongConfig | None
    """How more frames than the training's are made (docs/long.md): a kind, or all options."""


@dataclass(frozen=True, eq=False)
class _Call:
    """What one video depends on, besides the pipeline."""

    images: Tensor | None  # r 3 s s in [-1, 1]
    text: str
    subject: str | None
    seed: int
    size: tuple[int, int, int]
    guidance: GuidanceConfig
    sampling: SamplerConfig
    long: LongConfig

    def sampler(self, pipeline: Pipeline) -> FrameSampler:
        """Prepare the sampling. ValueError: a value cannot work."""
        data = pipeline.config.data
        images = torch.zeros(1, 3, data.prompt_side, data.prompt_side) if self.images is None else self.images
        images = torch.stack(of_number(images.unbind(), data.image_prompts))
        return FrameSampler.build(
            pipeline,
            images[None].to(pipeline.device),
            [self.text],
            [self.subject],
            [self.seed],
            size=self.size,
            guidance=self.guidance,
            sampler=self.sampling,
            start=pipeline.config.start,
            long=self.long,
            use_image=self.images is not None,
        )

    def key(self, pipeline: Pipeline) -> str:
        """Return a digest of all that the video depends on."""
        options = [asdict(part) for part in (self.guidance, self.sampling, self.long)]
        about = [self.text, self.subject, self.seed, self.size, options, pipeline.config.as_dict()]
        models = [pipeline.model, *([pipeline.interpolator.model] if pipeline.interpolator else [])]
        return hash_of([about, *map(fingerprint, models)], self.images)


def load(
    source: str | Path = "toyworld",
    *,
    base: str = "",
    settings: Mapping[str, object] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pipeline:
    """Load a pipeline: see `Pipeline.load`."""
    return Pipeline.load(source, base=base, settings=settings, device=device, dtype=dtype)


def _run(folder: Path, settings: Mapping[str, object]) -> tuple[RunConfig, dict[Path, str]]:
    """Return a finished run's configuration, and its files of weights with the prefixes of their names."""
    if not (folder / "finished").is_file():
        raise ValueError(
            f"{folder} is not a finished run; run it to its end first (the same command resumes)"
        )
    files = {folder / "weights.safetensors": "", folder / "strategy.safetensors": "strategy."}
    config = RunConfig.create(folder / "run.yaml", **settings)
    return config, {file: prefix for file, prefix in files.items() if file.is_file()}


def _adapter(file: Path, base: str, settings: Mapping[str, object]) -> tuple[RunConfig, dict[Path, str]]:
    """Return the configuration in an adapter's metadata, and its file."""
    try:
        with safe_open(file, "pt") as saved:
            metadata: dict[str, str] = saved.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}; copy it again") from error
    if "settings" not in metadata:
        raise ValueError(
            f"{file} does not tell its run's settings; give the run's folder, or the strategy.safetensors of a run"
            " (dit-booth lora import makes one of a LoRA of diffusers)"
        )
    start = {"weights": base} if base else {}
    return RunConfig.create(json.loads(metadata["settings"]), **start, **settings), {file: "strategy."}
