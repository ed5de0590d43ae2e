"""Run a stage of the build over all candidates: in parallel, resumable, and safe against files that kill a process."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dit_booth.data.build.candidate import BROKEN, Candidate, Dropped, digest
from dit_booth.files import NO_ROOM, read_lines

log = logging.getLogger(__name__)

VERSION = 1
"""Raise it with a change of the code after which a stage of equal input and settings results in something else."""
Work = Callable[[Candidate], list[Candidate]]
"""One step: a candidate becomes one or more. ValueError, `Dropped` if the reason is known: it is rejected."""


def run_stage(
    name: str, candidates: Sequence[Candidate], work: Work, *, settings: object, folder: Path, workers: int
) -> list[Candidate]:
    """Apply `work` to all candidates that are not rejected yet; those that are stay as they are.

    Results are kept in ``<name>-<hash of settings>.jsonl`` by a hash of their input, so an interrupted stage goes on,
    and changed captions, files or settings redo what depends on them and nothing else.

    work: a function that can be pickled. settings: plain containers, all that `work` depends on.
    """
    kept = Results(folder / f"{name}-{digest([VERSION, settings])}.jsonl")
    waiting = [c for c in candidates if not c.reasons and c.digest() not in kept.rows]
    done = tqdm(total=len(waiting), desc=name, unit="clip", disable=not waiting)
    with done, kept:
        for candidate, result in run_all(waiting, partial(attempt, work), workers):
            kept.add(candidate, result)
            done.update()
    return [row for c in candidates for row in ([c] if c.reasons else kept.rows[c.digest()])]


def attempt(work: Work, candidate: Candidate) -> list[Candidate]:
    """Run one step; an error becomes the reason of a rejection, as no file may end the whole build.

    OSError: the disk is full, which is no fault of the clip: the build stops, and goes on when there is room.
    """
    try:
        return work(candidate)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        reason = error.reason if isinstance(error, Dropped) else BROKEN
        details = (
            str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        )
        return [replace(candidate, reasons=(reason,), details=details)]


def run_all(
    candidates: Sequence[Candidate], step: Work, workers: int
) -> Iterator[tuple[Candidate, list[Candidate]]]:
    """Iterate over the results in the order in which they come; with one worker, in this process."""
    if workers == 1 or len(candidates) < 2:
        yield from ((candidate, step(candidate)) for candidate in candidates)
        return
    left = dict(enumerate(candidates))
    try:
        for number, result in in_pool(left, step, workers):
            yield left.pop(number), result
    except BrokenProcessPool:
        log.warning("a process was killed; the %d clips that were left go on one by one", len(left))
        for candidate in left.values():  # a decoder's crash takes all that the pool had with it
            try:
                ((_, result),) = in_pool({0: candidate}, step, 1)
            except BrokenProcessPool:
                result = [replace(candidate, reasons=(BROKEN,), details="reading it kills the process")]
            yield candidate, result


def in_pool(items: dict[int, Candidate], step: Work, workers: int) -> Iterator[tuple[int, list[Candidate]]]:
    """Iterate over (number, result) from a pool of processes. BrokenProcessPool: one of them was killed."""
    with processes(workers) as pool:
        futures: dict[Future[list[Candidate]], int] = {
            pool.submit(step, item): number for number, item in list(items.items())
        }
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def processes(workers: int) -> ProcessPoolExecutor:
    """Return a pool of processes for steps of the build.

    They are forked from a process without threads, which has imported what the steps need: a fork of this one may wait
    for ever for a thread of OpenCV or PyTorch that it does not have.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cv2", "torch", "dit_booth.data.build.build"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread)


def _one_thread() -> None:
    import cv2
    import torch

    cv2.setNumThreads(1)
    torch.set_num_threads(1)


class Results:
    """The results of a stage in a file of JSON lines, appended as they come; a line that was cut off is dropped."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, list[Candidate]] = {
            line["input"]: [Candidate.load(row) for row in line["rows"]] for line in read_lines(file)
        }

    def __enter__(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.stream = self.file.open("ab")
        whole = self.file.read_bytes().rfind(b"\n") + 1
        os.ftruncate(self.stream.fileno(), whole)

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def add(self, candidate: Candidate, result: list[Candidate]) -> None:
        key = candidate.digest()
        self.rows[key] = result
        line = {"input": key, "rows": [asdict(row) for row in result]}
        self.stream.write(json.dumps(line).encode() + b"\n")
        self.stream.flush()
