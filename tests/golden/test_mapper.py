"""The mapper and the replacement of the subject's tokens, against VideoBooth's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dit_booth.strategies.token_replacement import ReplaceSubject
from files import load
from mapper_cases import built_mapper, prompt_of, released_is_right, states_of, tokens_of
from torch import Tensor

from dit_booth.inject import PromptTokens

torch.set_num_threads(1)
INFO, TENSORS = load("videobooth_mapper")
CASES = [k.split(".")[1] for k in TENSORS if k.endswith(".embeds")]
DIFFERENT = {  # what we make of the prompts at which the released code misbehaves
    # The original writes a second occurrence at its unshifted place: it overwrites 8 9 10 11 here,
    "twice_far": "58 3 *0 *1 *2 *3 *4 5 6 7 8 9 10 11 *0 *1 *2 *3 *4 12 13",
    # cuts the first occurrence off after two tokens here,
    "twice_near": "58 3 *0 *1 *2 *3 *4 5 *0 *1 *2 *3 *4 12 13 14",
    # loses 7 8 9 here,
    "twice_two_token": "58 3 *0 *1 *2 *3 *4 5 6 7 8 9 *0 *1 *2 *3 *4 12 13",
    # and takes the first token of a two-token subject for the subject.
    "first_token_only_matches": "58 3 40 5 6 7 8 9 10",
}
END = 59


def run(case: str) -> tuple[PromptTokens, Tensor]:
    prompt, words = prompt_of(TENSORS, case)
    return ReplaceSubject()(prompt, words), words


def spell(text: str, words: Tensor) -> Tensor:
    """The embeddings (77 d) that a line of the golden description spells; the end token fills the rest."""
    tokens = text.split()
    rows = [words[int(t[1:])] if t.startswith("*") else TENSORS["inputs.table"][int(t)] for t in tokens]
    return torch.stack(rows + [TENSORS["inputs.table"][END]] * (77 - len(rows)))


@torch.no_grad()
def test_the_order_of_the_states_matters() -> None:
    states = states_of(TENSORS)
    swapped = built_mapper(TENSORS)(states[::-1])
    assert (swapped - TENSORS["outputs.mapper"]).abs().max() > 1e-2


def test_rows_of_a_batch_use_their_own_image() -> None:
    out, words = run("batch2_mixed")
    assert torch.equal(out.embeddings[0, 3:8], words[0])
    assert torch.equal(out.embeddings[1, 1:6], words[1])
    assert not torch.equal(words[0], words[1])


@pytest.mark.parametrize(("case", "ours"), DIFFERENT.items())
def test_where_ours_differs_by_design(case: str, ours: str) -> None:
    out, words = run(case)
    expected = spell(ours, words[0])
    assert torch.equal(out.embeddings[0], expected)
    assert not torch.equal(TENSORS[f"outputs.{case}.embeds"][0], expected), (
        "else there would be no difference"
    )


@pytest.mark.parametrize("case", CASES)
def test_the_default_differs_from_the_released_code_in_those_cases_only(case: str) -> None:
    assert released_is_right(TENSORS, case) == (case not in DIFFERENT)
    out, _ = run(case)
    assert torch.equal(out.embeddings, TENSORS[f"outputs.{case}.embeds"]) == (case not in DIFFERENT)


def test_compat_finds_the_first_token_at_any_other_place_too() -> None:
    """A whole occurrence first, then the first token alone: the token after it is lost, as in the released code."""
    _, words = prompt_of(TENSORS, "two_token")
    prompt = tokens_of(TENSORS, [[58, 40, 41, 5, 40, 6, 7] + [END] * 70], [[40, 41]])
    out = ReplaceSubject("videobooth")(prompt, words)
    assert torch.equal(out.embeddings[0], spell("58 *0 *1 *2 *0 *1 *2 *3 *4 7", words[0]))
    assert out.ids[0, :11].tolist() == [58, *[-1] * 8, 7, END]
    assert out.spans[0, :11].tolist() == [0, *[1] * 8, 0, 0]
    sensible = ReplaceSubject()(prompt, words)
    assert torch.equal(sensible.embeddings[0], spell("58 *0 *1 *2 *3 *4 5 40 6 7", words[0]))


def test_compat_without_a_subject_or_an_image_changes_nothing() -> None:
    prompt, words = prompt_of(TENSORS, "absent")
    out = ReplaceSubject("videobooth")(prompt, words)
    assert torch.equal(out.embeddings, prompt.embeddings) and not out.spans.any()
    assert ReplaceSubject("videobooth")(prompt, None) is prompt
    with pytest.raises(KeyError):
        ReplaceSubject("VideoBooth")  # type: ignore[arg-type]


def test_the_spelling_is_the_originals() -> None:
    """`spell` reads the golden description as its outputs were written (cases without an ellipsis inside)."""
    for case in ("one_token", "twice_far", "twice_near"):
        line = INFO["result"][case][0].split(" ...")[0]
        _, words = prompt_of(TENSORS, case)
        assert torch.equal(spell(line, words[0]), TENSORS[f"outputs.{case}.embeds"][0])


def test_compat_leaves_the_tail_of_a_subject_that_runs_past_the_end() -> None:
    """Seven tokens from the sixth last position on: there is no tail to move up, and the last token stays."""
    _, words = prompt_of(TENSORS, "seven_token")
    long = list(range(40, 47))
    prompt = tokens_of(TENSORS, [[58, *[3] * 70, *long[:5], END]], [long])
    out = ReplaceSubject("videobooth")(prompt, words)
    assert torch.equal(out.embeddings[0], spell(" ".join(["58", *["3"] * 70, "*0 *1 *2 *3 *4"]), words[0]))


@pytest.mark.parametrize("case", CASES)
def test_ids_and_spans_move_with_the_embeddings(case: str) -> None:
    prompt, _ = prompt_of(TENSORS, case)
    out, words = run(case)
    for row in range(len(out.ids)):
        for position, token in enumerate(out.ids[row].tolist()):
            here = out.embeddings[row, position]
            if token >= 0:
                assert torch.equal(here, TENSORS["inputs.table"][token])
                assert out.spans[row, position] == 0
            else:
                assert any(torch.equal(here, word) for word in words[row])
                assert out.spans[row, position] == 1
    assert bool((out.ids == -1).any()) == bool(prompt.spans.any())


def test_without_an_image_nothing_is_replaced() -> None:
    prompt, _ = prompt_of(TENSORS, "one_token")
    assert ReplaceSubject()(prompt, None) is prompt


def test_adjacent_occurrences_are_two() -> None:
    _, words = prompt_of(TENSORS, "one_token")
    prompt = tokens_of(TENSORS, [[58, 40, 40, 5] + [END] * 73], [[40]])
    out = ReplaceSubject()(prompt, words)
    assert torch.equal(out.embeddings[0], spell("58 *0 *1 *2 *3 *4 *0 *1 *2 *3 *4 5", words[0]))


def test_gradients_reach_the_words_and_the_tokens() -> None:
    prompt, words = prompt_of(TENSORS, "two_token")
    words, table = words.clone().requires_grad_(), prompt.embeddings.clone().requires_grad_()
    out = ReplaceSubject()(replace(prompt, embeddings=table), words)
    out.embeddings.sum().backward()
    assert torch.equal(words.grad, torch.ones_like(words))
    assert not table.grad[0, prompt.spans[0] > 0].any(), "the subject's own embedding is gone"
    assert table.grad[0, 2].eq(1).all()
