"""The page that shows a data set: playing clips, masks, image prompts, distributions, filters to try."""

from __future__ import annotations

import base64
import io
import json
import os
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dit_booth.data.build.candidate import Candidate
from dit_booth.data.build.shown import PLAYED, Clip, Draw, bare, built_set, read_set
from dit_booth.data.build.stages import processes
from dit_booth.data.build.write import MANIFEST
from dit_booth.data.image_files import Mask, Pixels
from dit_booth.data.image_prompt import prepare
from dit_booth.data.readers.formats import FormatName

SIDE = 144
"""Longer side of the pictures in pixels."""


@dataclass(frozen=True)
class Dial:
    """A measure that a filter has a threshold for: its field, the setting, and which side is kept."""

    field: str
    setting: str
    label: str
    keep: str


DIALS = (
    Dial("area", "min_area", "share of the frame that the mask covers, at least", "above"),
    Dial("area", "max_area", "share of the frame that the mask covers, at most", "below"),
    Dial("sides", "max_sides", "sides of the frame that the box touches, at most", "below"),
    Dial("motion", "min_motion", "motion against the background, diagonals per second, at least", "above"),
    Dial("change", "min_change", "change between frames, of 255, at least", "above"),
    Dial("sharpness", "min_sharpness", "steepness of edges, percent of contrast, at least", "above"),
)


def make_page(out: Path, *, format: FormatName, limit: int, workers: int) -> str:
    """Return the page of a data set, of at most `limit` clips: of a built one, or one that a reader of `format` reads.

    A built one shows the candidates that have a mask, in the order of the manifest.

    Raises:
        ValueError: the folder was not built by `build`, and is no data set of that format.
    """
    found = built_set(out) if (out / MANIFEST).is_file() else read_set(out, format)
    shown = found.clips[:limit]
    with processes(workers or os.cpu_count() or 1) as pool:
        drawn = pool.map(partial(attempt, found.draw), shown, chunksize=4)
        rows = list(tqdm(drawn, desc="pictures", total=len(shown), unit="clip"))
    dials = [{**asdict(dial), "value": found.thresholds[dial.setting]} for dial in DIALS]
    if not found.built:  # a measure that is the same everywhere (pictures do not move) tells nothing
        dials = [dial for dial in dials if len({row[str(dial["field"])] for row in rows}) > 1]
    return render(
        title=out.name,
        built=found.built,
        total=len(found.clips) + len(found.unmeasured),
        accepted=found.accepted,
        unmeasured=found.unmeasured,
        left_out=len(found.clips) - len(shown),
        data=embed({"rows": rows, "dials": dials}),
    )


def attempt(draw: Draw, clip: Clip) -> dict[str, Any]:
    """Return a clip's row of the page; one that cannot be read has no pictures, and the reason."""
    try:
        candidate, frames, mask, pause = draw(clip)
    except (ValueError, OSError) as error:
        known = clip if isinstance(clip, Candidate) else bare(clip)
        return {**summary(known), "clip": "", "still": "", "error": str(error)}
    return {**summary(candidate), **picture(candidate, frames, mask, pause)}


def embed(data: object) -> Markup:
    """Return JSON to stand in a script: a caption must not end it."""
    return Markup(json.dumps(data).replace("<", "\\u003c"))


def summary(candidate: Candidate) -> dict[str, Any]:
    """Return what the page's script needs of a candidate."""
    fields = ("videoid", "caption", "subject", "area", "sides", "motion", "change", "sharpness", "details")
    row = asdict(candidate)
    return {**{name: row[name] for name in fields}, "reasons": list(candidate.reasons)}


def picture(
    candidate: Candidate, frames: NDArray[np.uint8], mask: Mask | None, pause: float
) -> dict[str, str]:
    """Return a playing clip, and the masked first frame beside the image prompt, as data URLs.

    frames: `f h w 3`, `pause` seconds apart. mask: `h w`, of the first.
    """
    prompt = prepare(frames[0], size=SIDE, mask=mask, box=candidate.box)
    image = ((rearrange(prompt, "c h w -> h w c") + 1) * 127.5).round().byte().numpy()
    first_frame = frames[0] if mask is None else overlay(frames[0], mask)
    first, *others = [Image.fromarray(shrink(frame)) for frame in frames[:PLAYED]]
    animation = {"save_all": True, "append_images": others, "duration": round(1000 * pause), "loop": 0}
    return {
        "clip": data_url(first, "WEBP", quality=55, method=2, **(animation if others else {})),
        "still": data_url(Image.fromarray(beside(shrink(first_frame), image)), "JPEG", quality=72),
    }


def overlay(frame: Pixels, mask: Mask) -> Pixels:
    """Return a frame whose background is faded, and the mask's outline drawn."""
    faded = (0.35 * frame + 0.65 * 255).astype(np.uint8)
    out = np.where(mask[..., None], frame, faded)
    inner = mask.copy()
    wide = max(1, max(mask.shape) // 160)
    for axis in (0, 1):
        for step in (-wide, wide):
            inner &= np.roll(mask, step, axis)
    out[mask & ~inner] = (213, 94, 0)
    return out


def shrink(frame: Pixels) -> Pixels:
    """Scale a frame to `SIDE` pixels on its longer side."""
    scale = SIDE / max(frame.shape[:2])
    size = max(1, round(frame.shape[1] * scale)), max(1, round(frame.shape[0] * scale))
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def beside(left: Pixels, right: Pixels) -> NDArray[np.uint8]:
    """Put two pictures side by side, on white."""
    canvas = np.full((max(len(left), len(right)), left.shape[1] + right.shape[1] + 4, 3), 255, np.uint8)
    canvas[: len(left), : left.shape[1]] = left
    canvas[: len(right), left.shape[1] + 4 :] = right
    return canvas


def data_url(image: Image.Image, format: str, **options: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, format=format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def render(**context: Any) -> str:
    folder = files("dit_booth.data.build") / "page"
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    parts = {name: Markup((folder / f"inspect.{name}").read_text()) for name in ("css", "js")}
    return environment.from_string((folder / "inspect.html").read_text()).render(**parts, **context)
