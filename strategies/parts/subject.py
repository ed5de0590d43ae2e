"""The subject's place in a prompt: where every token comes from when `count` words of an image take it.

A source is a position of the prompt (of `l`), or `l + j` for word j of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dit_booth.inject import PromptTokens

Sources = Callable[[PromptTokens, int], list[list[int]]]


def replace_subject(prompt: PromptTokens, words: Tensor, find: Sources) -> PromptTokens:
    """Put embeddings `words` (b m d) in the subject's place; `find` says which token comes from where."""
    length, count = prompt.ids.shape[1], words.shape[1]
    index = torch.tensor(find(prompt, count), device=words.device)  # b l, into [prompt; words]
    rows = torch.cat([prompt.embeddings, words.to(prompt.embeddings.dtype)], dim=1)
    ids = torch.cat([prompt.ids, prompt.ids.new_full((len(index), count), -1)], dim=1)
    return replace(
        prompt,
        embeddings=rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1])),
        ids=ids.gather(1, index),
        spans=torch.where(index >= length, 1, 0),
    )


def sources(prompt: PromptTokens, count: int) -> list[list[int]]:
    """Return sources (b l): the words replace each whole subject, the tail shifts and is cut at the end."""
    return [_row(spans, count) for spans in prompt.spans.tolist()]


def _row(spans: list[int], count: int) -> list[int]:
    length, out = len(spans), []
    for position, span in enumerate(spans):
        if span == 0:
            out.append(position)
        elif position == 0 or spans[position - 1] != span:  # an occurrence begins
            out.extend(range(length, length + count))
    padding = [length - 1] * length  # after a subject longer than the words: the last token, the padding
    return (out + padding)[:length]


def released_sources(prompt: PromptTokens, count: int) -> list[list[int]]:
    """Return sources (b l) by the released code's rule (golden: ``twice_*``, ``first_token_only_matches``)."""
    rows = zip(prompt.ids.tolist(), prompt.subjects.tolist(), strict=True)
    return [_released_row(ids, [token for token in subject if token >= 0], count) for ids, subject in rows]


def _released_row(ids: list[int], subject: list[int], count: int) -> list[int]:
    """Replace as many tokens as the subject has wherever its *first* token occurs.

    Every occurrence is written at its place in the *original* prompt, the original tail after it: a later one
    overwrites the shifted tail of the one before, or its words. One that runs past the end leaves the tail as it was.
    """
    length, out = len(ids), list(range(len(ids)))
    past = max(len(subject) - count, 0)
    for start in (at for at, token in enumerate(ids) if token in subject[:1]):
        end = start + len(subject)
        if end <= length:
            tail = [*range(end, length), *range(length - past, length)]
            out[start + count :] = tail[: max(length - start - count, 0)]
        out[start : start + count] = range(length, length + min(count, length - start))
    return out
