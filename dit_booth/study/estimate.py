"""Estimate the cost of stages that were not measured yet: their FLOPs, and the rate at which they may be trained.

FLOPs are counted on the meta device with the encoders' sizes (`dit_booth.cost.describe`); nothing is loaded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from dit_booth.config import RunConfig
from dit_booth.config.parse import parse, to_argv
from dit_booth.cost import describe
from dit_booth.cost.flops import Flops
from dit_booth.study.plan import SweepPlan
from dit_booth.study.rows import read_json
from dit_booth.training.address import Stage, stages_of
from dit_booth.training.stage import set_trainable, stage_config, trainable_globs

REACHED = 0.4
"""Share of a device's matrix products per second that training steps are assumed to reach. Measured were 55 to 80% on
two CPU cores and, on an H100, 36 to 45% for a DiT-XL/2 and 8 to 24% for a DiT-B/2 (docs/results/train_step_*.md)."""
FACTOR, CHANNELS = (
    8,
    {"wan": 16},
)  # elsewhere 4, as Stable Diffusion's: those of a file are known once it is loaded


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one point's training, and the basis of this figure."""

    flops: float
    basis: str


def rate_of(plan: SweepPlan) -> Rate:
    """Return the median rate of the plan's finished stages, or an assumed one for this machine's device."""
    folders = {plan.stage_folder(stage) for point in plan.points for stage in point.stages}
    costs = [read_json(folder / "cost.json") for folder in sorted(folders)]
    known = [cost["flops_per_step"] / cost["step_seconds"] for cost in costs if cost.get("step_seconds")]
    if known:
        return Rate(statistics.median(known), f"the median rate of the finished stages ({len(known)})")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    one = matmul_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Rate(
        REACHED * one * (plan.ranks if device.type == "cuda" else 1),  # ranks on a CPU share it
        f"assumed: {REACHED:.0%} of the {one / 1e12:.3g} TFLOP/s of matrix products on this machine's {name}",
    )


def matmul_rate(device: torch.device) -> float:
    """Measure the best FLOP/s of a few large matrix products, in the dtype in which the device trains."""
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the result
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def flops_of_steps(plan: SweepPlan, keys: Sequence[str]) -> dict[str, float]:
    """Count FLOPs per optimizer step of stages, by key; only once for points that differ in the seed."""
    counted: dict[tuple[str, str], float] = {}
    out: dict[str, float] = {}
    for point in plan.points:
        for index, stage in enumerate(point.stages):
            if stage.key not in keys or stage.key in out:
                continue
            alike = (point.group, stage.name)
            if alike not in counted:
                config = config_of(point.settings)
                counted[alike] = flops_of_step(config, stages_of(config)[index])
            out[stage.key] = counted[alike]
    return out


def flops_of_step(config: RunConfig, of: Stage) -> float:
    """Count FLOPs of forward and backward in a stage's optimizer step, without encoders and autoencoder."""
    stage, encoders = stage_config(config, of.name), describe.Encoders.of(config.clip).reading(config.text)
    latents = latents_of(config)
    model = describe.build(config, latents, encoders=encoders)
    model.active = of.active
    globs = trainable_globs(config, model, of.name, of.active)
    here = [glob for glob in globs if not glob.startswith("text.")]
    set_trainable(model, here, of.active)
    cast(describe.GivenText, model.text).trains = len(here) < len(globs)
    frames = config.autoencoder.latent_frames(stage.frames_of(config.data.frames))
    rows, frames = (frames, 1) if stage.single_frames else (1, frames)
    shape = (rows, frames, *latents)
    image = None
    if of.active:
        copies = model.strategy.reference_frames(of.active)
        images = config.data.image_prompts
        prompts = (rows, 1, *latents_of(config, (config.data.prompt_side,) * 2))
        image = describe.reference(prompts, copies=copies, encoders=encoders, images=images)
    with Flops() as counter:
        prediction = model(*describe.inputs(shape, encoders=encoders), image)
        (prediction.output.square().mean() + prediction.aux_loss).backward()
    return float(counter.total * config.train.batch_size)


def latents_of(config: RunConfig, size: tuple[int, int] | None = None) -> describe.Latents:
    """Return channels, height and width of a picture's latents; `size`: its own in pixels, none: that of the videos."""
    channels, factor = CHANNELS.get(config.autoencoder.kind, 4), FACTOR
    if config.autoencoder.kind == "pixel":
        factor = config.autoencoder.patch
        channels = 3 * factor**2
    height, width = size or config.data.height_width
    return channels, height // factor, width // factor


def config_of(settings: Mapping[str, object]) -> RunConfig:
    """Return the configuration of a point's run."""
    return parse(to_argv(_given(settings)))


def _given(settings: Mapping[str, object]) -> dict[str, object]:
    """Return settings without empty values, which a command line cannot express."""
    return {
        name: _given(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if value not in ([], (), None)
    }
