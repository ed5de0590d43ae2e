"""The mapper, and the replacement of the subject's tokens: by default, and as the released code does it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import FLOAT64, CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from dense import mapper as dense_mapper
from dit_booth.strategies.parts.mapper import Mapper
from dit_booth.strategies.token_replacement import ReplaceSubject
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dit_booth.inject import PromptTokens
from dit_booth.models.clip.tokenizer import mark


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """``mapper``; every ``NAME.embeds`` under compat=videobooth; and by default where the released code is right."""
    names = sorted(outputs(tensors))
    if "mapper" in names:
        yield from mapper(tensors)
    for name in (n for n in names if n.endswith(".embeds")):
        case, stored = name.removesuffix(".embeds"), tensors[f"outputs.{name}"]
        prompt, words = prompt_of(tensors, case)
        replaced = ReplaceSubject("videobooth")(prompt, words)
        yield CaseResult(f"{name} compat=videobooth", worst(replaced.embeddings, stored))
        if released_is_right(tensors, case):
            replaced = ReplaceSubject()(prompt, words)
            yield CaseResult(f"{name} default", worst(replaced.embeddings, stored))


@torch.no_grad()
def mapper(tensors: Tensors) -> Iterator[CaseResult]:
    stored = tensors["outputs.mapper"]
    for dtype in (torch.float32, torch.float64):
        made = built_mapper(cast(tensors, dtype)).to(dtype)(states_of(cast(tensors, dtype)))
        yield CaseResult(labelled("mapper", dtype), worst(made, stored), tolerance(dtype, stored))
    exact = dense_mapper(mapper_weights(tensors), list(states_of(tensors)))
    yield CaseResult("mapper dense float64", worst(made, exact), FLOAT64)


def mapper_weights(tensors: Tensors) -> dict[str, Tensor]:
    prefix = "weights.mapper."
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def built_mapper(tensors: Tensors) -> Mapper:
    """Ours, of the sizes that the weights have."""
    weights = mapper_weights(tensors)
    (width, image_dim), text_dim = weights["mapping_0.0.weight"].shape, len(weights["mapping_0.6.weight"])
    built = Mapper(image_dim, width, text_dim, states=len(states_of(tensors)))
    built.load_state_dict(weights)
    return built


def states_of(tensors: Tensors) -> tuple[Tensor, ...]:
    count = sum(key.startswith("inputs.mapper_emb_") for key in tensors)
    return tuple(tensors[f"inputs.mapper_emb_{j}"] for j in range(count))


# ---- the replacement ------------------------------------------------------------------------------------------


def prompt_of(tensors: Tensors, case: str) -> tuple[PromptTokens, Tensor]:
    """The prompt as our tokenizer makes it of the case's ids, each of them a word, and the image's words of each row.

    Both rules of replacement find the subject's places in it themselves.
    """
    ids, subjects = ids_and_subjects(tensors, case)
    return tokens_of(tensors, ids, subjects), tensors["inputs.inj_embedding"][: len(ids)]


def tokens_of(tensors: Tensors, ids: list[list[int]], subjects: list[list[int]]) -> PromptTokens:
    """Ids and the subject's own ids, of each row."""
    rows = torch.tensor(ids)
    spans = [mark(row, subject, lambda token: True) for row, subject in zip(ids, subjects, strict=True)]
    own = pad_sequence([torch.tensor(subject) for subject in subjects], batch_first=True, padding_value=-1)
    return PromptTokens(tensors["inputs.table"][rows], rows, torch.tensor(spans), own)


def released_is_right(tensors: Tensors, case: str) -> bool:
    """Whether the first token stands at most once in each row, and then the whole subject after it."""
    ids, subjects = ids_and_subjects(tensors, case)
    return all(
        row.count(subject[0]) == max(mark(row, subject, lambda token: True)) <= 1
        for row, subject in zip(ids, subjects, strict=True)
    )


def ids_and_subjects(tensors: Tensors, case: str) -> tuple[list[list[int]], list[list[int]]]:
    ids = tensors[f"inputs.{case}.ids"].tolist()
    return ids, [tensors[f"inputs.{case}.inj_index_{row}"].tolist() for row in range(len(ids))]
