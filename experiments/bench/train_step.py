"""Training steps: speed, model FLOP/s utilisation and memory for {size} x {latents} x {frames} x {plan} x {strategy}.

    python -m experiments.bench.train_step                           # CPU, minutes; runs/bench/train_step.jsonl
    python -m experiments.bench.train_step --device cuda             # XL/2, 16 frames, bf16, under 9 minutes
    python -m experiments.bench.train_step --table docs/results/train_step_cpu.md

A step is forward, backward, clipping and AdamW of all parameters, with float32 masters of bfloat16 weights (as
DeepSpeed keeps them). Text and image encoder are left out: a step reads their outputs. The FLOPs are the model's, by
PyTorch's formulas on the meta device: what checkpointing computes twice counts once. Utilisation is FLOP/s over
those of the best of some large matrix products, measured in the same run around every case.
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from dit_booth.config import DataConfig, RunConfig
from dit_booth.config.parse import YAML_BOOLEANS, config_class
from dit_booth.cost.describe import Latents, build, inputs, reference
from dit_booth.cost.flops import Flops
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.injected import Injected
from dit_booth.training.graph import captured
from experiments.bench.measure import (
    conditions,
    interleaved,
    keep_freed_memory,
    matmul_peak,
    peak_memory,
    write_lines,
)

log = logging.getLogger(__name__)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True)
class TrainStepArguments:
    device: Literal["cpu", "cuda"] = "cpu"
    """Device: the CPU in float32, or CUDA in bfloat16."""
    sizes: tuple[str, ...] = ()
    """Sizes of the DiT; empty: nano and S on the CPU, XL on CUDA."""
    frames: tuple[int, ...] = ()
    """Frames of a video; empty: 8 on the CPU, 16 on CUDA."""
    strategies: tuple[str, ...] = ("none", "kv_concat")
    """Strategies; the first one is what the others are compared with."""
    plans: tuple[str, ...] = ("first+previous",)
    """Frame plans."""
    latents: tuple[Latents, ...] = ((4, 32, 32),)
    """Channels, height and width of a frame's latents, one or several times: 4 32 32 4 16 16."""
    batch: int = 0
    """Videos in a step; 0: one on the CPU, as many as fit on CUDA."""
    compile: bool | None = None
    """torch.compile the blocks; by default on CUDA only."""
    graph: bool = True
    """On CUDA, replay the whole step as one graph: its kernels are timed, not a slow host's launches."""
    dit: DiTConfig = DiTConfig()
    """The other options of the DiT."""
    rounds: int = 7
    """Timed steps of each case."""
    threads: int = 2
    """Threads on the CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """Seconds on the wall, or of the processor: those of one thread on a busy machine still tell (--threads 1)."""
    budget: float = 420.0
    """Seconds after which no further case is begun."""
    out: Path = Path("runs/bench/train_step.jsonl")
    """One JSON object for each case."""
    table: Path | None = None
    """Also write this Markdown page."""


@dataclass(frozen=True)
class StepCase:
    size: str
    frames: int
    plan: str
    strategy: str
    latents: Latents = (4, 32, 32)

    def config(self, options: TrainStepArguments) -> RunConfig:
        """The run whose network this is."""
        dit: Any = replace(options.dit, size=self.size, plan=self.plan)  # type: ignore[arg-type]
        cls = config_class(self.strategy)
        return cls(strategy=self.strategy, data=DataConfig(frames=self.frames), dit=dit)


def cases_of(options: TrainStepArguments) -> list[StepCase]:
    """Those that are compared with each other stand together."""
    gpu = options.device == "cuda"
    sizes = options.sizes or (("XL",) if gpu else ("nano", "S"))
    frames = options.frames or ((16,) if gpu else (8,))
    grid = itertools.product(sizes, options.latents, frames, options.plans, options.strategies)
    return [StepCase(size, f, plan, strategy, latents) for size, latents, f, plan, strategy in grid]


# ---- one step ----------------------------------------------------------------------------------------------


@dataclass
class StepTrainer:
    """Weights that are computed with, and float32 masters that AdamW updates where those are not float32 themselves."""

    model: Injected
    clip: float = 1.0
    parameters: list[torch.nn.Parameter] = field(init=False)
    masters: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        whole = all(p.dtype == torch.float32 for p in self.parameters)
        self.masters = [p if whole else p.detach().float() for p in self.parameters]
        on_gpu = self.masters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=1e-5, weight_decay=0.01, fused=True, capturable=on_gpu
        )

    def step(self, batch: tuple[Any, ...]) -> None:
        """Forward, backward, clipping, update: no value is read back, so the GPU never waits for the CPU."""
        prediction = self.model(*batch)
        (prediction.output.float().square().mean() + prediction.aux_loss).backward()
        used = [(p, m) for p, m in zip(self.parameters, self.masters, strict=True) if p.grad is not None]
        if any(p is not m for p, m in used):
            for p, m in used:
                assert p.grad is not None
                m.grad, p.grad = p.grad.float(), None
        clip_grad_norm_([m for _, m in used], self.clip)
        self.optimizer.step()
        if any(p is not m for p, m in used):
            torch._foreach_copy_([p.data for p, _ in used], [m for _, m in used])
        self.optimizer.zero_grad(set_to_none=True)


def model_flops(case: StepCase, options: TrainStepArguments) -> int:
    """FLOPs of forward and backward for one video; nothing is computed."""
    model = build(case.config(options), case.latents)
    batch = batch_of(model, case, 1, "meta", torch.float32)
    with Flops() as counter:
        prediction = model(*batch)
        (prediction.output.square().mean() + prediction.aux_loss).backward()
    return int(counter.total)


def batch_of(
    model: Injected, case: StepCase, videos: int, device: str, dtype: torch.dtype
) -> tuple[Any, ...]:
    """The network's arguments: latents, timesteps, prompts, and image prompts where a strategy reads them."""
    shape = (videos, case.frames, *case.latents)
    if case.strategy == "none":
        return inputs(shape, device, dtype)
    copies = model.strategy.reference_frames(model.strategy.names)
    return (*inputs(shape, device, dtype), reference(shape, device, dtype, copies))


# ---- measuring ---------------------------------------------------------------------------------------------


@dataclass
class StepBench:
    """A network to train on one batch over and over."""

    model: Injected
    trainer: StepTrainer
    batch: tuple[Any, ...]
    videos: int
    compiled: bool

    @classmethod
    def of(
        cls, case: StepCase, options: TrainStepArguments, device: torch.device, dtype: torch.dtype
    ) -> StepBench:
        torch.manual_seed(0)
        model = build(case.config(options), case.latents, options.device).to(dtype)
        for p in model.parameters():
            if not p.any():  # products of zeros draw less power, and run faster
                torch.nn.init.normal_(p, std=0.02)
        trainer = StepTrainer(model)
        compiled = options.compile if options.compile is not None else device.type == "cuda"
        if compiled:
            assert isinstance(model.backbone, VideoDiT)
            model.backbone.compile_blocks()
        videos = options.batch or (1 if device.type == "cpu" else fitting(trainer, case, options, dtype))
        batch = batch_of(model, case, videos, options.device, dtype)
        return cls(model, trainer, batch, videos, compiled)

    def step(self) -> None:
        self.trainer.step(self.batch)


def measure(
    case: StepCase, options: TrainStepArguments, beside: StepBench | None = None
) -> tuple[dict[str, Any], StepBench]:
    """One line of results; steps are interleaved with those of the bench beside it, where there is one."""
    device, dtype = torch.device(options.device), torch.float32 if options.device == "cpu" else torch.bfloat16
    clock = CLOCKS[options.clock]
    bench = StepBench.of(case, options, device, dtype)
    model, step, videos = bench.model, bench.step, bench.videos
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    peak = matmul_peak(dtype, device, rounds=5, clock=clock)
    memory = peak_memory(step, device) + (torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
    run = captured(step, device) if options.graph else step
    jobs = {"step": run} | ({"beside": beside.step} if beside else {})
    timed = interleaved(jobs, options.rounds, device, warm_up=1, clock=clock)
    times = timed["step"]
    peak = max(peak, matmul_peak(dtype, device, rounds=5, clock=clock))  # of a busy machine's better moment
    seconds, flops = times.median, model_flops(case, options) * videos
    per_frame = case.latents[1] * case.latents[2] // model.backbone.config.patch**2  # type: ignore[operator, union-attr]
    row = {
        "size": f"{case.size}/{model.backbone.config.patch}",  # type: ignore[union-attr]
        "latents": case.latents,
        "tokens": per_frame,
        "frames": case.frames,
        "plan": case.plan,
        "strategy": case.strategy,
        "layout": options.dit.layout,
        "videos": videos,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": bench.compiled,
        "graph": options.graph and device.type == "cuda",
        "checkpointing": options.dit.checkpointing,
        "parameters": sum(p.numel() for p in bench.trainer.parameters),
        "seconds": seconds,
        "first_step_seconds": first,
        "steps_per_second": 1 / seconds,
        "tokens_per_second": videos * case.frames * per_frame / seconds,
        "flops": flops,
        "matmul_peak": peak,
        "utilisation": flops / seconds / peak,
        "peak_memory_mib": memory / 2**20,
        **conditions(device),
        "clock": options.clock,
        "over_first": times.over(timed["beside"]) if beside else None,
    }
    return row, bench


def fitting(trainer: StepTrainer, case: StepCase, options: TrainStepArguments, dtype: torch.dtype) -> int:
    """Videos whose step should fit, with room for what a strategy adds: memory grows evenly with them."""
    device = torch.device(options.device)
    trainer.step(batch_of(trainer.model, case, 2, options.device, dtype))  # makes AdamW's averages
    batch = batch_of(trainer.model, case, 2, options.device, dtype)
    each = max(peak_memory(lambda: trainer.step(batch), device) / 2, 1)
    torch.cuda.empty_cache()
    return max(int(0.85 * torch.cuda.mem_get_info(device)[0] / each), 1)


def run(options: TrainStepArguments) -> list[dict[str, Any]]:
    """All cases, as far as the time goes; of equal ones but for the strategy, the first one's batch is taken.

    On the CPU, whose speed drifts, the first one is also timed again beside each of the others.
    """
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    videos: dict[tuple[Any, ...], int] = {}
    first: dict[tuple[Any, ...], StepBench] = {}
    for case in cases_of(options):
        if rows and time.perf_counter() - start > options.budget:
            log.warning("time is up: %s and what follows are left out", case)
            break
        key = (case.size, case.latents, case.frames, case.plan)
        row, bench = measure(
            case, replace(options, batch=options.batch or videos.get(key, 0)), first.get(key)
        )
        videos[key] = row["videos"]
        if options.device == "cpu" and key not in first:
            first = {key: bench}
        del bench
        rows.append(row)
        sys.stdout.write(f"{line(row, rows)}\n")
        torch._dynamo.reset()
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    return rows


# ---- output ------------------------------------------------------------------------------------------------

COLUMNS = (
    *(
        "size",
        "tokens/frame",
        "frames",
        "plan",
        "strategy",
        "videos",
        "s/step",
        "time/first",
        "tokens/s",
        "TFLOP/s",
    ),
    *("of matmul peak", "peak MiB"),
)
HEAD = f"| {' | '.join(COLUMNS)} |"


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A row of the table."""
    same = ("size", "latents", "frames", "plan")
    first = next(r for r in rows if all(r[k] == row[k] for k in same))
    each = row["seconds"] / row["videos"] / (first["seconds"] / first["videos"])
    over = each if row["over_first"] is None else row["over_first"]
    achieved = row["flops"] / row["seconds"] / 1e12
    return (
        f"| {row['size']} | {row['tokens']} | {row['frames']} | {row['plan']} | {row['strategy']} | {row['videos']} |"
        f" {row['seconds']:.3f} | {over:.3f} |"
        f" {row['tokens_per_second']:.0f} | {achieved:.3f} | {row['utilisation']:.1%} | {row['peak_memory_mib']:.0f} |"
    )


def page(rows: list[dict[str, Any]], command: str) -> str:
    """The Markdown page."""
    row = rows[0]
    how = "compiled" if row["compiled"] else "not compiled"
    replayed = ", steps replayed as CUDA graphs" if row["graph"] else ""
    about = (
        f"{row['device']}, torch {row['torch']}, {row['dtype']}, {row['threads']} threads, load {row['load']},"
        f" {row['clock']} seconds{replayed}; blocks {how}; layout {row['layout']};"
        f" matmul peak {max(r['matmul_peak'] for r in rows) / 1e12:.3f} TFLOP/s."
    )
    body = "\n".join(line(r, rows) for r in rows)
    rule = "|---" * len(COLUMNS) + "|"
    return f"# Training steps\n\n`{command}`\n\n{about}\n\n{HEAD}\n{rule}\n{body}\n"


def main(options: TrainStepArguments) -> None:
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    logging.getLogger("dit_booth").setLevel(logging.WARNING)
    sys.stdout.write(f"{HEAD}\n")
    rows = run(options)
    write_lines(options.out, rows)
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python -m experiments.bench.train_step", *sys.argv[1:]])
        options.table.write_text(page(rows, command))
        write_lines(options.table.with_suffix(".jsonl"), rows)
    sys.stdout.write(f"{options.out}\n")


if __name__ == "__main__":
    main(
        tyro.cli(
            TrainStepArguments,
            description=__doc__,
            registry=YAML_BOOLEANS,
            config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
        )
    )
