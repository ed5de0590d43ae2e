"""CLIP as transformers stores it, in open_clip: the same hidden states, and folders that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from torch import Tensor

from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import ImageEncoder, TextEncoder, build_clip
from dit_booth.models.clip.weights import build_clip_model
from dit_booth.models.upstream.clip import from_transformers, to_transformers

torch.set_num_threads(1)
PRECISIONS = [(torch.float64, 1e-9), (torch.float32, 2e-5)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As openai/clip-vit-large-patch14 is stored, with the sizes of our tiny CLIP."""
    official.write_transformers(tmp_path, official.randomised(official.clip_model()), "")
    return tmp_path


def compare(text: TextEncoder, image: ImageEncoder, oracle: Any, tolerance: float, layers: list[int]) -> None:
    """Text states, pooled text, all five image states, and the image's embedding."""
    dtype = text.text_projection.dtype
    prompt = text.tokenize(["a red dog runs on grass", "None", "one " * 40])
    generator = torch.Generator().manual_seed(3)
    picture = torch.rand(2, 3, *image.visual.image_size, dtype=dtype, generator=generator) * 2 - 1
    with torch.no_grad():
        ours, seen = text(prompt), image(picture)
        words = oracle.text_model(input_ids=prompt.ids)
        vision = oracle.vision_model(pixel_values=image.preprocess(picture), output_hidden_states=True)
        pooled = oracle.text_projection(words.pooler_output), oracle.visual_projection(vision.pooler_output)
    assert list(image.layers) == [len(oracle.vision_model.encoder.layers), *layers]
    states = [vision.last_hidden_state, *(vision.hidden_states[layer] for layer in layers)]
    pairs: list[tuple[Tensor, Tensor]] = [
        (ours.tokens, words.last_hidden_state),
        (ours.pooled, pooled[0]),
        (seen.embedding, pooled[1]),
        *zip(seen.states, states, strict=True),
    ]
    for number, (found, expected) in enumerate(pairs):
        assert expected.abs().max() > 0.1
        assert (found - expected).abs().max() <= tolerance, number


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_a_tower_as_deep_as_vit_l_14(dtype: torch.dtype, tolerance: float) -> None:
    """VideoBooth's layers: the last of 24, 4, 8, 12 and 16; by the map alone."""
    import open_clip

    narrow = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2}
    text = {**official.TINY_TEXT, **narrow}
    vision = {**narrow, "num_hidden_layers": 24, "image_size": 16, "patch_size": 4}
    oracle = official.randomised(official.clip_model(text, vision, 24)).to(dtype)
    model = open_clip.CLIP(
        24,
        open_clip.CLIPVisionCfg(layers=24, width=32, head_width=16, patch_size=4, image_size=16),
        open_clip.CLIPTextCfg(context_length=24, vocab_size=2048, width=32, heads=2, layers=3),
        quick_gelu=True,
    ).to(dtype)
    model.load_state_dict(from_transformers(oracle.state_dict()), strict=True)
    model.eval().visual.image_mean = model.visual.image_std = (0.5, 0.5, 0.5)
    image = ImageEncoder(model)
    compare(TextEncoder(model), image, oracle, tolerance, [4, 8, 12, 16])
    states = image(torch.zeros(1, 3, 16, 16, dtype=dtype)).states
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(states) for b in states[:i]), (
        "five different ones"
    )
    back = to_transformers(model.state_dict())
    assert set(back) == set(oracle.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in oracle.state_dict().items())


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_a_folder_is_built_as_clip(folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    from transformers import CLIPModel

    oracle = CLIPModel.from_pretrained(folder).to(dtype).eval()
    text, image = (tower.to(dtype) for tower in build_clip(ClipConfig(pretrained=str(folder))))
    compare(text, image, oracle, tolerance, [1, 1, 2, 3])
    official.write_transformers(folder, oracle, "", safetensors=False)
    (folder / "model.safetensors").unlink()
    again, _ = build_clip(ClipConfig(pretrained=str(folder)))
    assert torch.equal(again.ln_final.weight.to(dtype), text.ln_final.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_config": {"num_attention_heads": 8}}, r"num_attention_heads is 8, clip\.model has 4"),
        ({"vision_config": {"num_attention_heads": 6}}, r"num_attention_heads is 6, clip\.model has 3"),
        ({"vision_config": {"hidden_act": "gelu"}}, r"hidden_act is gelu, clip\.model has quick_gelu"),
    ],
)
def test_what_shows_in_no_shape_is_compared(folder: Path, change: dict[str, Any], says: str) -> None:
    settings = json.loads((folder / "config.json").read_text())
    for tower, values in change.items():
        settings[tower] |= values
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rf"{says}; choose the clip\.model that it is"):
        build_clip_model(ClipConfig(pretrained=str(folder)))


def test_folders_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    where = ClipConfig(pretrained=str(folder))
    with pytest.raises(ValueError, match=r"num_attention_heads is 4, clip\.model has 8"):
        build_clip_model(ClipConfig(model="ViT-B-32-quickgelu", pretrained=str(folder)))
    state = {k: v for k, v in official.clip_model().state_dict().items() if k != "text_projection.weight"}
    torch.save({**state, "extra": torch.zeros(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 missing \(text_projection\); 1 unexpected \(extra\)"):
        build_clip_model(where)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors or .*pytorch_model\.bin"):
        build_clip_model(where)
    (folder / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    with pytest.raises(ValueError, match=r"holds \['CLIPTextModel'\], not a CLIPModel with both towers"):
        build_clip_model(where)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json does not exist: give a transformers folder"):
        build_clip_model(where)
