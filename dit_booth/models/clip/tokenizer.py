"""Tokenizer: captions to token ids, with the tokens of each caption's subject and their places."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

NULL_PROMPT = "None"
"""The unconditional caption, a literal word in VideoBooth's training and sampling scripts."""

CLIP_VOCABULARY = 49408
_BYTES = 512  # the first ids are single bytes, inside and at the end of a word


@dataclass(frozen=True)
class Prompt:
    """Tokenised captions and their subjects."""

    ids: Tensor  # b l, long
    spans: Tensor  # b l, long: k at the tokens of the subject's k-th whole occurrence (k = 1, 2, ...), else 0
    subjects: Tensor  # b s, long: the subject's own tokens, padded with -1

    @classmethod
    def without_subject(cls, ids: Tensor) -> "Prompt":
        """Make a prompt of token ids (b l) of captions without subjects."""
        return cls(ids, torch.zeros_like(ids), ids.new_empty(len(ids), 0))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Prompt":
        """Apply `change` to all tensors: a selection of rows, or a move to a device."""
        return Prompt(change(self.ids), change(self.spans), change(self.subjects))

    def to(self, device: torch.device | str) -> "Prompt":
        return self.each(lambda tensor: tensor.to(device))


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
        """Map CLIP's id of an ordinary token to its row in this vocabulary."""
        rows = self.vocab_size - 2
        return (token + token // rows) % rows

    def __call__(
        self,
        captions: Sequence[str],
        subjects: Sequence[str | None] | None = None,
        *,
        first_token_suffices: bool = False,
    ) -> Prompt:
        """Captions, and the word(s) of each caption's subject (None: no subject) -> Prompt of shape b l.

        Every occurrence of a subject is marked, whole words only, regardless of case. Captions are cut to
        `context_length`, with the end token last. ValueError: a caption without its
        subject, or with its subject only in the part that is cut; with `first_token_suffices`, only the
        subject's first token must be there (a caption may then have no mark).
        """
        subjects = [None] * len(captions) if subjects is None else subjects
        if len(subjects) != len(captions):
            raise ValueError(
                f"{len(captions)} captions but {len(subjects)} subjects: give one (or None) for each"
            )
        pairs = zip(captions, subjects, strict=True)
        rows = [self._row(caption, subject, first_token_suffices) for caption, subject in pairs]
        ids, spans, own = ([row[i] for row in rows] for i in range(3))
        length, longest = self.context_length, max(map(len, own), default=0)
        return Prompt(_table(ids, length), _table(spans, length), _table(own, longest))

    def _row(
        self, caption: str, subject: str | None, first_token_suffices: bool
    ) -> tuple[list[int], list[int], list[int]]:
        """Return ids, spans, and the subject's own ids."""
        tokens, room = bpe().encode(caption), self.context_length - 2
        kept, wanted = tokens[:room], [] if subject is None else bpe().encode(subject)
        if subject is not None and not _holds(kept, wanted, first_token_suffices):
            check_subject(caption, subject, first_token_suffices=first_token_suffices)
            raise ValueError(
                f"subject {subject!r} stands beyond the {room} tokens that fit of caption {caption!r}: "
                "shorten the caption, or put the subject earlier"
            )
        padding = self.context_length - 1 - len(kept)
        ids = [self.begin, *map(self.fold, kept), *[self.end] * padding]
        return ids, [0, *mark(kept, wanted, _ends_word), *[0] * padding], [self.fold(t) for t in wanted]


class BytePairEncoder(Protocol):
    """The part of open_clip's ``SimpleTokenizer`` that is used here."""

    decoder: Mapping[int, str]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


@functools.cache
def bpe() -> BytePairEncoder:
    """Return open_clip's tokenizer, imported late because open_clip takes seconds to import."""
    from open_clip import SimpleTokenizer

    return cast(BytePairEncoder, SimpleTokenizer())


def mark(tokens: list[int], subject: list[int], ends_word: Callable[[int], bool]) -> list[int]:
    """Return k at the tokens of the subject's k-th occurrence (k = 1, 2, ...), else 0.

    An occurrence has all of the subject's tokens, begins where a word does, and overlaps no earlier one.
    """
    marks, count = [0] * len(tokens), 0
    for at in range(len(tokens)):
        new_word = at == 0 or ends_word(tokens[at - 1])
        if subject and new_word and not marks[at] and tokens[at : at + len(subject)] == subject:
            count += 1
            marks[at : at + len(subject)] = [count] * len(subject)
    return marks


def check_subject(caption: str, subject: str, *, first_token_suffices: bool = False) -> None:
    """Raise ValueError if the caption lacks the subject or, with `first_token_suffices`, its first CLIP token."""
    wanted = bpe().encode(subject)
    if _holds(bpe().encode(caption), wanted, first_token_suffices):
        return
    if first_token_suffices:
        first = bpe().decode(wanted[:1]).strip()
        raise ValueError(
            f"not even the first token {first!r} of subject {subject!r} is in caption {caption!r}: "
            "change one of the two"
        )
    raise ValueError(
        f"subject {subject!r} is not in caption {caption!r}: the caption must contain the subject's "
        "words as given (subject 'dog': 'a dog runs'), so change one of the two"
    )


def _holds(tokens: list[int], subject: list[int], first_token_suffices: bool) -> bool:
    """Return True if the subject is there; with `first_token_suffices` its first token, anywhere, is enough."""
    if first_token_suffices:
        return not set(subject[:1]).isdisjoint(tokens)
    return any(mark(tokens, subject, _ends_word))


def _table(rows: list[list[int]], width: int) -> Tensor:
    """Pad rows of at most `width` ids with -1: (n width), long."""
    padded = [row + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.long).reshape(len(rows), width)


def _ends_word(token: int) -> bool:
    return bpe().decoder[token].endswith("</w>")
