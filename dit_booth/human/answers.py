"""Answers of raters: read from the page's files and the server's log, and checked; what is refused has a reason."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dit_booth.human.key import FORMAT, KEY, Key, Trial

Choice = Literal["left", "tie", "right"]
RATER = re.compile(r"[0-9a-f]{32}")
_LONGEST = 7 * 24 * 3600 * 1000  # of an answer, in milliseconds


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One choice; of two to the same question, the one with the larger `n` replaces the other."""

    trial: int
    question: str
    choice: Choice
    ms: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Rater:
    """A rater's list and final answers, by trial and question."""

    id: str
    list: int
    answers: Mapping[tuple[int, str], Answer]

    def trials(self, key: Key) -> Sequence[Trial]:
        return key.lists[self.list]

    def complete(self, key: Key) -> bool:
        return len(self.answers) == len(self.trials(key)) * len(key.questions)


@dataclass
class Collected:
    """Raters by id, and what was not taken: reasons by file or line, and counts of answers that came again."""

    raters: dict[str, Rater] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    duplicates: int = 0
    revised: int = 0


def parse_answer(key: Key, found: object, own: int) -> Answer:
    """Check an answer to a trial of list `own`. ValueError: it is none; the message names the field."""
    if not isinstance(found, dict):
        raise ValueError(f"an answer is a {type(found).__name__}; it must be an object")
    values = {name: found.get(name) for name in Answer.__dataclass_fields__}
    limits = {"trial": len(key.lists[own]), "ms": _LONGEST, "n": 1_000_000}
    for name, limit in limits.items():
        value = values[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
            raise ValueError(f"{name} is {value!r}; it must be a whole number below {limit}")
    if values["question"] not in key.questions:
        raise ValueError(f"question is {values['question']!r}; this study asks {', '.join(key.questions)}")
    if values["choice"] not in get_args(Choice):
        raise ValueError(f"choice is {values['choice']!r}; it must be left, tie or right")
    return Answer(**values)  # type: ignore[arg-type]  # checked above


def parse_rater(key: Key, found: Mapping[str, object]) -> tuple[str, int]:
    """Return a submission's rater and list. ValueError: of another study, or no such rater or list."""
    if found.get("study") != key.study:
        raise ValueError(f"is of study {found.get('study')!r}, not of {key.study}")
    rater, own = found.get("rater"), found.get("list")
    if not isinstance(rater, str) or not RATER.fullmatch(rater):
        raise ValueError(f"rater is {rater!r}; it must be 32 hexadecimal digits")
    if isinstance(own, bool) or not isinstance(own, int) or not 0 <= own < len(key.lists):
        raise ValueError(f"list is {own!r}; this study has {len(key.lists)}")
    return rater, own


def checksum(key: Key, rater: str, own: int, answers: Iterable[Answer]) -> str:
    """Return the checksum that the page writes: it shows accidents and edits, and is no signature."""
    lines = [f"{a.trial}|{a.question}|{a.choice}|{a.ms}|{a.n}" for a in answers]
    return f"{zlib.crc32(chr(10).join([key.study, rater, str(own), *lines]).encode()):08x}"


def to_file(key: Key, rater: str, own: int, answers: Sequence[Answer]) -> str:
    """Return the text of a file as the page saves it."""
    plain = [vars(answer) for answer in answers]
    check = checksum(key, rater, own, answers)
    found = {
        "format": FORMAT,
        "study": key.study,
        "rater": rater,
        "list": own,
        "answers": plain,
        "check": check,
    }
    return json.dumps(found)


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Return files of answers: those named, and all ``.json`` and ``.jsonl`` of named folders. ValueError: none."""
    found: list[Path] = []
    for path in paths:
        inside = sorted([*path.glob("*.json"), *path.glob("*.jsonl")]) if path.is_dir() else [path]
        found += [file for file in inside if file.name != KEY]
    if not found:
        raise ValueError(
            f"answers: no .json or .jsonl file in {', '.join(map(str, paths))}; name files or folders"
        )
    return list(dict.fromkeys(found))


def read_answers(key: Key, files: Sequence[Path]) -> Collected:
    """Read all files; what cannot be taken is refused with a reason. ValueError: nothing can be taken."""
    collected = Collected()
    for file in files:
        for where, read in _submissions(file):
            try:
                rater, own, answers = _submission(key, read())
                known = collected.raters.get(rater)
                if known and known.list != own:
                    raise ValueError(f"rater {rater[:8]} has list {own} here and list {known.list} elsewhere")
            except ValueError as error:
                collected.refused[where] = str(error)
                continue
            _add(collected, rater, own, answers)
    if not collected.raters:
        where, reason = next(iter(collected.refused.items()), (str(files[0]), "it is empty"))
        raise ValueError(
            f"no answers can be taken: {where}: {reason}; give answers of the study {key.title!r}"
        )
    return collected


def _submissions(file: Path) -> Iterator[tuple[str, Any]]:
    """Iterate over (place, function that parses it): a whole file, or the lines of a log; a torn last line is none."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = f"cannot be read ({error})"
        yield str(file), lambda: _refuse(reason)
        return
    if file.suffix != ".jsonl":
        yield str(file), lambda: _json(text)
        return
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if line.endswith("\n") and line.strip():
            yield f"{file}:{number}", lambda line=line: {**_json(line), "answers": None}


def _refuse(reason: str) -> Mapping[str, object]:
    raise ValueError(reason)


def _json(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error}); it was cut off or edited") from error
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}, not a rater's answers")
    return found


def _submission(key: Key, found: Mapping[str, object]) -> tuple[str, int, list[Answer]]:
    """Return rater, list and answers of a file, or of a line of the log: one answer, or the rater's joining."""
    rater, own = parse_rater(key, found)
    if found.get("answers") is None:
        return rater, own, [parse_answer(key, found, own)] if "trial" in found else []
    plain = found["answers"]
    if not isinstance(plain, list):
        raise ValueError(f"answers is a {type(plain).__name__}; it was edited")
    answers = [parse_answer(key, answer, own) for answer in plain]
    if found.get("check") != checksum(key, rater, own, answers):
        raise ValueError("its checksum does not fit: it was edited or damaged")
    return rater, own, answers


def _add(collected: Collected, rater: str, own: int, answers: Sequence[Answer]) -> None:
    known = dict(collected.raters[rater].answers) if rater in collected.raters else {}
    for answer in answers:
        place = answer.trial, answer.question
        before = known.get(place)
        collected.duplicates += before is not None and before.n == answer.n
        collected.revised += before is not None and before.n != answer.n
        if before is None or answer.n > before.n:
            known[place] = answer
    collected.raters[rater] = Rater(id=rater, list=own, answers=known)
