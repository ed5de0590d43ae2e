"""Token ids, the subject's spans, and the folded vocabulary."""

import pytest
import torch

from dit_booth.data.toyworld import world as toyworld
from dit_booth.data.toyworld.shapes import SHAPES, TEXTURES
from dit_booth.models.clip.tokenizer import NULL_PROMPT, Tokenizer, bpe


def test_full_vocabulary_equals_transformers_padding():
    import open_clip

    captions = ["a jeep car is moving on the road", NULL_PROMPT, "Ünïcode & punctuation's 123!"]
    ids, reference = Tokenizer(77)(captions).ids, open_clip.tokenize(captions)
    ends = (reference == 49407).int().argmax(dim=1, keepdim=True)
    assert torch.equal(ids, torch.where(torch.arange(77) > ends, 49407, reference))
    long = ["dog " * 100]
    assert torch.equal(Tokenizer(77)(long).ids, open_clip.tokenize(long))


@pytest.mark.parametrize(
    ("caption", "subject", "spans"),
    [
        ("a dog runs", "dog", [0, 0, 1, 0, 0]),
        ("a Dog and a dog", "dog", [0, 0, 1, 0, 0, 2]),
        ("dog", "dog", [0, 1, 0]),
        ("a snowman and a man", "man", [0, 0, 0, 0, 0, 1]),
        ("a teddy bear, a bear", "teddy bear", [0, 0, 1, 1, 0, 0, 0]),
        ("dog dog dog", "dog dog", [0, 1, 1, 0]),
        ("a checkered ring", "checkered", [0, 0, 1, 1, 0]),
        ("no subject here", None, [0, 0, 0, 0]),
    ],
)
def test_spans(caption, subject, spans):
    found = Tokenizer(24, 2048)([caption], [subject]).spans[0].tolist()
    assert found == spans + [0] * (24 - len(spans))


def test_spans_beyond_the_context_are_cut():
    tokenizer = Tokenizer(8, 2048)
    assert tokenizer(["a dog a a a dog a"], ["dog"]).spans.tolist() == [[0, 0, 1, 0, 0, 0, 2, 0]]
    assert tokenizer(["a dog a a a a dog"], ["dog"]).spans.tolist() == [[0, 0, 1, 0, 0, 0, 0, 0]]
    assert tokenizer(["a dog a a a a dog"]).ids[0, -1] == tokenizer.end
    with pytest.raises(ValueError, match=r"'dog' stands beyond the 6 tokens.*shorten the caption"):
        tokenizer(["a a a a a a dog"], ["dog"])


def test_the_subjects_own_tokens_are_handed_on():
    tokenizer = Tokenizer(24, 2048)
    polar, bear, dog = tokenizer(["polar bear dog"]).ids[0, 1:4].tolist()
    captions = ["a polar bear", "a dog", "a cat"]
    assert tokenizer(captions, ["Polar bear", "dog", None]).subjects.tolist() == [
        [polar, bear],
        [dog, -1],
        [-1, -1],
    ]
    assert tokenizer(captions).subjects.shape == (3, 0)
    one = tokenizer(captions, ["polar bear", "dog", None]).each(lambda y: y[1:2])
    assert one.subjects.tolist() == [[dog, -1]] and one.ids.shape == one.spans.shape == (1, 24)


def test_the_first_token_may_suffice():
    """The released VideoBooth asks for no more; the marks are of whole subjects all the same."""
    tokenizer = Tokenizer(8, 2048)
    asks = {"first_token_suffices": True}
    for caption, spans in (
        ("two polar bears", [0] * 8),
        ("a a a a a polar bear", [0] * 8),  # the last one's second token is cut
        ("polar night, polar bear", [0, 0, 0, 0, 1, 1, 0, 0]),
    ):
        assert tokenizer([caption], ["polar bear"], **asks).spans.tolist() == [spans]
    for caption in ("two polar bears", "a a a a a polar bear"):
        with pytest.raises(ValueError, match=r"subject 'polar bear' (is not in|stands beyond)"):
            tokenizer([caption], ["polar bear"])
    checkerboard = tokenizer(["a checkerboard"], ["checkered"], **asks)
    assert checkerboard.ids[0, 2] == checkerboard.subjects[0, 0], "the token is not a whole word"


@pytest.mark.parametrize("subject", ["polar bear", "bears", "", "  "])
def test_without_even_the_first_token_it_is_an_error(subject):
    words = rf"not even the first token '{subject[:5].strip()}' of subject '{subject}' is in caption 'a bear'"
    with pytest.raises(ValueError, match=words):
        Tokenizer(24, 2048)(["a bear"], [subject], first_token_suffices=True)
    with pytest.raises(ValueError, match=r"'polar bear' stands beyond the 6 tokens.*shorten the caption"):
        Tokenizer(8, 2048)(["a a a a a a polar bear"], ["polar bear"], first_token_suffices=True)


@pytest.mark.parametrize("subject", ["cat", "do", "dog runs fast", "", "  "])
def test_a_caption_without_its_subject_is_an_error(subject):
    with pytest.raises(ValueError, match=rf"subject '{subject}' is not in caption 'a dog runs'.*change one"):
        Tokenizer(24, 2048)(["a dog runs"], [subject])


def test_subjects_and_captions_must_pair():
    with pytest.raises(ValueError, match=r"2 captions but 1 subjects"):
        Tokenizer(24, 2048)(["a", "b"], [None])
    with pytest.raises(ValueError, match=r"vocab_size = 100 must lie in 514\.\.49408"):
        Tokenizer(24, 100)
    assert Tokenizer(24, 2048)([]).ids.shape == (0, 24)


def test_the_toyworlds_words_do_not_share_a_row():
    phrases = [
        *toyworld.COLOURS,
        *SHAPES,
        *TEXTURES,
        *toyworld.MOTIONS.values(),
        NULL_PROMPT,
        "a an and plain",
    ]
    phrases += [words for _, words in toyworld.BACKGROUNDS.values()]
    tokens = {token for phrase in phrases for token in bpe().encode(phrase)}
    tokenizer = Tokenizer(24, 2048)
    assert len({tokenizer.fold(token) for token in tokens}) == len(tokens) > 40
    rows = {tokenizer.fold(token) for token in range(49406)}
    assert rows == set(range(2046)), "begin and end keep their own rows"
