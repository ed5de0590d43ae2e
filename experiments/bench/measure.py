"""Measuring: times of competitors side by side, peak memory, the device's matmul peak."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Job = Callable[[], object]
Clock = Callable[[], float]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@dataclass(frozen=True)
class Times:
    """Seconds of a job's runs, in order: run i of every competitor met the same load of the machine."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def over(self, other: Times) -> float:
        """Median over the rounds of this job's time as a share of the other's."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def interleaved(
    jobs: Mapping[str, Job],
    rounds: int,
    device: torch.device,
    warm_up: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Times]:
    """Measure the jobs interleaved, so that other load on the machine affects all alike.

    clock: on the CPU, `time.perf_counter`, or `time.process_time` (with one thread, on a busy machine).
    """
    for job in jobs.values():
        for _ in range(warm_up):
            job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for i in range(rounds):
        order = list(jobs.items())
        for name, job in order if i % 2 == 0 else reversed(order):
            seconds[name].append(_seconds(job, device, clock))
    return {name: Times(tuple(s)) for name, s in seconds.items()}


def keep_freed_memory() -> None:
    """Have glibc keep what is freed on the CPU; nothing happens where the C library is another.

    By default large freed blocks go back to the system. Where two networks take turns, that distorts the ratio of their
    times by up to 7%; alone, each is as fast either way (docs/results/train_step_cpu.md).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt; no way to open the C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 1 << 26)  # bytes from which a block is mapped and unmapped each time
        mallopt(M_TRIM_THRESHOLD, 1 << 30)  # free bytes at the heap's end from which it shrinks


def _seconds(job: Job, device: torch.device, clock: Clock) -> float:
    if device.type != "cuda":
        start = clock()
        job()
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    job()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


def peak_memory(job: Job, device: torch.device) -> int:
    """Bytes of tensors that the job adds to what is allocated, at most; its result counts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler sees every allocation of PyTorch's CPU allocator. Resident memory would depend on what malloc keeps.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        job()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def peak_of_process(module: str, job: str, threads: int) -> float:
    """Resident MiB at most of a fresh process that runs one of a bench's jobs alone: its ``--peak JOB`` prints them."""
    command = [sys.executable, "-m", module, "--peak", job, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def own_peak() -> float:
    """Resident MiB of this program at most, so far. (`getrusage` would count what the starting process had.)"""
    status = Path("/proc/self/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def matmul_peak(
    dtype: torch.dtype, device: torch.device, rounds: int = 10, clock: Clock = time.perf_counter
) -> float:
    """FLOP/s of the best of some square matrix products."""
    best = 0.0
    for n in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
        times = interleaved({"matmul": lambda a=a, b=b: a @ b}, rounds, device, clock=clock)  # type: ignore[misc]
        best = max(best, 2 * n**3 / times["matmul"].best)
    return best


def conditions(device: torch.device) -> dict[str, Any]:
    """Describe the conditions of a measurement: versions, device, threads, the machine's load."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "torch": torch.__version__,
        "device": name,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
