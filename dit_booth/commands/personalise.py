"""Learn one subject from one image of yours, and sample it in a few scenes.

    dit-booth personalise --method dreambooth --image cat.png --class cat
    dit-booth personalise --method textual_inversion --image cat.png --class cat --prompts "{} is spinning on sand"
    dit-booth personalise --method tune_a_video --image cat.png --class cat --video cat.mp4

The result is a run's folder, which `dit_booth.load` takes, as it takes the adapter in it of methods that train one
(textual_inversion, dreambooth_lora). The same command resumes an interrupted run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit_booth.commands.program import RESUMES, run_program
from dit_booth.config import RunConfig
from dit_booth.config.parse import merge
from dit_booth.errors import check_number, suggest
from dit_booth.files import CONFIGS, locate, packaged
from dit_booth.training.stage import schedule_of


@dataclass(frozen=True, kw_only=True)
class PersonaliseArguments:
    image: str
    """One image of the subject: a file, or a folder with image.jpg and a mask."""
    word: Annotated[str, tyro.conf.arg(name="class")]
    """The subject's class in words, such as cat."""
    method: str = "dreambooth"
    """Per-subject system: textual_inversion, dreambooth, dreambooth_lora, dreambooth_no_prior, tune_a_video, or a YAML
    file of a run with stage subject."""
    mask: str = ""
    """Mask of the image's subject; without one, and without transparency, the whole image is taken."""
    video: str = ""
    """A video of the subject, for tune_a_video."""
    prompts: tuple[str, ...] = ()
    """Scenes to sample, with {} where the subject stands; empty: those of the method's configuration."""
    backbone: Literal["dit", "unet"] = "dit"
    """The network: the video DiT or VideoBooth's U-Net."""
    steps: int = 0
    """Optimizer steps; 0: as in the method's configuration."""
    seed: int = 0
    """Seed of initialisation, noise and order."""
    out: str = ""
    """The run's folder; empty: runs/<method>-<backbone>-<hash of the settings>."""
    set: tuple[str, ...] = ()
    """Further settings of the run, such as stages.subject.lr=1e-3 sampler.steps=10."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: learned and sampled; 1: an error, said in one line; 130: interrupted, resumable."""
    return run_program(
        PersonaliseArguments,
        personalise,
        argv,
        prog=prog,
        description=__doc__,
        level=logging.INFO,
        stopped=RESUMES,
    )


def personalise(arguments: PersonaliseArguments) -> list[str]:
    """Train, sample, and return lines that tell how to load the result. ValueError: see `settings_of`."""
    from dit_booth.run import run

    config = settings_of(arguments)
    run(config)
    folder = Path(config.folder())
    scene = f'"a {config.subject.word} is spinning on sand", subject="{config.subject.word}"'
    lines = [f"load it         dit_booth.load({str(folder)!r})(None, {scene})"]
    if trains_adapter(config):
        lines.append(f"adapter         {folder / 'strategy.safetensors'} (dit_booth.load takes it as well)")
    return lines


def settings_of(arguments: PersonaliseArguments) -> RunConfig:
    """Return the run of the arguments, its subject's files checked.

    ValueError: no such method, one that is not optimized per subject, or an image, video or class that cannot work.
    """
    from dit_booth.commands.sample import nested

    check_number("--steps", arguments.steps, "[0, 1000000000]")
    given = {name: getattr(arguments, name) for name in ("image", "mask", "video", "word")}
    if missing := [name for name in ("image", "word") if not given[name]]:
        raise ValueError(f"--{'class' if missing[0] == 'word' else 'image'} is empty; name the subject's")
    prompts = {"prompts": list(arguments.prompts)} if arguments.prompts else {}
    settings: dict[str, object] = {
        "backbone": arguments.backbone,
        "out": arguments.out,
        "subject": {**given, **prompts},
        "train": {"seed": arguments.seed},
    }
    if arguments.steps:
        settings["stages"] = {"subject": {"steps": arguments.steps}}
    if arguments.prompts:
        settings["sample"] = {"videos": len(arguments.prompts)}
    check_method(arguments.method)
    config = RunConfig.create(arguments.method, **merge(settings, nested(arguments.set)))
    data = config.data
    config.subject.build(
        frames=data.frames, size=data.height_width, side=data.prompt_side, seed=data.seed, prior=None
    )
    method = Path(arguments.method).stem
    return replace(config, out=config.out or f"runs/{method}-{config.backbone}-{config.fingerprint()}")


def check_method(name: str) -> None:
    """Raise ValueError for a name that is no system, or a system that is not optimized per subject."""
    if not locate(name, *CONFIGS).is_file():
        raise ValueError(f"--method is {name!r}{suggest(name, per_subject_methods())}")
    if "subject" not in schedule_of(RunConfig.create(name)):
        raise ValueError(
            f"--method {name} is not optimized per subject: train it once (dit-booth run --config {name}), then sample"
            f" any image (dit-booth sample RUN --image ...); per subject are {', '.join(per_subject_methods())}"
        )


def per_subject_methods() -> list[str]:
    """Return the packaged systems with a stage `subject`."""
    names = sorted(file.stem for file in packaged("baselines").glob("*.yaml"))
    return [name for name in names if "subject" in schedule_of(RunConfig.create(name))]


def trains_adapter(config: RunConfig) -> bool:
    """Return True if all that the stage trains is in the adapter's file: no parameter of the backbone or the text."""
    from dit_booth.strategy import find
    from dit_booth.training.address import stages_of
    from dit_booth.training.stage import declared_globs

    classes = find(config.strategy)
    return all(
        glob.startswith("strategy.")
        for stage in stages_of(config)
        for glob in declared_globs(config, stage.name, {name: classes[name] for name in stage.active})
    )
