"""The official files' names and shapes at full size are those of our models, through the maps (manifests/make.py)."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcat, KVConcatConfig
from dit_booth.strategies.token_replacement import TokenReplacement, TokenReplacementConfig
from torch import Tensor, nn

from dit_booth.inject import Site, Sites
from dit_booth.models.clip.encoders import TextEncoder
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.models.upstream.clip import from_transformers, to_transformers
from dit_booth.models.upstream.stable_diffusion import find_unet_mismatches, from_diffusers, to_diffusers
from dit_booth.models.upstream.videobooth import from_videobooth, to_videobooth
from dit_booth.strategy import Strategies

Shapes = dict[str, tuple[int, ...]]
PARAMETERS = {
    "sd14_unet": (686, 859_520_964),
    "videobooth_unet": (978, 1_042_210_564),
    "videobooth_mapper": (196, 97_635_840),
    "clip_vit_l14": (590, 427_616_513),
}


def manifest(name: str) -> dict[str, Tensor]:
    """The tensors of an official file, without values."""
    lines = gzip.decompress((Path(__file__).parent / "manifests" / f"{name}.txt.gz").read_bytes()).decode()
    pairs = [line.split(" ") for line in lines.splitlines()]
    return {key: torch.empty([int(n) for n in shape.split("x") if n], device="meta") for key, shape in pairs}


def shapes(state: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@cache
def unet(watermark: bool) -> VideoUNet:
    with torch.device("meta"):
        return VideoUNet(UNetConfig(watermark=watermark))


@cache
def strategies() -> Strategies:
    words = Site(name="text.prompt", port="prompt", role="words", dim=768)
    sites = Sites((words, *unet(True).sites()), 1024, 768, 4, 16)
    with torch.device("meta"):
        parts = {
            "token_replacement": TokenReplacement(TokenReplacementConfig(), sites),
            "kv_concat": KVConcat(KVConcatConfig(), sites),
        }
        return Strategies(parts)


@cache
def clip() -> nn.Module:
    import open_clip

    with torch.device("meta"):
        return open_clip.CLIP(**open_clip.get_model_config("ViT-L-14-quickgelu"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_manifests_are_whole(name: str) -> None:
    state = manifest(name)
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == PARAMETERS[name]


@pytest.mark.parametrize("watermark", [False, True])
def test_the_unet_of_stable_diffusion(watermark: bool) -> None:
    own, image = unet(watermark).state_dict(), manifest("sd14_unet")
    assert shapes(from_diffusers(image, own)) == shapes(own)
    assert shapes(to_diffusers(own)) == shapes(image)


def test_the_configuration_of_stable_diffusion_is_the_default() -> None:
    """``unet/config.json`` of CompVis/stable-diffusion-v1-4, as far as it is not diffusers' default."""
    settings = {
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    assert find_unet_mismatches(settings, UNetConfig()) == []


def test_the_unet_of_videobooth() -> None:
    split = from_videobooth(manifest("videobooth_unet"))
    assert split.strategy == {}
    assert shapes(split.backbone) == shapes(unet(True).state_dict())


def test_the_mapper_of_videobooth() -> None:
    split = from_videobooth(manifest("videobooth_mapper"))
    assert split.backbone == {}
    assert shapes(split.strategy) == shapes(strategies().state_dict())


def test_both_files_are_exported_as_they_were() -> None:
    whole = nn.ModuleDict({"backbone": unet(True), "strategy": strategies()}).state_dict()
    files = to_videobooth(whole)
    assert shapes(files["ema_unet"]) == shapes(manifest("videobooth_unet"))
    assert shapes(files["ema"]) == shapes(manifest("videobooth_mapper"))
    with_taps = to_videobooth(whole, taps_in_unet=True)["ema_unet"]
    split = from_videobooth(with_taps)
    assert shapes(split.backbone) == shapes(files["ema_unet"])
    taps = {name: s for name, s in shapes(strategies().state_dict()).items() if ".taps." in name}
    assert shapes(split.strategy) == taps and len(taps) == 96


def test_both_towers_of_clip() -> None:
    theirs, ours = manifest("clip_vit_l14"), clip().state_dict()
    assert shapes(from_transformers(theirs)) == shapes(ours)
    assert shapes(to_transformers(ours)) == shapes(theirs)


def test_the_text_encoder_of_stable_diffusion() -> None:
    """It has no projection; its names have a prefix, or, as transformers 5 writes them, none."""
    text = shapes(TextEncoder(clip()).state_dict())
    del text["text_projection"]
    tower = {k: v for k, v in manifest("clip_vit_l14").items() if k.startswith("text_model.")}
    assert shapes(from_transformers(tower)) == text
    bare = {name.removeprefix("text_model."): tensor for name, tensor in tower.items()}
    assert shapes(from_transformers(bare)) == text
