"""A folder of videos to score, with a CSV file that says what each was to show: ``videos.csv``.

    video,image,caption,subject
    000.mp4,image/000.png,a star is spinning on snow,star

Paths are relative to the CSV file and stay in its folder. Optional columns: ``prompt`` (name of the prompt, by which
methods are paired; else the image's path and the caption), ``noise_seed``, ``control`` (truth, shuffled, none: a floor
or ceiling), ``truth`` (the real video), ``identity`` (the toy world's parameters, JSON). A run's ``samples`` has all.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_args

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from dit_booth.data.image_prompt import as_image_prompt
from dit_booth.data.toyworld import as_identity
from dit_booth.data.video import read_video, write_video
from dit_booth.evaluation.case import Case, Control
from dit_booth.files import read_table, replacing, within, write_text

VIDEOS = "videos.csv"
LEFT_OUT = "left_out.json"
"""Reasons for the videos that could not be scored, by file."""
NEEDED = ("video", "image", "caption", "subject")


@dataclass(frozen=True, kw_only=True)
class VideoRow:
    """A line of ``videos.csv``; files are relative to its folder, and `identity` is JSON."""

    video: str
    image: str
    caption: str
    subject: str
    prompt: str = ""
    noise_seed: int = 0
    control: str = ""
    truth: str = ""
    identity: str = ""


class VideoFolder(Sequence[Case]):
    """The videos of a CSV file, each read when it is asked for: a set may be larger than the memory.

    ``folder[i]`` raises ValueError for a video that is broken or does not fit its prompt; it names the file.
    """

    def __init__(self, file: Path) -> None:
        self.folder, self.rows = file.parent, read_rows(file)

    def only(self, indices: Sequence[int]) -> VideoFolder:
        """Return a folder of some of the videos."""
        chosen = copy(self)
        chosen.rows = [self.rows[index] for index in indices]
        return chosen

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Case:  # type: ignore[override]  # no slices
        row = self.rows[index]
        try:
            return _case(self.folder, row)
        except (ValueError, OSError) as error:
            raise ValueError(f"{row.video}: {error}") from error


def find_list(path: Path) -> Path:
    """Return the CSV file of a run's folder, of a folder, or the file itself. ValueError: there is none."""
    candidates = [path, path / VIDEOS, path / "samples" / VIDEOS]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise ValueError(
            f"{path} is no CSV file and has no {VIDEOS}; give a run's folder, or a folder whose {VIDEOS} lists videos"
        )
    return found


def read_rows(file: Path) -> list[VideoRow]:
    """Read ``videos.csv``. ValueError: a column or value is missing, or a path leaves the folder."""
    names = [field.name for field in fields(VideoRow)]
    needed, more = ",".join(NEEDED), ",".join(names[len(NEEDED) :])
    lines = read_table(file, NEEDED, f"names the columns {needed}, and may name {more}")
    if not lines:
        raise ValueError(f"{file}: lists no videos; write a line for each")
    return [_row(file, number, line, names) for number, line in lines]


def _row(file: Path, number: int, line: Mapping[str, str | None], names: Sequence[str]) -> VideoRow:
    values = {name: (line.get(name) or "").strip() for name in names if line.get(name)}
    where = f"{file}, line {number}"
    if empty := [name for name in NEEDED if name != "subject" and not values.get(name)]:
        raise ValueError(f"{where}: {', '.join(empty)} is empty; fill it in, and quote a caption with commas")
    seed, control = values.get("noise_seed", "0"), values.get("control", "")
    if control not in get_args(Control):
        raise ValueError(f"{where}: control is {control!r}; use truth, shuffled, none, or nothing")
    if not seed.isdigit():
        raise ValueError(f"{where}: noise_seed is {seed!r}; use a whole number")
    named = {"subject": "", "prompt": f"{values['image']}: {values['caption']}", **values}
    row = VideoRow(**{**named, "noise_seed": int(seed)})  # type: ignore[arg-type]  # the others are text
    for path in (row.video, row.image, row.truth):
        if path:
            within(f"{where}, folder", file.parent, Path(path))
    return row


def _case(folder: Path, row: VideoRow) -> Case:
    video = _read(folder / row.video)
    identity = json.loads(row.identity) if row.identity else None
    if identity is not None:
        try:
            identity = asdict(as_identity(identity))
        except TypeError as error:
            raise ValueError(f"identity is not one of the toy world: {error}") from error
    control: Control = row.control  # type: ignore[assignment]  # checked in _row
    return Case(
        video=video,
        image=as_image_prompt(folder / row.image, size=max(video.shape[-2:])),
        caption=row.caption,
        subject=row.subject,
        prompt=row.prompt,
        truth=_read(folder / row.truth) if row.truth else None,
        identity=identity,
        noise_seed=row.noise_seed,
        control=control,
    )


def _read(file: Path) -> Tensor:
    """Decode a video to `f 3 h w` in [-1, 1]."""
    return rearrange(torch.from_numpy(read_video(file)), "f h w c -> f c h w").float() / 127.5 - 1


def write_videos(folder: Path, cases: Mapping[str, Case], fps: int) -> None:
    """Write ``videos.csv`` and what each video is compared with: ``image/000.png`` and ``truth/000.mp4``.

    cases: by the name of the video's file, which lies in the folder already.
    """
    write_rows(folder, write_prompts(folder, cases, fps))


def write_prompts(folder: Path, cases: Mapping[str, Case], fps: int, first: int = 0) -> list[VideoRow]:
    """Write image and real video of each prompt, numbered from `first`; return the lines of ``videos.csv``."""
    prompts = dict.fromkeys(case.prompt for case in cases.values())
    numbers = {prompt: n for n, prompt in enumerate(prompts, first)}
    rows, written = [], set[str]()
    for name, case in cases.items():
        number = f"{numbers[case.prompt]:03d}"
        row = VideoRow(
            video=name,
            image=f"image/{number}.png",
            caption=case.caption,
            subject=case.subject,
            prompt=case.prompt,
            noise_seed=case.noise_seed,
            control=case.control,
            truth=f"truth/{number}.mp4" if case.truth is not None else "",
            identity=json.dumps(case.identity) if case.identity else "",
        )
        rows.append(row)
        if number in written:
            continue
        written.add(number)
        with replacing(folder / row.image) as partial:
            _picture(case.image).save(partial, format="PNG")
        if case.truth is not None:
            write_video(folder / row.truth, case.truth, fps=fps)
    return rows


def write_rows(folder: Path, rows: Iterable[VideoRow]) -> None:
    """Write ``videos.csv``."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in fields(VideoRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    write_text(folder / VIDEOS, out.getvalue())


def _picture(image: Tensor) -> Image.Image:
    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(rearrange(pixels, "c h w -> h w c").cpu().numpy())
