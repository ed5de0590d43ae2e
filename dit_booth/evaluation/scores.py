"""``scores.jsonl``: every metric of every video, frame by frame.

A line is one metric of one video: ``point`` (in a study), ``seed`` (training), ``noise_seed`` (sampling), ``control``
(empty, truth, shuffled or none), ``prompt``, ``metric`` and ``value``: a list over the frames, or one number for the
whole video; null where a frame has no value. A metric of a whole set of videos has no prompt.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dit_booth.files import replacing

SCORES = "scores.jsonl"
_DIGITS = 6  # significant digits kept


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of a video: `value` is one number for each frame, or one for the whole video (NaN: none)."""

    metric: str
    value: float | tuple[float, ...]
    prompt: str = ""
    point: str = ""
    seed: int = 0
    noise_seed: int = 0
    control: str = ""

    @property
    def mean(self) -> float:
        """Return the mean over the frames that have a value; NaN if none has."""
        if isinstance(self.value, float):
            return self.value
        known = [value for value in self.value if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else math.nan


def write_scores(file: Path, scores: Iterable[Score]) -> None:
    """Write the scores, whole or not at all; a name that ends in ``.gz`` is compressed."""
    text = "".join(json.dumps(_plain(score), separators=(",", ":")) + "\n" for score in scores).encode()
    with replacing(file) as partial:
        partial.write_bytes(gzip.compress(text, mtime=0) if file.suffix == ".gz" else text)


def read_scores(file: Path) -> list[Score]:
    """Read scores; a file that ends in ``.gz`` is compressed. ValueError: a line that is none, named."""
    try:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); score the videos again") from error
    return list(_parse(file, text))


def _parse(file: Path, text: str) -> Iterator[Score]:
    names = {field.name for field in fields(Score)}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            value = row.pop("value")
            row["value"] = tuple(map(_number, value)) if isinstance(value, list) else _number(value)
            if unknown := row.keys() - names:
                raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
            yield Score(**row)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}:{number}: no score ({error}); repair or remove the line") from error


def _plain(score: Score) -> dict[str, object]:
    row = {name: value for name, value in asdict(score).items() if value != "" or name == "metric"}
    value = row.pop("value")
    assert isinstance(value, (float, tuple))
    return row | {"value": [*map(_rounded, value)] if isinstance(value, tuple) else _rounded(value)}


def _rounded(value: float) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"value {value!r} is no number")
    return float(value)
