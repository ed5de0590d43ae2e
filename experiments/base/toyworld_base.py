"""The stages `images` and `base` of a toy-world run, without run.py's overhead: how the embedded bases are trained.

    python experiments/base/toyworld_base.py --config experiments/configs/toyworld_base.yaml --out runs/base-dit
    python experiments/base/embed_base.py runs/base-dit

For a network of two million parameters a step of `run.py` is mostly Python, DeepSpeed and random draws on the CPU.
Here a pool of rendered videos lies on the device, the step draws from it, and what leads to the gradients (draw, noise,
forward, backward, clipping) is captured once in a CUDA graph and replayed. Objective, network, stages, schedules and
averages are those of the same configuration in `run.py`; the random draws differ, and Muon can have the matrices.
On the CPU there is no graph, and `train.compile=True` makes a step about a third shorter.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
import tyro
import yaml
from einops import rearrange
from torch import Tensor, nn

from dit_booth.components import Components, build
from dit_booth.config import RunConfig, StageName, TrainConfig
from dit_booth.config.parse import parse
from dit_booth.data.toyworld import Toyworld
from dit_booth.models.clip.encoders import NULL_PROMPT, Prompt
from dit_booth.models.weights import write
from dit_booth.training.ema import Ema
from dit_booth.training.engine import compile_backbone, learning_rate
from dit_booth.training.graph import captured
from dit_booth.training.loop import check_finite
from dit_booth.training.muon import Muon
from dit_booth.training.stage import set_trainable, stage_config, trainable_globs

TIMES = 1 << 20
"""Training times drawn in advance: the objectives draw on the CPU."""
LOG_EVERY = 100
IN_A_BLOCK = re.compile(r"blocks?\.")


@dataclass(frozen=True, kw_only=True)
class BaseArguments:
    config: str = "experiments/configs/toyworld_base.yaml"
    """The run's configuration; only its stages images and base are for this program."""
    out: str = "runs/base-dit"
    """Run folder: run.yaml, metrics.jsonl, weights.safetensors, as run.py leaves them."""
    pool: int = 200_000
    """Videos that are rendered in advance; steps draw from them."""
    processes: int = 16
    """Processes that render."""
    seconds: float = 0.0
    """Most seconds of a stage: its steps are cut to as many as fit, and run.yaml has their number; 0: no limit."""
    muon: float = 0.0
    """Muon (Jordan et al., 2024) on the blocks' matrices and convolutions, as a multiple of the stage's learning rate;
    AdamW has the rest. 0: AdamW has all."""
    bf16: bool = False
    """Matrix products in bfloat16 (autocast; Muon's too); slow on a CPU without instructions for it."""
    favour: dict[str, float] = field(default_factory=dict)
    """Weight with which a video is drawn whose caption has the word; `spinning 3 star 2`: six times with both."""
    set: tuple[str, ...] = ()
    """Other settings of the run, such as stages.base.steps=100 train.batch-size=4."""


# ---- data ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoPool:
    """Rendered videos and their tokenised captions on the device."""

    videos: Tensor  # n f 3 h w, uint8
    ids: Tensor  # n l
    cumulative: Tensor  # n, rising to 1: the probabilities of being drawn, summed

    @classmethod
    def render(
        cls,
        config: RunConfig,
        components: Components,
        count: int,
        processes: int,
        favour: Mapping[str, float] = MappingProxyType({}),
    ) -> VideoPool:
        """Render the first `count` videos of the training split; equal for any number of processes.

        ValueError: not the toy world, or `favour` has a word of no caption or a weight that is not positive.
        """
        world = config.data.build()
        if not isinstance(world, Toyworld):
            raise ValueError(
                f"data.kind is {config.data.kind!r}, and toyworld_base.py renders the toy world only; use run.py"
            )
        # Written by the readers where it stays: what passes through pipes is copied several times.
        shape = (count, config.data.frames, 3, *config.data.height_width)
        videos = torch.empty(shape, dtype=torch.uint8).share_memory_()
        bounds = np.linspace(0, count, 8 * processes + 1).astype(int)
        jobs = [(world, videos[a:b], int(a)) for a, b in pairwise(bounds)]
        with multiprocessing.get_context("fork").Pool(processes, torch.set_num_threads, (1,)) as workers:
            captions = [caption for rendered in workers.starmap(_render, jobs) for caption in rendered]
        device = next(components.model.parameters()).device
        cumulative = torch.tensor(odds(captions, favour), dtype=torch.float64).cumsum(0)
        ids = components.model.text.tokenize(captions).ids
        return cls(videos.to(device), ids, (cumulative / cumulative[-1]).to(device))

    def draw(self, rows: int) -> Tensor:
        """Draw indices (rows,) of videos, with replacement."""
        chance = torch.rand(rows, device=self.cumulative.device, dtype=self.cumulative.dtype)
        return torch.searchsorted(self.cumulative, chance, right=True)


def _render(world: Toyworld, videos: Tensor, start: int) -> list[str]:
    """Fill the videos with the examples from `start` on; their captions."""
    captions = []
    for i, video in enumerate(videos, start):
        example = world[i]
        video.copy_((example.video * 127.5 + 127.5).round())
        captions.append(example.caption)
    return captions


def odds(captions: list[str], favour: Mapping[str, float]) -> list[float]:
    """Return each video's weight in the draw, relative to one whose caption has none of the words."""
    words = [set(caption.split()) for caption in captions]
    for word, times in favour.items():
        if times <= 0 or not any(word in among for among in words):
            raise ValueError(
                f"favour has {word!r} {times:g}; name a word of the captions and a number over 0"
            )
    return [
        math.prod((times for word, times in favour.items() if word in among), start=1.0) for among in words
    ]


# ---- one step -----------------------------------------------------------------------------------------------


class BaseTrainer:
    """One stage's step. `backward` reads nothing that changes between steps, so that it can be replayed as a graph."""

    def __init__(
        self, components: Components, pool: VideoPool, name: StageName, settings: BaseArguments
    ) -> None:
        self.components, self.pool, self.config = components, pool, components.config
        self.stage = stage_config(components.config, name)
        if self.stage.frames:
            raise ValueError(f"stages.{name}.frames is {self.stage.frames}; here it must be 0, or use run.py")
        self.trained = set_trainable(
            components.model, trainable_globs(components.config, components.model, name, ())
        )
        self.parameters: list[nn.Parameter] = list(self.trained.values())
        device = self.parameters[0].device
        generator = torch.Generator().manual_seed(self.config.train.seed)
        self.times = components.objective.sample_t(TIMES, generator, device)
        self.null = components.model.text.tokenize([NULL_PROMPT]).ids
        self.loss, self.bf16 = torch.zeros((), device=device), settings.bf16
        self.optimizers = make_optimizers(self.trained, self.config.train, settings.muon, self.bf16)
        self.ema = Ema(self.trained, self.config.train.ema, self.config.train.ema_width)

    def backward(self) -> None:
        """Draw, noise, predict: clipped gradients; adds the loss to `loss`."""
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=False)
        x0, ids = self.draw()
        rows, device = len(x0), x0.device
        t = self.times[torch.randint(TIMES, (rows,), device=device)]
        ids = torch.where(torch.rand(rows, 1, device=device) < self.stage.drop, self.null, ids)
        eps = torch.randn_like(x0)
        x_t = self.components.objective.noise(x0, t, eps)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            prediction = self.components.model(
                x_t, self.components.objective.timestep(t), Prompt.without_subject(ids)
            )
        loss = self.components.objective.loss(prediction.output, x0, eps, t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip)
        with torch.no_grad():
            self.loss += loss

    def update(self, step: int) -> None:
        """Update weights and averages after the gradients of step `step` (from 1)."""
        for optimizer, factor in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * self.lr(step)
            optimizer.step()
        with torch.no_grad():
            decay, shadow = self.ema.decay_at(step), list(self.ema.shadow.values())
            torch._foreach_lerp_(shadow, [p.data for p in self.parameters], 1 - decay)

    def lr(self, step: int) -> float:
        """Return AdamW's learning rate at step `step` (from 1)."""
        return self.stage.lr * learning_rate(step - 1, self.stage)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Draw latents (b f c h w) and captions (b l); with single frames, as many frames, of videos of their own."""
        frames = self.pool.videos.shape[1]
        rows = self.config.train.batch_size * (frames if self.stage.single_frames else 1)
        device = self.pool.videos.device
        index = self.pool.draw(rows)
        if self.stage.single_frames:
            at = torch.randint(frames, (rows,), device=device)
            video = rearrange(self.pool.videos[index, at], "b c h w -> b 1 c h w")
        else:
            video = self.pool.videos[index]
        return self.components.autoencoder.encode(video.float() / 127.5 - 1), self.pool.ids[index]

    def run(self, name: str, seconds: float) -> Iterator[dict[str, float | str]]:
        """Train the stage; a line of log every `LOG_EVERY` steps. Its averages become its weights."""
        backward = captured(self.backward, self.loss.device)
        self.loss.zero_()
        most = self.stage.steps
        step, last, begin = 0, 0, time.perf_counter()
        deadline = begin + seconds
        while step < self.stage.steps:
            step += 1
            backward()
            self.update(step)
            if step % LOG_EVERY and step < self.stage.steps:
                continue
            loss, now = self.loss.item() / (step - last), time.perf_counter()
            check_finite(loss, name, step, Path(name))
            self.loss.zero_()
            each = (now - begin) / (step - last)
            yield {"stage": name, "step": step, "loss": loss, "lr": self.lr(step), "seconds": each}
            if seconds:  # as many steps as fit at this pace; the learning rate's decay follows
                left = max(int((deadline - now) / each), 0)
                self.stage = replace(self.stage, steps=min(most, step + left))
            begin, last = now, step
        self.ema.copy_to_parameters()

    def averages(self) -> dict[str, Tensor]:
        """Return the network's state so far, trained weights averaged; without the strategy's."""
        state = {k: v for k, v in self.components.model.state_dict().items() if not k.startswith("strategy.")}
        return state | self.ema.shadow


def make_optimizers(
    trained: dict[str, nn.Parameter], train: TrainConfig, muon: float, bf16: bool
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Build AdamW, and Muon for the blocks' matrices unless `muon` is 0; each with a factor of the learning rate.

    A depth-wise kernel, with a single channel of input, is no matrix.

    ValueError: Muon without a matrix to train.
    """
    matrices = {n: p for n, p in trained.items() if muon and IN_A_BLOCK.search(n) and p.ndim > 1 < p.shape[1]}
    rest = [p for n, p in trained.items() if n not in matrices]
    adamw = torch.optim.AdamW(rest, betas=train.betas, weight_decay=train.weight_decay, fused=True)
    if not muon:
        return [(adamw, 1.0)]
    if not matrices:
        raise ValueError(f"muon is {muon:g}, but no matrix of a block is trained; use 0")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return [(adamw, 1.0), (Muon(matrices.values(), train.weight_decay, dtype=dtype), muon)]


def main(settings: BaseArguments) -> None:
    """ValueError: settings that cannot work, or a loss that is not finite."""
    config = parse(["--config", settings.config, *(f"--{setting}" for setting in settings.set)])
    torch.manual_seed(config.train.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    components = build(config)
    begin = time.perf_counter()
    components = components.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if config.train.compile:
        compile_backbone(components.model.backbone, {})
    pool = VideoPool.render(config, components, settings.pool, settings.processes, settings.favour)
    print(f"{len(pool.videos)} videos rendered in {time.perf_counter() - begin:.1f} s", flush=True)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.jsonl").open("w") as log:
        for name in config.schedule:
            trainer = BaseTrainer(components, pool, name, settings)
            for row in trainer.run(name, settings.seconds):
                log.write(json.dumps(row) + "\n")
                log.flush()
                if row["step"] % config.train.checkpoint_every == 0:
                    write(out / "weights.safetensors", trainer.averages())
            print(json.dumps(row), flush=True)
            config = replace(config, stages=replace(config.stages, **{name: trainer.stage}))
    write(out / "weights.safetensors", trainer.averages())
    (out / "run.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
    (out / "finished").write_text("")
    print(f"{out}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(BaseArguments, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
