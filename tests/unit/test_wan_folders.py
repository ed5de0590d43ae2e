"""Wan's folders: diffusers' and the original's load strictly, export is the identity; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_booth.models.dit.model import DiTConfig, VideoDiT
from dit_booth.models.pretrained import load_pretrained
from dit_booth.models.upstream.wan import find_wan_mismatches, from_original
from dit_booth.models.wan.model import VideoWan, WanConfig

torch.set_num_threads(1)
STEM = "diffusion_pytorch_model"
IMAGE = {"image_dim": 20, "added_kv_proj_dim": 32, "in_channels": 9}
TINY: dict[str, Any] = {"depth": 2, "hidden": 32, "heads": 2, "ffn": 40}


def network(**more: Any) -> VideoWan:
    return VideoWan(WanConfig(**{**TINY, **more}), channels=4, text_dim=24)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def load(net: nn.Module, folder: Path) -> None:
    load_pretrained(net, nn.Module(), str(folder), "wan")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """diffusers' network."""
    model: nn.Module = official.randomised(official.wan())
    return model


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A pipeline's folder whose transformer lies in several shards."""
    folder = tmp_path_factory.mktemp("wan")
    model.save_pretrained(folder / "transformer", max_shard_size="40KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    """The transformer's folder, to be damaged."""
    return Path(shutil.copytree(sharded / "transformer", tmp_path / "transformer"))


def test_shards_load_strictly_and_exporting_is_the_identity(
    sharded: Path, copied: Path, model: nn.Module
) -> None:
    for folder in (sharded, sharded / "transformer"):
        net = network()
        load(net, folder)
        assert same(net.state_dict(), model.state_dict())
    for file in copied.glob("*.safetensors"):
        save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    load(net, copied)
    assert net.proj_out.weight.dtype == torch.float32
    assert same(net.state_dict(), {k: v.bfloat16().float() for k, v in model.state_dict().items()})


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_originals_folder_loads(kind: str, tmp_path: Path) -> None:
    """Its names are those that diffusers' own converter turns into its own."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    more = IMAGE if kind == "image" else {}
    state = official.randomised(official.wan(**more)).state_dict()
    original = official.original_wan(state)
    assert same(convert_wan_transformer_to_diffusers(dict(original)), state)
    assert list(from_original(original)) == list(state)
    swapped = "blocks.1.norm3.weight", "blocks.1.norm2.weight"
    assert torch.equal(original[swapped[0]], state[swapped[1]])

    sizes = {"dim": 32, "num_heads": 2, "num_layers": 2, "ffn_dim": 40, "out_dim": 4, "text_dim": 24}
    settings = {"_class_name": "WanModel", "in_dim": more.get("in_channels", 4), **sizes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(original, tmp_path / f"{STEM}.safetensors")
    if kind == "image":  # the original names no width of the image states: it is CLIP's
        with pytest.raises(ValueError, match=r"image_dim is 1280, wan.image_dim is 20"):
            load(network(image_dim=20, condition_channels=5), tmp_path)
        return
    net = network()
    load(net, tmp_path)
    assert same(net.state_dict(), state)


def test_one_file_with_the_originals_names_loads(model: nn.Module, tmp_path: Path) -> None:
    """As Phantom-Wan's 1.3B is released: a pickle of tensors."""
    original = official.original_wan(model.state_dict())
    torch.save(original, tmp_path / "phantom.pth")
    save_file(original, tmp_path / "phantom.safetensors")
    for name in ("phantom.pth", "phantom.safetensors"):
        net = network()
        load(net, tmp_path / name)
        assert same(net.state_dict(), model.state_dict())
    original.pop("head.head.bias")
    torch.save(original, tmp_path / "phantom.pth")
    with pytest.raises(ValueError, match=r"1 missing \(proj_out\.bias\)"):
        load(net, tmp_path / "phantom.pth")


# ---- what is refused ---------------------------------------------------------------------------------------


def test_a_setting_that_differs_is_named_with_its_fix(sharded: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"config\.json: the folder has depth 2, hidden 32, heads 2, ffn 40, the network depth 5, .*"
        r"set --wan\.depth 2 --wan\.hidden 32 --wan\.heads 2 --wan\.ffn 40",
    ):
        load(VideoWan(WanConfig(), channels=4, text_dim=24), sharded)
    with pytest.raises(ValueError, match=r"image_dim is 0, wan\.image_dim is 20: these are text-to-video"):
        load(network(image_dim=20), sharded)
    with pytest.raises(
        ValueError, match=r"in_channels - out_channels is 0, .*set --wan\.condition-channels 0"
    ):
        load(network(condition_channels=5), sharded)
    settings = json.loads((sharded / "transformer" / "config.json").read_text())
    released = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960}
    for change, says in (
        (released, "set --wan.size 1.3b"),
        ({"patch_size": [1, 4, 4]}, "set --wan.patch 4"),
        ({"patch_size": [2, 2, 2]}, "a square: it cannot be loaded"),
        ({"cross_attn_norm": False}, "set --wan.cross-attn-norm False"),
        ({"image_dim": 1280, "added_kv_proj_dim": 32}, "these are image-to-video weights"),
        ({"in_channels": 9}, "set --wan.condition-channels 5"),
        ({"out_channels": 16, "in_channels": 16}, "choose its autoencoder"),
        ({"text_dim": 4096}, "choose its text encoder"),
        ({"eps": 1e-5}, "eps is 1e-05, this network has 1e-06"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len is 514, this network has None: it cannot be loaded"),
    ):
        (found, *_) = find_wan_mismatches({**settings, **change}, WanConfig(**TINY), channels=4, text_dim=24)
        assert says in found
    assert find_wan_mismatches(settings, WanConfig(**TINY), channels=4, text_dim=24) == []


def test_folders_of_other_models_are_refused(sharded: Path, copied: Path) -> None:
    with pytest.raises(ValueError, match=r"is a Wan folder; set --backbone wan"):
        load(VideoDiT(DiTConfig(), channels=4, text_dim=24, text_embed_dim=8), sharded)
    (copied / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')
    with pytest.raises(
        ValueError, match=r"is of a CogVideoXTransformer3DModel; give a folder of Stable Diff"
    ):
        load(network(), copied)
    (copied / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    with pytest.raises(ValueError, match=r"holds a U-Net; set --backbone unet"):
        load(network(), copied)
    with pytest.raises(ValueError, match=r"no wan weights are embedded; use none"):
        load_pretrained(network(), nn.Module(), "embedded", "wan")


def _lose(folder: Path) -> None:
    next(folder.glob("*-00002-*")).unlink()


def _cut(folder: Path) -> None:
    file = next(folder.glob("*-00002-*"))
    file.write_bytes(file.read_bytes()[:100])


def _forget(folder: Path) -> None:
    file = next(folder.glob("*-00002-*"))
    save_file(dict(list(load_file(file).items())[1:]), file)


def _rewrite(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = folder / f"{STEM}.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is lost": (_lose, r"index\.json names .*-00002-.*, which is not there; copy all shards"),
    "a shard is cut off": (_cut, r"-00002-.* cannot be read as safetensors"),
    "a tensor is not where the index says": (_forget, r"-00002-.* lacks .*, which .*index\.json says"),
    "a shard lies outside": (
        lambda folder: _rewrite(folder, lambda map_: map_.update({"proj_out.weight": "../x.safetensors"})),
        r"'\.\./x\.safetensors' leads out of",
    ),
    "a tensor is missing": (
        lambda folder: _rewrite(folder, lambda map_: map_.pop("proj_out.weight")),
        r"1 missing \(proj_out\.weight\)",
    ),
    "nothing is there": (
        lambda folder: (folder / f"{STEM}.safetensors.index.json").unlink(),
        rf"has no {STEM}\.safetensors or {STEM}\.safetensors\.index\.json",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused(case: str, copied: Path) -> None:
    damage, says = DAMAGES[case]
    damage(copied)
    with pytest.raises(ValueError, match=says):
        load(network(), copied)
