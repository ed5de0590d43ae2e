"""The log of a run: metrics.jsonl, TensorBoard scalars and videos (rank 0 only)."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dit_booth.config import PlainDict
from dit_booth.files import read_lines, write_text

log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"


class MetricsLogger:
    """``metrics.jsonl`` (one line a step, and one a validation) and TensorBoard beside it.

    A stage's lines are also kept in its own folder, which runs may share: a run that takes over a stage, finished or
    not, takes over its lines. `start`: `time.perf_counter` when the program began.
    """

    def __init__(self, folder: Path, start: float) -> None:
        self.start, self.first_step = start, True
        self.file = folder / METRICS
        self.stage_file: Path | None = None
        self.seconds = 0.0  # of the steps and validations that this process has made
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def begin(self, stage: str, folder: Path, done: int) -> None:
        """Continue a stage, whose own folder is `folder`, after its first `done` steps; lines of later ones go."""
        self.stage_file, self.first_step = folder / METRICS, True
        here = read_lines(self.file)
        source = read_lines(self.stage_file) if self.stage_file.is_file() else here
        own = [line for line in source if line.get("stage") == stage and line["step"] <= done]
        others = [line for line in here if line.get("stage") not in (None, stage)]
        if source is here or own != source:
            _write(self.stage_file, own)
        _write(self.file, [*others, *own])
        known = {_key(line) for line in here if line.get("stage") == stage}
        for line in own:
            if _key(line) not in known:
                self._scalars(line)

    def step(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Log an optimizer step of the stage that was begun, and how soon the first one came."""
        self._stage_line({"stage": stage, "step": step, **values})
        if self.first_step:
            log.info("first step of %s after %.1f s", stage, self.elapsed())
            self.first_step = False

    def validation(self, stage: str, step: int, values: Mapping[str, float], seconds: float) -> None:
        """Log a validation after an optimizer step of the stage that was begun, and its duration."""
        self._stage_line({"stage": stage, "step": step, "validation": dict(values), "seconds": seconds})
        measured = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s step %d on held-out examples (%.1f s): %s", stage, step, seconds, measured)

    def elapsed(self) -> float:
        """Return the seconds since the program began."""
        return time.perf_counter() - self.start

    def _stage_line(self, row: PlainDict) -> None:
        """Write a line of the stage that was begun, to its own file and to the run's."""
        assert self.stage_file is not None
        self.seconds += row["seconds"]
        for file in (self.stage_file, self.file):
            _append(file, row)
        self._scalars(row)

    def _scalars(self, row: PlainDict) -> None:
        values, group = {name: v for name, v in row.items() if name not in ("stage", "step")}, row["stage"]
        if "validation" in values:
            values, group = {**values.pop("validation"), **values}, f"validation/{group}"
        for name, value in values.items():
            self.board.add_scalar(f"{group}/{name}", value, row["step"])

    def line(self, values: PlainDict) -> None:
        _append(self.file, values)

    def video(self, name: str, video: Tensor, fps: int) -> None:
        """Log a video (f 3 h w in [-1, 1]) as an animated GIF (its own writer needs moviepy)."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        pixels = rearrange(
            ((video.float() + 1) * 127.5).round().clamp(0, 255).byte().cpu(), "f c h w -> f h w c"
        )
        frames = [Image.fromarray(frame.numpy()) for frame in pixels]
        data = io.BytesIO()
        frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)
        height, width = pixels.shape[1:3]
        picture = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=data.getvalue()
        )
        self.board._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]))

    def close(self) -> None:
        self.board.close()


def _key(line: PlainDict) -> tuple[int, bool]:
    """Return what identifies a line of a stage: its step, and if it is a validation."""
    return line["step"], "validation" in line


def _append(file: Path, row: PlainDict) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def _write(file: Path, rows: list[PlainDict]) -> None:
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
