"""umT5 as text encoder: WanPipeline's own states, subjects in prompts, the port, what is kept, and what is refused."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import wan_pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_booth.inject import Injection, PromptTokens
from dit_booth.models.text.config import TextConfig
from dit_booth.models.text.tokenizer import clean, occurrences
from dit_booth.models.text.umt5 import KEPT, Umt5TextEncoder

torch.set_num_threads(1)
LENGTH = 24
CAPTIONS = ["a dog runs on the grass", "", "  a red &amp;amp; polar\n bear , qzx ", "dog " * 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umt5")
    wan_pipeline.tokenizer().save_pretrained(folder / "tokenizer")
    wan_pipeline.text_encoder().save_pretrained(folder / "text_encoder")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> TextConfig:
    return TextConfig(kind="umt5", path=str(folder), length=LENGTH)


@pytest.fixture(scope="module")
def text(config: TextConfig) -> Umt5TextEncoder:
    return Umt5TextEncoder(config)


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers import WanPipeline

    parts = {"tokenizer": wan_pipeline.tokenizer(), "text_encoder": wan_pipeline.text_encoder()}
    return WanPipeline(**parts, vae=None, scheduler=None, transformer=None)


def test_states_are_those_of_wan_pipeline(text: Umt5TextEncoder, pipe: Any) -> None:
    expected, _ = pipe.encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=LENGTH, device="cpu"
    )
    prompt = text.tokenize(CAPTIONS)
    found = text(prompt)
    torch.testing.assert_close(found.tokens, expected, rtol=1e-5, atol=2e-6)
    for row, ids in enumerate(prompt.ids):
        there = ids != 0
        assert not found.tokens[row, ~there].any() and found.tokens[row, there].any(dim=1).all()
        torch.testing.assert_close(found.pooled[row], found.tokens[row, there].mean(0))
    assert found.pooled.shape == (4, text.embed_dim)


class Scale(nn.Module):
    """A tap on words."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, words: PromptTokens, image: object) -> PromptTokens:
        return replace(words, embeddings=words.embeddings * self.by)


def test_the_port_stands_before_the_encoder_and_gradients_reach_it(text: Umt5TextEncoder, pipe: Any) -> None:
    prompt, tap = text.tokenize(CAPTIONS[:3]), Scale(1.0)
    inject = Injection({"text.prompt": [(tap, None)]})
    torch.testing.assert_close(text(prompt, inject).tokens, text(prompt).tokens, rtol=1e-5, atol=2e-6)
    tap.by.data.fill_(0.5)
    expected = pipe.text_encoder(
        inputs_embeds=0.5 * pipe.text_encoder.shared(prompt.ids), attention_mask=prompt.ids != 0
    ).last_hidden_state
    found = text(prompt, inject).tokens
    torch.testing.assert_close(found, expected * (prompt.ids != 0)[..., None], rtol=1e-5, atol=2e-6)
    found.square().sum().backward()
    assert tap.by.grad is not None and tap.by.grad.abs() > 0
    assert not any(p.requires_grad for p in text.frozen.encoder(torch.device("cpu")).parameters())


def test_it_is_no_part_of_the_model_and_keeps_what_it_has_encoded(config: TextConfig) -> None:
    text = Umt5TextEncoder(config)
    assert text.frozen._encoder is None and not list(text.parameters()) and not text.state_dict()
    tokens = text(text.tokenize(["a dog"])).tokens
    text.frozen._encoder, text.frozen.config = None, replace(config, path="/nowhere")
    assert torch.equal(text(text.tokenize([" a  dog "])).tokens, tokens)
    text.keep(["a red dog"], [torch.full((4, text.width), 3.0)])
    found = text(text.tokenize(["a dog", "a red dog"])).tokens
    assert torch.equal(found[0], tokens[0]) and found[1, :4].eq(3).all() and not found[1, 4:].any()
    with pytest.raises(ValueError, match="'/nowhere', which does not exist"):
        text(text.tokenize(["a red bear"]))
    text.frozen.keep({(i,): tokens[0, :1] for i in range(2 * KEPT)})
    assert len(text.frozen.kept) == 2 * KEPT + 2, "a large batch, and those before it"
    text.frozen.keep({(-1,): tokens[0, :1]})
    assert len(text.frozen.kept) == KEPT + 1 and (0,) not in text.frozen.kept
    assert text.frozen.__deepcopy__({}) is text.frozen


def test_dtypes(config: TextConfig) -> None:
    half = Umt5TextEncoder(replace(config, dtype="bfloat16"))
    assert half(half.tokenize(["a dog"])).tokens.dtype == torch.float32, "that of the model"
    assert half.frozen.embed(torch.tensor([[1]])).dtype == torch.bfloat16
    assert half.to(torch.bfloat16)(half.tokenize(["a bear"])).pooled.dtype == torch.bfloat16


def pieces(text: Umt5TextEncoder, ids: Tensor, spans: Tensor, k: int) -> list[str]:
    return text.tokenizer.tokenizer.convert_ids_to_tokens(ids[spans == k].tolist())  # type: ignore[no-any-return]


def test_subjects_are_marked_as_whole_words(text: Umt5TextEncoder) -> None:
    caption = "The Polar  bear, a polar bear's box: no bearpolar bear"
    prompt = text.tokenize([caption, "a dog", "a zebra runs"], ["polar bear", None, "zebra"])
    ids, spans = prompt.ids[0], prompt.spans[0]
    assert pieces(text, ids, spans, 2) == ["▁polar", "▁bear"]
    assert len(pieces(text, ids, spans, 1)) > 0 and not (spans > 2).any()
    assert not prompt.spans[1].any()
    assert "".join(pieces(text, prompt.ids[2], prompt.spans[2], 1)) == "▁zebra"
    assert prompt.subjects.shape[0] == 3 and prompt.subjects[1].eq(-1).all()
    assert prompt.ids[1].tolist()[:3] == [prompt.ids[1, 0], prompt.ids[1, 1], 1], "the end token"


def test_places_of_a_subject() -> None:
    assert occurrences("a Dog, dogs, a dog's", "dog") == [(2, 5), (15, 18)]
    assert occurrences("一只猫在跑", "猫") == [(2, 3)]
    assert clean(" a&amp;lt;b \n c\u2019s ") == "a<b c's"


def test_a_subject_that_is_missing_or_cut(text: Umt5TextEncoder) -> None:
    with pytest.raises(ValueError, match="subject 'cat' is not in caption 'a dog runs'"):
        text.tokenize(["a dog runs"], ["cat"])
    with pytest.raises(ValueError, match=r"subject 'dog' stands beyond the 23 tokens.*raise text\.length"):
        text.tokenize(["red " * 30 + "dog"], ["dog"])
    with pytest.raises(ValueError, match="2 captions but 1 subjects"):
        text.tokenize(["a", "b"], ["a"])
    partly = text.tokenize(["a bear runs"], ["bear cat"], first_token_suffices=True)
    assert not partly.spans.any() and partly.subjects[0, 0] in partly.ids


def test_a_hub_name_is_read_from_the_cache(
    config: TextConfig, folder: Path, text: Umt5TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    entry, commit = tmp_path / "models--Wan-AI--small", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(folder, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    found = Umt5TextEncoder(replace(config, path="Wan-AI/small"))
    captions = ["a dog runs", "the grass"]
    assert torch.equal(found(found.tokenize(captions)).tokens, text(text.tokenize(captions)).tokens)
    with pytest.raises(ValueError, match=r"text\.path = 'Wan-AI/other'.* could not be"):
        Umt5TextEncoder(replace(config, path="Wan-AI/other"))


def test_what_is_not_there(config: TextConfig, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"text\.path is empty, and weights is no pipeline's folder"):
        Umt5TextEncoder(replace(config, path=""))
    with pytest.raises(ValueError, match=r"text_encoder/config\.json does not exist"):
        Umt5TextEncoder(replace(config, path=str(tmp_path)))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds bert, not umt5"):
        Umt5TextEncoder(replace(config, path=str(tmp_path)))
    text = (folder / "text_encoder" / "config.json").read_text()
    (tmp_path / "text_encoder" / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"text_encoder has no model\.safetensors or .*copy the weights there"
    ):
        Umt5TextEncoder(replace(config, path=str(tmp_path)))
    (tmp_path / "text_encoder" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as safetensors"):
        Umt5TextEncoder(replace(config, path=str(tmp_path)))
    state = load_file(folder / "text_encoder" / "model.safetensors")
    state.pop("encoder.final_layer_norm.weight")
    save_file(state, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"tokenizer/tokenizer_config\.json does not exist"):
        Umt5TextEncoder(replace(config, path=str(tmp_path)))
    broken = Umt5TextEncoder(config)
    broken.frozen.config = replace(config, path=str(tmp_path))
    with pytest.raises(ValueError, match=r"weights do not fit UMT5EncoderModel: .*final_layer_norm"):
        broken(broken.tokenize(["a dog"]))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the package transformers: pip install 'dit-booth\[wan\]'"):
        Umt5TextEncoder(config)
