"""Wan is diffusers' `WanTransformer3DModel`: outputs, gradients, precision, times per frame; and what it refuses."""

from __future__ import annotations

from typing import Any

import official
import pytest
import torch
from einops import rearrange, repeat
from spies import worst
from torch import Tensor, nn

from dit_booth.models.clip.encoders import Text
from dit_booth.models.wan.model import VideoWan, WanConfig

torch.set_num_threads(1)
TEXT = 512  # diffusers cuts image from text tokens there
IMAGE = {"image_dim": 20, "added_kv_proj_dim": 32, "in_channels": 9}
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "no norm before the text": {"cross_attn_norm": False},
    "image": IMAGE,
    "heads of 24": {"attention_head_dim": 24, "num_attention_heads": 1},
}


def config(**upstream: Any) -> WanConfig:
    """The options of a network of ours for diffusers' settings."""
    settings = {**official.TINY_WAN, **upstream}
    return WanConfig(
        depth=settings["num_layers"],
        hidden=settings["num_attention_heads"] * settings["attention_head_dim"],
        heads=settings["num_attention_heads"],
        ffn=settings["ffn_dim"],
        cross_attn_norm=settings.get("cross_attn_norm", True),
        image_dim=settings.get("image_dim", 0),
        condition_channels=settings["in_channels"] - settings["out_channels"],
    )


def pair(dtype: torch.dtype = torch.float32, **upstream: Any) -> tuple[nn.Module, VideoWan]:
    """Return diffusers' network, all its parameters random, and ours with the same ones."""
    theirs = official.randomised(official.wan(**upstream)).to(dtype)
    ours = VideoWan(config(**upstream), channels=4, text_dim=24).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


class Inputs:
    """Two videos of three frames, higher than wide, with 512 text tokens and (for `image`) image states."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, channels: int = 4, image: bool = False) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.x, self.tokens = draw(2, 3, channels, 6, 4), draw(2, TEXT, 24)
        self.image = draw(2, 7, 20) if image else None
        self.t = torch.tensor([996.5, 13.0])
        self.times = torch.tensor([[0.0, 500.25, 999.0], [250.0, 250.0, 3.0]])

    def theirs(self, model: nn.Module, t: Tensor) -> Tensor:
        """diffusers' prediction at timesteps (b,), or (b f), which it takes for every token."""
        if t.ndim == 2:
            t = repeat(t, "b f -> b (f n)", n=self.x[0, 0, 0].numel() // 4)
        x = rearrange(self.x, "b f c h w -> b c f h w")
        out: Tensor = model(x, t, self.tokens, encoder_hidden_states_image=self.image).sample
        return rearrange(out, "b c f h w -> b f c h w")

    def ours(self, model: VideoWan, t: Tensor) -> Tensor:
        out: Tensor = model(self.x, t, Text(self.tokens, self.tokens[:, 0]), image=self.image)
        return out


def inputs_for(kind: str, dtype: torch.dtype = torch.float32) -> Inputs:
    return Inputs(dtype, channels=KINDS[kind].get("in_channels", 4), image=kind == "image")


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_network(kind: str) -> None:
    (theirs, ours), given = pair(**KINDS[kind]), inputs_for(kind)
    for t in (given.t, given.times):
        expected = given.theirs(theirs, t)
        assert expected.abs().max() > 0.3
        assert worst(given.ours(ours, t), expected) <= 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_diffusers_network_in_float64_with_its_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers computes parts in float32 whatever the dtype: here it is made to compute them in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    (theirs, ours), given = pair(torch.float64, **KINDS[kind]), inputs_for(kind, torch.float64)
    for t in (given.t, given.times):
        outputs = given.theirs(theirs, t), given.ours(ours, t)
        assert worst(*outputs) <= 1e-9
        for model, out in zip((theirs, ours), outputs, strict=True):
            model.zero_grad()
            (out * given.x[:, :, :4]).sum().backward()
        expected = {name: p.grad for name, p in theirs.named_parameters()}
        for name, p in ours.named_parameters():
            assert p.grad is not None and worst(p.grad, expected[name]) <= 1e-9, name
