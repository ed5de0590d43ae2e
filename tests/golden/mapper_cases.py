"""The mapper, and the replacement of the subject's tokens: by default, and as the released code does it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import FLOAT64, CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from dense import mapper as dense_mapper
from torch import Tensor

from dit_booth.inject import Condition, PromptTokens
from strategies.token_replacement import Mapper, ReplaceSubject


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """``mapper``; every ``NAME.embeds`` under compat=videobooth; and by default where the released code is right."""
    names = sorted(outputs(tensors))
    if "mapper" in names:
        yield from mapper(tensors)
    for name in (n for n in names if n.endswith(".embeds")):
        case, stored = name.removesuffix(".embeds"), tensors[f"outputs.{name}"]
        prompt, words = released_prompt(tensors, case)
        replaced = ReplaceSubject("videobooth")(prompt, Condition(tokens=words))
        yield CaseResult(f"{name} compat=videobooth", worst(replaced.embeddings, stored))
        if released_is_right(tensors, case):
            prompt, words = true_prompt(tensors, case)
            replaced = ReplaceSubject()(prompt, Condition(tokens=words))
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


# ---- the subject's place in a prompt -------------------------------------------------------------------------------


def true_prompt(tensors: Tensors, case: str) -> tuple[PromptTokens, Tensor]:
    """The prompt as our tokenizer would mark it, and the image's words of each row."""
    ids, subjects = ids_and_subjects(tensors, case)
    spans = [
        marked(row, subject, occurrences(row, subject)) for row, subject in zip(ids, subjects, strict=True)
    ]
    return prompt_of(tensors, ids, spans)


def released_prompt(tensors: Tensors, case: str) -> tuple[PromptTokens, Tensor]:
    """The same with what the released code takes for the subject: the first place of its first token.

    Further places are for the strategy to find, and our tokenizer refuses a caption without its whole subject.
    """
    ids, subjects = ids_and_subjects(tensors, case)
    spans = []
    for row, subject in zip(ids, subjects, strict=True):
        places = [row.index(subject[0])] if subject[0] in row else []
        spans.append(marked(row, subject, places))
    return prompt_of(tensors, ids, spans)


def released_is_right(tensors: Tensors, case: str) -> bool:
    """Whether the first token stands at most once in each row, and then the whole subject after it."""
    ids, subjects = ids_and_subjects(tensors, case)
    return all(
        row.count(subject[0]) == len(occurrences(row, subject)) <= 1
        for row, subject in zip(ids, subjects, strict=True)
    )


def ids_and_subjects(tensors: Tensors, case: str) -> tuple[list[list[int]], list[list[int]]]:
    ids = tensors[f"inputs.{case}.ids"].tolist()
    return ids, [tensors[f"inputs.{case}.inj_index_{row}"].tolist() for row in range(len(ids))]


def occurrences(ids: list[int], subject: list[int]) -> list[int]:
    """Starts of the subject: true subsequence search, without overlaps."""
    starts: list[int] = []
    for at in range(len(ids)):
        free = not starts or at >= starts[-1] + len(subject)
        if free and ids[at : at + len(subject)] == subject:
            starts.append(at)
    return starts


def marked(ids: list[int], subject: list[int], starts: list[int]) -> list[int]:
    """k at the tokens of the k-th occurrence, else 0."""
    spans = [0] * len(ids)
    for k, start in enumerate(starts, 1):
        spans[start : start + len(subject)] = [k] * len(subject)
    return spans[: len(ids)]


def prompt_of(tensors: Tensors, ids: list[list[int]], spans: list[list[int]]) -> tuple[PromptTokens, Tensor]:
    rows = torch.tensor(ids)
    words = tensors["inputs.inj_embedding"][: len(ids)]
    return PromptTokens(tensors["inputs.table"][rows], rows, torch.tensor(spans)), words
