"""Captions to token ids, with the subject's place in each caption."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NULL_PROMPT = "None"
"""The unconditional caption is this literal word (VideoBooth's training and sampling scripts)."""

CLIP_VOCABULARY = 49408
_BYTES = 512  # the first ids are single bytes, inside and at the end of a word


@dataclass(frozen=True)
class Prompt:
    """Tokenised captions."""

    ids: Tensor  # b l, long
    spans: Tensor  # b l, long: 0, or k at the tokens of the subject's k-th occurrence (k = 1, 2, ...)

    def to(self, device: torch.device | str) -> "Prompt":
        return Prompt(self.ids.to(device), self.spans.to(device))


class Tokenizer:
    """CLIP's byte-pair tokenizer (from the open_clip wheel).

    Captions are padded with the end token, as Stable Diffusion's text encoder was fed; open_clip pads with
    0, which the causal mask hides from the pooled embedding. A vocabulary of V < 49408 rows folds CLIP's ids:
    begin -> V-2, end -> V-1, any other id -> (id + id // R) mod R with R = V-2. Folding is deterministic, and
    two words may share a row.
    """

    def __init__(self, context_length: int, vocab_size: int = CLIP_VOCABULARY) -> None:
        if not _BYTES + 2 <= vocab_size <= CLIP_VOCABULARY:
            raise ValueError(
                f"vocab_size = {vocab_size} must lie in {_BYTES + 2}..{CLIP_VOCABULARY} (CLIP's single "
                "bytes, begin and end take the first rows): change text_cfg.vocab_size of the model"
            )
        self.context_length, self.vocab_size = context_length, vocab_size
        self.begin, self.end = vocab_size - 2, vocab_size - 1

    def fold(self, token: int) -> int:
        """CLIP's id of an ordinary token -> its row in this vocabulary."""
        rows = self.vocab_size - 2
        return (token + token // rows) % rows

    def __call__(self, captions: Sequence[str], subjects: Sequence[str | None] | None = None) -> Prompt:
        """Captions, and the word(s) of each caption's subject (None: no subject) -> Prompt of shape b l.

        Every occurrence of a subject is marked, whole words only, regardless of case. What passes
        `context_length` is cut and the last token becomes the end token. ValueError: a caption without its
        subject, or with its subject only in the part that is cut.
        """
        subjects = [None] * len(captions) if subjects is None else subjects
        if len(subjects) != len(captions):
            raise ValueError(
                f"{len(captions)} captions but {len(subjects)} subjects: give one (or None) for each"
            )
        rows = [self._row(caption, subject) for caption, subject in zip(captions, subjects, strict=True)]
        ids = torch.tensor([row[0] for row in rows], dtype=torch.long).reshape(len(rows), self.context_length)
        spans = torch.tensor([row[1] for row in rows], dtype=torch.long).reshape(
            len(rows), self.context_length
        )
        return Prompt(ids, spans)

    def _row(self, caption: str, subject: str | None) -> tuple[list[int], list[int]]:
        tokens, room = bpe().encode(caption), self.context_length - 2
        starts, length = _find(caption, tokens, subject) if subject is not None else ([], 0)
        inside = [start for start in starts if start + length <= room]
        if starts and not inside:
            raise ValueError(
                f"subject {subject!r} stands beyond the {room} tokens that fit of caption {caption!r}: "
                "shorten the caption, or put the subject earlier"
            )
        spans = [0] * self.context_length
        for occurrence, start in enumerate(inside, 1):
            spans[1 + start : 1 + start + length] = [occurrence] * length
        ids = [self.begin, *map(self.fold, tokens[:room])]
        return ids + [self.end] * (self.context_length - len(ids)), spans


@functools.cache
def bpe() -> Any:
    """open_clip's tokenizer; imported late because open_clip takes seconds to import."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def _find(caption: str, tokens: list[int], subject: str) -> tuple[list[int], int]:
    """Starts of the subject's non-overlapping occurrences, and its length, in CLIP's tokens."""
    wanted = bpe().encode(subject)
    starts: list[int] = []
    for start in range(len(tokens)) if wanted else ():
        new_word = start == 0 or bpe().decoder[tokens[start - 1]].endswith("</w>")
        free = not starts or start >= starts[-1] + len(wanted)
        if new_word and free and tokens[start : start + len(wanted)] == wanted:
            starts.append(start)
    if not starts:
        raise ValueError(
            f"subject {subject!r} is not in caption {caption!r}: the caption must contain the subject's "
            "words as given (subject 'dog': 'a dog runs'), so change one of the two"
        )
    return starts, len(wanted)
