"""DiT's weights by their official names: to ours and back, into a video model, and from a pickle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from spies import worst
from torch import Tensor, nn

from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.pretrained import load_pretrained
from dit_booth.models.upstream.dit import from_official, infer_channels, infer_config, inflate, to_official
from dit_booth.models.weights import load_strictly

torch.set_num_threads(1)
SHAPE: dict[str, Any] = {"depth": 2, "hidden": 24, "heads": 2}
IMAGE = DiTConfig(**SHAPE, layout="image", plan="self", conditioning="class_label", classes=4)
WIDTHS = {"channels": 3, "text_dim": 5, "text_embed_dim": 6}


def randomised(dit: VideoDiT) -> VideoDiT:
    generator = torch.Generator().manual_seed(0)
    for p in dit.parameters():
        p.data.normal_(std=0.15, generator=generator)
    return dit


def official() -> dict[str, Tensor]:
    """A small DiT that predicts a variance, under the official names."""
    dit = randomised(VideoDiT(IMAGE, out_channels=6, **WIDTHS))
    return to_official(dit.state_dict(), height=4, width=4)


def image_model(state: dict[str, Tensor]) -> VideoDiT:
    ours = from_official(state)
    dit = VideoDiT(IMAGE, out_channels=6, **WIDTHS).double()
    load_strictly(dit, ours, "image")
    return dit


def inputs(frames: int = 3, side: int = 6) -> tuple[Tensor, Tensor, Text]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, frames, 3, side, side, generator=generator, dtype=torch.float64)
    tokens = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    return x, torch.tensor([30.0, 800.0]), Text(tokens, torch.randn(2, 6, generator=generator).double())


def test_names_go_there_and_back() -> None:
    state = official()
    ours = from_official(state)
    assert infer_config(ours, heads=2) == replace(IMAGE, head_text=True)
    assert infer_channels(ours) == (3, 6)
    back = to_official(ours, height=4, width=4)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("classes", [0, 4])
def test_latte_goes_there_and_back(classes: int) -> None:
    config = replace(IMAGE, layout="interleaved", plan="self", classes=classes)
    state = to_official(randomised(VideoDiT(config, **WIDTHS)).state_dict(), height=4, width=4, frames=3)
    assert ("y_embedder.embedding_table.weight" in state) == bool(classes), "a table of no class is none"
    ours = from_official(state)
    assert infer_config(ours, heads=2) == config
    back = to_official(ours, height=4, width=4, frames=3)
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)
    assert state["temp_embed"].shape == (1, 3, 24)


@pytest.mark.parametrize("name", ["pos_embed", "temp_embed"])
def test_positions_of_another_kind_are_refused(name: str) -> None:
    state = official()
    learned = torch.randn(1, 16, 24)
    with pytest.raises(ValueError, match=rf"{name} \(1, 16, 24\) is not the fixed sin-cos embedding"):
        from_official({**state, name: learned})


def test_the_heads_of_an_unknown_size_must_be_given() -> None:
    with pytest.raises(ValueError, match="no DiT size has depth 2 and width 24; give the number of heads"):
        infer_config(from_official(official()))


# ---- inflation ---------------------------------------------------------------------------------------------

VIDEO = {
    "self": DiTConfig(**SHAPE, plan="self"),
    "first": DiTConfig(**SHAPE, plan="first"),
    "first+previous": DiTConfig(**SHAPE),
    "cross_attention": DiTConfig(**SHAPE, conditioning="cross_attention"),
    "conv": DiTConfig(**SHAPE, conv=True),
    "image": DiTConfig(**SHAPE, layout="image", plan="self"),
}


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_frame_0_of_the_inflated_model_is_the_image_model_at_the_null_class(name: str) -> None:
    state, config = official(), VIDEO[name]
    video = randomised(VideoDiT(config, **WIDTHS))
    load_strictly(video, inflate(from_official(state), VideoDiT(config, **WIDTHS).state_dict(), config), name)
    video.double()
    x, t, text = inputs()
    null = torch.full((2,), IMAGE.classes)
    image = image_model(state)
    expected = image(x[:, :1], t, null)[:, :, :3]
    out = video(x, t, text)
    assert out.shape == x.shape
    assert expected.abs().max() > 0.5
    # The maps work in float32, as the files are; the models here compute in float64.
    assert worst(out[:, :1], expected) < 2e-6
    assert worst(image(x[:, :1], t, torch.zeros(2, dtype=torch.long))[:, :, :3], expected) > 1e-2, (
        "classes matter"
    )
    if name in ("self", "image"):
        frames = image(x, t, null)[:, :, :3]
        same = worst(out, frames) < 2e-6
        assert same == (name == "image"), (
            "later frames have positions of their own, unless every frame is an image"
        )


def test_text_and_time_train_from_the_inflated_start() -> None:
    config = VIDEO["first+previous"]
    video = VideoDiT(config, **WIDTHS)
    load_strictly(video, inflate(from_official(official()), video.state_dict(), config), "inflated")
    x, t, text = inputs()
    loss = video(x.float(), t, Text(text.tokens.float(), text.pooled.float())).square().mean()
    loss.backward()
    assert video.text_embedder.weight.grad.abs().max() > 1e-6
    gates = video.blocks[0].modulation.linear.weight.grad[5 * 24 : 6 * 24]
    assert gates.abs().max() > 1e-8, "temporal attention's gate"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"layout": "interleaved"},
            r"dit\.layout is 'interleaved', which DiT's weights do not fit; use factorised",
        ),
        ({"conditioning": "adaln"}, r"dit\.conditioning is 'adaln'"),
        ({"positions": "rotary"}, r"dit\.positions is 'rotary'.*use sincos"),
        ({"mlp": "swiglu"}, r"dit\.mlp is 'swiglu'.*use gelu"),
        ({"qk_norm": True}, r"dit\.qk_norm is True"),
    ],
)
def test_options_that_the_weights_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    config = replace(VIDEO["first"], **change)
    with pytest.raises(ValueError, match=says):
        inflate(from_official(official()), VideoDiT(config, **WIDTHS).state_dict(), config)


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("averaged", [False, True])
def test_a_run_starts_from_the_official_pickle(tmp_path: Path, averaged: bool) -> None:
    """The release holds a bare state dict; a training checkpoint of the official code has averages under `ema`."""
    state, file = official(), tmp_path / "DiT.pt"
    torch.save({"model": {}, "ema": state} if averaged else state, file)
    dit = VideoDiT(VIDEO["first"], **WIDTHS)
    expected = inflate(from_official(state), dit.state_dict(), VIDEO["first"])
    assert load_pretrained(dit, nn.Module(), str(file), "dit") == {}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dit.state_dict().items())


def test_another_size_is_an_error_that_lists_what_differs(tmp_path: Path) -> None:
    torch.save(official(), tmp_path / "DiT.pt")
    dit = VideoDiT(replace(VIDEO["first"], depth=3), **WIDTHS)
    with pytest.raises(ValueError, match=r"DiT\.pt for the dit backbone"):
        load_pretrained(dit, nn.Module(), str(tmp_path / "DiT.pt"), "dit")
    with pytest.raises(ValueError, match="these are DiT's weights; set --backbone dit"):
        load_pretrained(nn.Linear(1, 1), nn.Module(), str(tmp_path / "DiT.pt"), "unet")
