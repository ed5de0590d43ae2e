"""The texts that raters read, from a YAML file: title, consent, instructions and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml

from dit_booth.errors import suggest

ASSETS = files("dit_booth.human") / "page"
_FIELDS = ("title", "consent", "instructions", "questions")


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Paragraphs are separated by empty lines; ``{subject}`` in a question is the prompt's subject."""

    title: str
    consent: str
    instructions: str
    questions: dict[str, str]

    @staticmethod
    def paragraphs(text: str) -> list[str]:
        return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def default_texts() -> str:
    """Return the packaged file, to be edited."""
    return (ASSETS / "texts.yaml").read_text()


def read_texts(text: str, where: str, questions: Sequence[str] = ()) -> Texts:
    """Parse the texts; `questions`: names of those to ask, in order (empty: all of the file).

    Raises:
        ValueError: no YAML, a field is missing or no text, or an unknown question.
    """
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict) or set(found) != set(_FIELDS):
        names = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{where}: holds {names}; it must have {', '.join(_FIELDS)}")
    for name in _FIELDS[:3]:
        if not isinstance(found[name], str) or not found[name].strip():
            raise ValueError(f"{where}: {name} is {found[name]!r}; write a text")
    asked = found["questions"]
    if not isinstance(asked, dict) or not asked:
        raise ValueError(f"{where}: questions is {asked!r}; write `name: text` lines")
    for name, question in asked.items():
        if not isinstance(name, str) or not name.isidentifier() or not isinstance(question, str):
            raise ValueError(
                f"{where}: question {name!r} is {question!r}; use a name such as motion, and a text"
            )
    for name in questions:
        if name not in asked:
            raise ValueError(f"questions has {name!r}, which is not in {where}{suggest(name, asked)}")
    chosen = {name: asked[name] for name in (dict.fromkeys(questions) or asked)}
    return Texts(**{**found, "questions": chosen})
