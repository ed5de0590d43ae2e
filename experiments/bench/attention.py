"""Cross-frame attention with an image segment: `attend` against the usual implementations.

    python -m experiments.bench.attention                                  # CPU, minutes; runs/bench/attention.*
    python -m experiments.bench.attention --device cuda                    # the full grid, under 8 minutes
    python -m experiments.bench.attention --table docs/results/attention_cpu.md

Competitors: ``segments`` (`attend`); ``cat+repeat`` (keys gathered per frame, concatenated, then attention: VideoBooth,
Tune-A-Video and their followers); ``cat+expand`` (the same with as few copies as concatenation allows); ``dense mask``
(all frames and the image in one attention under a mask); ``flex`` (FlexAttention with a block mask, CUDA).
"""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dit_booth.attention import FramePlan, Frames, Segment, attend
from dit_booth.attention.kernels.choice import choose_kernel
from dit_booth.training.graph import captured
from experiments.bench import attention_report as report
from experiments.bench.measure import conditions, interleaved, matmul_peak, peak_memory, write_lines

log = logging.getLogger(__name__)

PLANS = (
    "first+previous",
    "first",
    "self",
    "self+first",
    "window(3)",
    "keyframes(8)",
    "sink(1)+window(3)",
    "all",
)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PASSES = ("forward", "forward+backward")
FRAME_SIZES = {"cpu": (torch.float32, 256, 2), "cuda": (torch.bfloat16, 1024, 8)}
"""Dtype, tokens of a frame and heads where 16 and 128 frames are compared."""


@dataclass(frozen=True)
class AttentionArguments:
    device: Literal["cpu", "cuda"] = "cpu"
    """Device. The CPU runs a small grid in float32, CUDA the full one in bfloat16."""
    out: Path = Path("runs/bench")
    """Folder of attention.jsonl and attention.png; unused with --table."""
    table: Path | None = None
    """Write this Markdown page, and the rows and the plot beside it under the same name."""
    plans: tuple[str, ...] = PLANS
    """Frame plans."""
    frames: tuple[int, ...] = ()
    """Frames of a video; empty: 8 and 16, on CUDA 64 too."""
    tokens: tuple[int, ...] = ()
    """Tokens of a frame; empty: 256, on CUDA 1024 and 4096 too."""
    images: tuple[str, ...] = ("0", "64", "N")
    """Tokens of the image; N: a frame's."""
    head_sizes: tuple[int, ...] = (64, 128)
    """Head sizes."""
    threads: int = 2
    """Threads on the CPU."""
    clock: Literal["wall", "cpu"] = "wall"
    """Wall seconds or processor seconds; on a busy machine use processor seconds of one thread (--threads 1)."""
    rounds: int = 7
    """Runs of every competitor, interleaved."""
    budget: float = 450.0
    """Seconds after which no further case of the grid is begun."""


# ---- cases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCase:
    plan: str
    frames: int
    tokens: int
    image: int
    """Tokens of the image segment, which every frame reads; 0: none."""
    head: int = 64
    heads: int = 8

    @property
    def frame_plan(self) -> Frames:
        return FramePlan(self.plan).frames(self.frames)

    def flops(self, training: bool) -> float:
        """Count the FLOPs of the visible scores; backward counts 2.5 times forward, as FlashAttention's papers do."""
        keys = sum(len(groups) for groups in self.frame_plan) * self.tokens + self.frames * self.image
        return 4.0 * self.tokens * keys * self.head * self.heads * (3.5 if training else 1.0)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """q, k, v of the frames (1 f n k d) and k, v of the image (1 1 m k d)."""
        generator = torch.Generator(device).manual_seed(0)
        sizes = [(self.frames, self.tokens)] * 3 + [(1, self.image)] * 2
        return [
            torch.randn(
                1, f, n, self.heads, self.head, generator=generator, dtype=dtype, device=device
            ).requires_grad_()
            for f, n in sizes
        ]

    def concatenated(self, q: Tensor) -> list[Tensor]:
        """q, and random keys and values of as many tokens as a frame reads at most, in one piece each."""
        keys = max(len(groups) for groups in self.frame_plan) * self.tokens + self.image
        k, v = (
            torch.randn(1, self.frames, keys, self.heads, self.head, dtype=q.dtype, device=q.device)
            for _ in range(2)
        )
        return [q, k.requires_grad_(), v.requires_grad_()]


BARS = AttentionCase("first+previous", 16, 1024, 1024)
"""The case whose figures stand at the top of the page."""


def grid(options: AttentionArguments) -> list[AttentionCase]:
    """Return the cases of the comparison, `BARS` first, then by cost."""
    on_cpu = options.device == "cpu"
    heads = 2 if on_cpu else 8
    frames = options.frames or ((8, 16) if on_cpu else (8, 16, 64))
    tokens = options.tokens or ((256,) if on_cpu else (256, 1024, 4096))
    cases = [
        AttentionCase(plan, f, n, n if image == "N" else int(image), head, heads)
        for plan, f, n, image, head in itertools.product(
            options.plans, frames, tokens, options.images, options.head_sizes
        )
    ]
    return [BARS, *sorted((c for c in cases if c != BARS), key=lambda case: case.flops(training=True))]


# ---- competitors -------------------------------------------------------------------------------------------


def segments(
    case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, *image: Tensor, kernel: str = "auto"
) -> Tensor:
    parts = [Segment(k, v, case.frame_plan)]
    if case.image:
        parts.append(Segment(image[0], image[1], ((0,),) * case.frames))
    return attend(q, parts, kernel)


def flex(case: AttentionCase, *tensors: Tensor) -> Tensor:
    return segments(case, *tensors, kernel="flex")


def slots(case: AttentionCase) -> list[tuple[int, ...]]:
    """Return the group that every frame reads first, second, ...; frames with fewer repeat one, as the originals do."""
    plan = case.frame_plan
    most = max(map(len, plan))
    return list(zip(*((groups + groups[:1] * most)[:most] for groups in plan), strict=True))


def cat_repeat(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, *image: Tensor) -> Tensor:
    def keys(x: Tensor, shared: Tensor) -> Tensor:
        parts = [shared.expand(-1, case.frames, -1, -1, -1)] if case.image else []
        return torch.cat([*parts, *(x[:, list(slot)] for slot in slots(case))], dim=2)

    return _per_frame(q, keys(k, image[0]), keys(v, image[1]))


def cat_expand(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, *image: Tensor) -> Tensor:
    def gather(x: Tensor, slot: tuple[int, ...]) -> Tensor:
        if len(set(slot)) == 1:
            return x[:, slot[:1]].expand_as(x)
        return (
            x if slot == tuple(range(len(slot))) else x.index_select(1, torch.tensor(slot, device=x.device))
        )

    def keys(x: Tensor, shared: Tensor) -> Tensor:
        parts = [shared.expand(-1, case.frames, -1, -1, -1)] if case.image else []
        return torch.cat([*parts, *(gather(x, slot) for slot in slots(case))], dim=2)

    return _per_frame(q, keys(k, image[0]), keys(v, image[1]))


def cat_repeat_by(backend: SDPBackend, case: AttentionCase, *tensors: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return cat_repeat(case, *tensors)


def _per_frame(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, k, v = (rearrange(t, "b f n k d -> (b f) k n d") for t in (q, k, v))
    out = scaled_dot_product_attention(query, k, v)
    return rearrange(out, "(b f) k n d -> b f n k d", f=q.shape[1])


def dense_mask(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, *image: Tensor) -> Tensor:
    def keys(x: Tensor, shared: Tensor) -> Tensor:
        return torch.cat([rearrange(t, "b g m k d -> b k (g m) d") for t in (x, shared)], dim=2)

    mask = torch.zeros(case.frames, case.frames, dtype=torch.bool)
    for i, groups in enumerate(case.frame_plan):
        mask[i, list(groups)] = True
    mask = mask.to(q.device).repeat_interleave(case.tokens, 1).repeat_interleave(case.tokens, 0)
    mask = torch.cat([mask, mask.new_ones(len(mask), case.image)], dim=1)
    query = rearrange(q, "b f n k d -> b k (f n) d")
    out = scaled_dot_product_attention(query, keys(k, image[0]), keys(v, image[1]), mask)
    return rearrange(out, "b k (f n) d -> b f n k d", f=case.frames)


Competitor = Callable[..., Tensor]


def competitors(case: AttentionCase, device: str) -> dict[str, Competitor]:
    """Return the competitors that fit in memory: concatenation copies keys, a mask is as large as scores."""
    found: dict[str, Competitor] = {"segments": segments}
    limit = (1 if device == "cpu" else 24) * 2**30
    width = 2 * case.heads * case.head * (4 if device == "cpu" else 2)
    most = max(map(len, case.frame_plan)) * case.tokens + case.image
    if 3 * case.frames * most * width < limit:
        found |= {"cat+repeat": cat_repeat, "cat+expand": cat_expand}
    scores = case.frames * case.tokens * (case.frames * case.tokens + case.image)
    if 8 * scores < limit and case.flops(False) * case.frames < (1e11 if device == "cpu" else 1e14):
        found["dense mask"] = dense_mask
    if device == "cuda" and case == BARS:
        found["flex"] = flex  # elsewhere too it would compile again for every shape, half a minute each
        found |= {f"segments by {name}": partial(segments, kernel=name) for name in other_kernels(case)}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            found[f"cat+repeat by {backend.name.split('_')[0].lower()}"] = partial(cat_repeat_by, backend)
    return found


def other_kernels(case: AttentionCase) -> list[str]:
    """The kernels with a log-sum-exp that this GPU has, by name."""
    fit = []
    for name in ("flash4", "flash", "cudnn", "torch_flash", "torch_efficient"):
        try:
            choose_kernel(
                name, torch.device("cuda"), torch.bfloat16, case.head, True, case.frames * case.tokens
            )
        except ValueError as reason:
            log.info("%s", reason)
        else:
            fit.append(name)
    return fit


def plain(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run the kernel alone, on keys that are already contiguous for each frame."""
    return attend(q, (Segment(k, v, FramePlan("self").frames(case.frames)),))


# ---- measuring ---------------------------------------------------------------------------------------------


def compare(case: AttentionCase, options: AttentionArguments, peak: float) -> Iterator[dict[str, Any]]:
    """A row per competitor and pass."""
    device = torch.device(options.device)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    tensors = case.tensors(dtype, device)
    gradient = torch.randn(tensors[0].shape, dtype=dtype, device=device)
    for name in PASSES:
        training = name != "forward"
        jobs = {
            who: job(run, case, tensors, gradient, training)
            for who, run in competitors(case, options.device).items()
        }
        flops = dict.fromkeys(jobs, case.flops(training))
        if case == BARS:
            whole = replace(case, image=0)
            laid_out = case.concatenated(tensors[0])
            jobs["plain"] = job(plain, whole, laid_out, gradient, training)
            flops["plain"] = (
                laid_out[1].shape[2]
                * case.tokens
                * case.frames
                * case.heads
                * case.head
                * (14.0 if training else 4.0)
            )
        for run in jobs.values():
            run()  # flex compiles
        memory = {who: peak_memory(run, device) for who, run in jobs.items()}
        jobs = {who: captured(run, device) for who, run in jobs.items()}  # kernels alone, not their launches
        times = interleaved(jobs, options.rounds, device, warm_up=0, clock=CLOCKS[options.clock])
        for who in jobs:
            rate = flops[who] / times[who].best
            yield {
                **asdict(case),
                "pass": name,
                "what": who,
                "best_ms": round(1e3 * times[who].best, 3),
                "median_ms": round(1e3 * times[who].median, 3),
                "segments_over_it": round(times["segments"].over(times[who]), 4),
                "peak_mib": round(memory[who] / 2**20, 2),
                "gflops": round(rate / 1e9, 1),
                "share_of_matmul": round(rate / peak, 3),
                "dtype": str(dtype).removeprefix("torch."),
            }


def job(
    run: Competitor, case: AttentionCase, tensors: list[Tensor], gradient: Tensor, training: bool
) -> Callable[[], object]:
    def forward() -> object:
        with torch.no_grad():
            return run(case, *tensors)

    def both() -> object:
        wanted = tensors if case.image else tensors[:3]
        return torch.autograd.grad(run(case, *tensors), wanted, gradient)

    return both if training else forward


def cost_in_frames(options: AttentionArguments) -> Iterator[dict[str, Any]]:
    """Time per frame of `attend` with an image of a frame's size, 16 against 128 frames; every plan but `all`."""
    device = torch.device(options.device)
    dtype, tokens, heads = FRAME_SIZES[options.device]
    for plan in PLANS[:-1]:
        cases = {f: AttentionCase(plan, f, tokens, tokens, heads=heads) for f in (16, 128)}
        for name in PASSES:
            jobs = {}
            for f, case in cases.items():
                tensors = case.tensors(dtype, device)
                run = job(segments, case, tensors, torch.randn_like(tensors[0]), name != "forward")
                jobs[str(f)] = captured(_repeated(run, 128 // f), device)
            times = interleaved(jobs, options.rounds, device, clock=CLOCKS[options.clock])
            flops = {f: case.flops(False) / f for f, case in cases.items()}
            yield {
                "plan": plan,
                "pass": name,
                "ms_per_frame_16": round(1e3 * times["16"].best / 128, 4),
                "ms_per_frame_128": round(1e3 * times["128"].best / 128, 4),
                "growth": round(times["128"].over(times["16"]) - 1, 4),
                "growth_of_work": round(flops[128] / flops[16] - 1, 4),
            }


def _repeated(run: Callable[[], object], count: int) -> Callable[[], object]:
    def repeated() -> None:
        for _ in range(count):
            run()

    return repeated


def main(options: AttentionArguments) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    start = time.monotonic()
    peak = matmul_peak(dtype, device, clock=CLOCKS[options.clock])
    about = conditions(device) | {"matmul_gflops": round(peak / 1e9, 1), "dtype": str(dtype)}
    log.info("%s", about)
    rows: list[dict[str, Any]] = []
    cases = grid(options)
    for done, case in enumerate(cases):
        if done and time.monotonic() - start > options.budget:
            log.info("time is up: %d of %d cases were left out", len(cases) - done, len(cases))
            break
        measured = list(compare(case, options, peak))
        log.info(report.line(measured))
        rows += measured
        gc.collect()
    frames = list(cost_in_frames(options))
    where = options.table.with_suffix("") if options.table else options.out / "attention"
    write_lines(where.with_suffix(".jsonl"), rows + frames)
    report.plot(rows, frames, where.with_suffix(".png"))
    if options.table:
        command = "python -m experiments.bench.attention " + " ".join(sys.argv[1:])
        options.table.write_text(report.page(rows, frames, about, command))


if __name__ == "__main__":
    main(tyro.cli(AttentionArguments, description=__doc__))
