"""umT5's tokenizer: cleaned captions to token ids, with the tokens of each caption's subject."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

import torch

from dit_booth.models.clip.tokenizer import Prompt


def clean(text: str) -> str:
    """Mend broken Unicode, undo HTML escapes (also double ones) and collapse white space, as diffusers' WanPipeline."""
    import ftfy

    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


class Umt5Tokenizer:
    """A transformers tokenizer with offsets, for prompts of `length` tokens: cut, the end token last, or padded."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.padding = int(tokenizer.pad_token_id)

    def __call__(
        self,
        captions: Sequence[str],
        subjects: Sequence[str | None] | None = None,
        *,
        first_token_suffices: bool = False,
    ) -> Prompt:
        """Captions, and the word(s) of each caption's subject (None: no subject) -> Prompt of shape b l.

        Every occurrence of a subject is marked, whole words only, regardless of case. ValueError: a caption without its
        subject, or with its subject only in the part that is cut; with `first_token_suffices`, only the subject's first
        token must be there (a caption may then have no mark).
        """
        subjects = [None] * len(captions) if subjects is None else subjects
        if len(subjects) != len(captions):
            raise ValueError(
                f"{len(captions)} captions but {len(subjects)} subjects: give one (or None) for each"
            )
        rows = [
            self._row(clean(caption), clean(subject) if subject else "", first_token_suffices)
            for caption, subject in zip(captions, subjects, strict=True)
        ]
        longest = max((len(row[2]) for row in rows), default=0)
        own = [row[2] + [-1] * (longest - len(row[2])) for row in rows]
        ids, spans = ([row[i] for row in rows] for i in range(2))
        shape = (len(rows), longest)
        return Prompt(
            torch.tensor(ids), torch.tensor(spans), torch.tensor(own, dtype=torch.long).reshape(shape)
        )

    def _row(
        self, caption: str, subject: str, first_token_suffices: bool
    ) -> tuple[list[int], list[int], list[int]]:
        """Return ids, spans, and the subject's own ids."""
        found = self.tokenizer(
            caption,
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_offsets_mapping=True,
        )
        ids: list[int] = list(found.input_ids)
        if not subject:
            return ids, [0] * len(ids), []
        own: list[int] = self.tokenizer(subject, add_special_tokens=False).input_ids
        spans = mark(found.offset_mapping, occurrences(caption, subject))
        if not any(spans) and not (first_token_suffices and own[0] in ids):
            _raise_missing(caption, subject, self.length)
        return ids, spans, own


def occurrences(caption: str, subject: str) -> list[tuple[int, int]]:
    """Return where the subject stands in the caption (begin, end), as whole words, regardless of case.

    In a script without capital letters, such as Chinese, words have no visible ends: there any place counts.
    """
    words = r"\s+".join(map(re.escape, subject.split()))
    if subject.upper() != subject.lower():
        words = rf"(?<!\w){words}(?!\w)"
    return [found.span() for found in re.finditer(words, caption, flags=re.IGNORECASE)]


def mark(offsets: Sequence[tuple[int, int]], places: Sequence[tuple[int, int]]) -> list[int]:
    """Return k at the tokens of the k-th place (k = 1, 2, ...), else 0; a place of which a part is cut counts not.

    offsets: begin and end of each token in the text; a special token is empty.
    """
    marks, count = [0] * len(offsets), 0
    for begin, end in places:
        inside = [i for i, (left, right) in enumerate(offsets) if max(left, begin) < min(right, end)]
        if inside and offsets[inside[-1]][1] >= end:
            count += 1
            for i in inside:
                marks[i] = count
    return marks


def _raise_missing(caption: str, subject: str, length: int) -> None:
    if occurrences(caption, subject):
        raise ValueError(
            f"subject {subject!r} stands beyond the {length - 1} tokens that fit of caption {caption!r}: shorten the"
            " caption, put the subject earlier, or raise text.length"
        )
    raise ValueError(
        f"subject {subject!r} is not in caption {caption!r}: the caption must contain the subject's words as given"
        " (subject 'dog': 'a dog runs'), so change one of the two"
    )
