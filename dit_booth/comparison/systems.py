"""The compared systems, and their costs in FLOPs as counted on one example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dit_booth.comparison.budget import throughput
from dit_booth.comparison.subjects import Subject
from dit_booth.components import Components, build
from dit_booth.config import RunConfig, StageConfig, StageName
from dit_booth.cost.flops import Flops
from dit_booth.data.example import stack
from dit_booth.diffusion.start import StartConfig
from dit_booth.errors import suggest
from dit_booth.files import CONFIGS, locate, packaged
from dit_booth.sampling.generate import generate
from dit_booth.sampling.prompts import Request
from dit_booth.training.address import stages_of
from dit_booth.training.distributed import Ranks
from dit_booth.training.engine import engine_settings
from dit_booth.training.stage import schedule_of, set_trainable, stage_config, trainable_globs
from dit_booth.training.stage_cost import count_flops, dtype_of, forward_backward

BASELINE = "videobooth"
"""The system that all are compared with, where it takes part."""
Kind = Literal["subject", "encoder", "fixed"]
"""Optimized for each subject; trained once for all subjects; not trained at all."""


@dataclass(frozen=True)
class System:
    """A system by the name of its configuration."""

    name: str
    config: RunConfig
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class SystemCost:
    """FLOPs of one step of each stage (by name), of one sampled video, and of all class images of a subject."""

    steps: Mapping[StageName, float]
    video: float
    prior: float = 0.0
    trained_parameters: int = 0


def find_systems(names: Sequence[str], settings: Mapping[str, object]) -> list[System]:
    """Return the systems of these names, or all packaged ones (`BASELINE` first), with `settings` over each.

    ValueError: a name is unknown or repeated, or a system is both trained once and per subject.
    """
    every = (file.stem for file in packaged("baselines").glob("*.yaml"))
    known = sorted(every, key=lambda name: (name != BASELINE, name))
    chosen, out = list(names) or known, list[System]()
    for name in chosen:
        if chosen.count(name) > 1:
            raise ValueError(f"--methods names {name!r} twice; name each once")
        if not locate(name, *CONFIGS).is_file():
            raise ValueError(f"--methods names {name!r}{suggest(name, known)}")
        config = RunConfig.create(name, **settings)
        out.append(System(Path(name).stem, config, _kind(name, config)))
    return out


def _kind(name: str, config: RunConfig) -> Kind:
    trained = [stage for stage in schedule_of(config) if stage_config(config, stage).steps]
    if "subject" in trained and len(trained) > 1:
        raise ValueError(
            f"--methods names {name!r}, whose stages {', '.join(trained)} are for all subjects and for one; compare"
            " it with the first ones trained (weights, strategy_weights)"
        )
    return "subject" if "subject" in trained else "encoder" if trained else "fixed"


def cost_of(system: System, subject: Subject, ranks: Ranks) -> SystemCost:
    """Count a system's FLOPs on one example, which shows the subject where the system is optimized for one."""
    config = system.config
    if system.kind == "subject":
        config = replace(config, subject=subject.settings(config.subject))
    components = build(config).to(ranks.device)
    dtype = dtype_of(engine_settings(config, ranks))
    steps: dict[StageName, float] = {}
    trained: dict[str, int] = {}
    for stage in stages_of(config):
        components.model.active = stage.active
        if not stage.steps:
            continue
        globs = trainable_globs(config, components.model, stage.name, stage.active)
        parameters = set_trainable(components.model, globs, stage.active)
        options, data = stage_config(config, stage.name), components.stage_data(stage.name)
        one = count_flops(components, options, data, dtype, ranks.device)
        steps[stage.name] = one * config.train.batch_size
        trained |= {name: p.numel() for name, p in parameters.items()}
    components.model.requires_grad_(False)
    video, count = sampling_flops(components, subject.request), config.subject.prior
    components.model.active = ()
    class_image = sampling_flops(components, subject.request, frames=1, use_image=False) if count else 0.0
    return SystemCost(
        steps=steps, video=video, prior=count * class_image, trained_parameters=sum(trained.values())
    )


def sampling_flops(
    components: Components, request: Request, frames: int = 0, *, use_image: bool = True
) -> float:
    """Count the FLOPs of one video as the run samples it: those of one step and of two, extended to all steps.

    A warped start takes a share of the steps for frame 0: then all steps are counted.
    """

    def count(steps: int) -> float:
        with Flops() as counter:
            sample_once(components, request, steps, frames, use_image=use_image)
        return float(counter.total)

    every = components.config.sampler.steps
    if components.config.start.kind == "warp":
        return count(every)
    one, two = count(1), count(2)
    return one + (every - 1) * (two - one)


def base_throughput(config: RunConfig, ranks: Ranks) -> float:
    """Measure FLOPs per second of training: forward and backward of the whole backbone on a batch of the recipe.

    config: without a strategy. Sampling, without gradients, is up to twice as fast.
    """
    components = build(config).to(ranks.device)
    stage, dataset = StageConfig(), components.stage_data("base")
    dtype = dtype_of(engine_settings(config, ranks))
    set_trainable(components.model, ("backbone.*",), ())
    flops = count_flops(components, stage, dataset, dtype, ranks.device) * config.train.batch_size
    batch = stack(dataset, [dataset[index] for index in range(config.train.batch_size)]).to(ranks.device)
    components.model.to(dtype)
    return throughput(forward_backward(components, stage, batch, dtype), flops)


def sample_once(
    components: Components, request: Request, steps: int, frames: int = 0, *, use_image: bool = True
) -> None:
    """Sample a video of a request in `steps` steps, or with `frames` a class image (of 1), which starts from noise."""
    config = components.config
    generate(
        components,
        request.images[None].to(components.device),
        [request.caption],
        [(request.subject or None) if use_image else None],
        [0],
        size=(frames or config.data.frames, *config.data.height_width),
        guidance=config.guidance,
        sampler=replace(config.sampler, steps=steps),
        start=StartConfig() if frames else config.start,
        use_image=use_image,
    )
