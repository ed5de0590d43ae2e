"""``key.json``: what each clip and trial of a human study's page is. Raters do not get it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dit_booth.files import write_text
from dit_booth.human.design import Design, Kind

KEY, PAGE, TEXTS, ANSWERS = "key.json", "study.html", "texts.yaml", "answers.jsonl"
"""Files of a study's folder; `ANSWERS` is what `dit-booth study serve` appends to."""
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class KeyPrompt:
    """A prompt: its name in ``videos.csv``, and its texts."""

    name: str
    caption: str
    subject: str


@dataclass(frozen=True, kw_only=True)
class KeySystem:
    """A system, its folder of videos relative to the key's, and the noise seed of the videos that were taken."""

    name: str
    folder: str
    noise_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video of the page: a system's, or of a planted pair (`system` None), of which one is intact."""

    prompt: int
    system: int | None = None
    intact: bool = True
    digest: str = ""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A pair as one rater sees it: clips by their numbers."""

    kind: Kind
    prompt: int
    left: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Key:
    """All that a study's answers are read with.

    Attributes:
        study: digest of everything below; answers carry it.
        lists: each rater's trials.
        questions: names, in the order in which they are asked.
    """

    title: str
    seed: int
    design: Design
    systems: tuple[KeySystem, ...]
    prompts: tuple[KeyPrompt, ...]
    questions: tuple[str, ...]
    clips: tuple[Clip, ...]
    lists: tuple[tuple[Trial, ...], ...]
    study: str = ""

    def signed(self) -> Key:
        """Return the key with its digest."""
        return Key(**{**vars(self), "study": self.digest()})

    def digest(self) -> str:
        plain = {name: value for name, value in vars(self).items() if name != "study"}
        plain["systems"] = [system.name for system in self.systems]  # the same study wherever its folder lies
        return hashlib.sha256(json.dumps(plain, default=vars).encode()).hexdigest()[:16]


def write_key(file: Path, key: Key) -> None:
    write_text(file, json.dumps({"format": FORMAT, **vars(key)}, default=vars) + "\n")


def read_key(file: Path) -> Key:
    """Read a key. ValueError: it is none, of another format, or was edited."""
    try:
        found = json.loads(file.read_text())
        if found.pop("format", None) != FORMAT:
            raise ValueError(f"has not the format {FORMAT}")
        key = _parse(found)
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read ({error}); give the folder that `study make` wrote"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{file}: no key of a study ({error}); give the folder that `study make` wrote"
        ) from error
    if key.study != key.digest():
        raise ValueError(
            f"{file}: was edited since `study make` wrote it; restore it, or make the study again"
        )
    return key


def _parse(found: Mapping[str, Any]) -> Key:
    key = Key(
        **{
            **found,
            "systems": tuple(KeySystem(**system) for system in found["systems"]),
            "prompts": tuple(KeyPrompt(**prompt) for prompt in found["prompts"]),
            "questions": tuple(found["questions"]),
            "clips": tuple(Clip(**clip) for clip in found["clips"]),
            "lists": tuple(tuple(Trial(**trial) for trial in own) for own in found["lists"]),
        }
    )
    for trial in (trial for own in key.lists for trial in own):
        if trial.kind not in get_args(Kind):
            raise ValueError(f"a trial's kind is {trial.kind!r}")
        _ = key.clips[trial.left], key.clips[trial.right], key.prompts[trial.prompt]
    return key
