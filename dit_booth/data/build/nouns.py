"""Find the nouns of a caption that may be its subject; each must stand in the caption as it is."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

from dit_booth.data.build.candidate import NO_NOUN, Candidate, Dropped
from dit_booth.data.build.settings import NounSettings
from dit_booth.data.readers.item import check_caption

WORDS = """
ends: in on at by with of from to into onto over under near through across along around behind beside between during
ends: inside outside against above below up down off out for as like and or but while when where that which who is are
ends: was were be been being has have had do does did can could will would
modifiers: a an the this that these those his her its their my your our some any each every one two three four five six
modifiers: seven eight nine ten several many few very
verbs: runs walks sits stands eats drinks plays flies swims jumps looks moves rides drives lies sleeps turns spins
verbs: dances holds carries climbs crosses waits watches
no_subjects: video footage shot view close closeup background time day slow motion aerial scene
"""
"""Words by what they do: end a noun phrase, stand before a noun, end a phrase as a verb, name the film."""


def words_of(kind: str) -> frozenset[str]:
    """Return the words of one kind."""
    lines = [line.split() for line in WORDS.splitlines() if line.startswith(f"{kind}:")]
    return frozenset(word for line in lines for word in line[1:])


ENDS, MODIFIERS, NOT_SUBJECTS = (
    words_of("ends") | words_of("verbs"),
    words_of("modifiers"),
    words_of("no_subjects"),
)


def find_nouns(candidate: Candidate, *, settings: NounSettings) -> list[Candidate]:
    """Return a candidate for each noun of the caption, in its order; the one that the list of videos names, if it does.

    Raises:
        Dropped: there is none, or none of `settings.classes`, or the named one is not in the caption.
    """
    if candidate.subject:
        try:
            check_caption(candidate.caption, candidate.subject)
        except ValueError as error:
            raise Dropped(NO_NOUN, error) from error
        return [candidate]
    find = by_rules if settings.tagger == "rules" else by_spacy
    nouns = find(candidate.caption, settings.model)
    wanted = {word.lower() for word in settings.classes}
    nouns = [noun for noun in dict.fromkeys(nouns) if not wanted or wanted & singulars(noun.lower())]
    if not nouns:
        among = f" of {', '.join(settings.classes)}" if wanted else ""
        raise Dropped(NO_NOUN, f"{candidate.caption!r} has no noun{among} that the tagger finds")
    return [replace(candidate, subject=noun) for noun in nouns]


def by_rules(caption: str, _: str = "") -> list[str]:
    """Return the last word of each noun phrase: words up to a preposition, verb, conjunction or comma.

    A phrase without a determiner counts if it is the first. Good for captions such as stock videos have; spaCy knows
    more.
    """
    nouns: list[str] = []
    for clause in re.split(r"[^\w\s'-]+", caption):
        phrase: list[str] = []
        for word in [*clause.split(), "is"]:
            low = word.lower()
            verb = low in ENDS or (bool(phrase) and low.endswith("ing") and len(low) > 4)
            if not verb:
                phrase.append(word)
                continue
            nouns += head(phrase, first=not nouns)
            phrase = []
    return nouns


def head(phrase: list[str], *, first: bool) -> list[str]:
    """Return the noun of a phrase in a list, or nothing."""
    words = [word for word in phrase if word.lower() not in MODIFIERS]
    determined = len(words) < len(phrase)
    if not words or not (determined or first) or words[-1].lower() in NOT_SUBJECTS:
        return []
    return [words[-1]] if words[-1].isalpha() else []


def singulars(noun: str) -> set[str]:
    """Return the words that a noun may be the plural of, and itself."""
    irregular = {"men": "man", "women": "woman", "children": "child", "people": "person", "wolves": "wolf"}
    forms = {noun, irregular.get(noun, noun), noun.removesuffix("s"), noun.removesuffix("es")}
    return forms | ({noun[:-3] + "y"} if noun.endswith("ies") else set())


def by_spacy(caption: str, model: str) -> list[str]:
    """Return the roots of spaCy's noun chunks that are common nouns."""
    document = load_spacy(model)(caption)
    return [chunk.root.text for chunk in document.noun_chunks if chunk.root.pos_ == "NOUN"]


@cache
def load_spacy(model: str) -> Any:
    """Load a spaCy model. ValueError: it is not installed."""
    try:
        import spacy

        return spacy.load(model)
    except (ImportError, OSError) as error:
        raise ValueError(
            f"nouns.tagger is spacy, and it or its model {model!r} is not installed ({error}); "
            f"pip install dit-booth[nouns], and python -m spacy download {model}, or use nouns.tagger=rules"
        ) from error
