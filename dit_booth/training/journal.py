"""What a run tells while it runs: metrics.jsonl, TensorBoard scalars and videos, and a progress bar (rank 0 only)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class Journal:
    """``metrics.jsonl`` (one line a step) and TensorBoard beside it. Lines after the step that is resumed go."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "metrics.jsonl"
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def resume(self, stage: str, step: int) -> None:
        """Forget what an interrupted run wrote of this stage after the checkpoint."""
        if not self.file.exists():
            return
        lines = [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line.get("stage") != stage or line["step"] <= step]
        partial = self.file.with_name("metrics.jsonl.part")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.file)

    def step(self, stage: str, step: int, values: dict[str, float]) -> None:
        """One optimizer step."""
        self.line({"stage": stage, "step": step, **values})
        for name, value in values.items():
            self.board.add_scalar(f"{stage}/{name}", value, step)

    def line(self, values: dict[str, Any]) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps(values) + "\n")

    def video(self, name: str, video: Tensor, fps: int) -> None:
        """A video (f 3 h w in [-1, 1]) as TensorBoard shows it: an animated GIF (its own writer needs moviepy)."""
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
