"""Official files through the maps: inflated image models, VideoBooth's files to ours and back, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcat, KVConcatConfig
from dit_booth.strategies.token_replacement import TokenReplacement, TokenReplacementConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_booth.inject import Site, Sites
from dit_booth.models import weights
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import Text, TextEncoder, build_clip
from dit_booth.models.pretrained import load_pretrained, load_strategy_weights, read_strategy_weights
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.models.upstream.stable_diffusion import find_unet_mismatches, to_diffusers
from dit_booth.models.upstream.videobooth import from_videobooth, to_videobooth
from dit_booth.models.weights import read_pickle
from dit_booth.strategy import Strategies

torch.set_num_threads(1)
GOLDEN = [
    Path(__file__).parents[1] / "golden" / "data",
    Path(__file__).parents[3] / "shared" / "golden",
]
BOTH = ("token_replacement", "kv_concat")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def config(**more: Any) -> UNetConfig:
    """The U-Net of `official.TINY_UNET`."""
    sizes: dict[str, Any] = {"channels": (8, 16), "layers_per_block": 1, "heads": 2, "norm_groups": 4}
    return UNetConfig(**{**sizes, "text_dim": 128, "down_attention": (True, False), **more})


def strategies_of(unet: VideoUNet, names: tuple[str, ...] = BOTH, image_dim: int = 96) -> Strategies:
    words = Site(name="text.prompt", port="prompt", role="words", dim=unet.config.text_dim)
    sites = Sites((words, *unet.sites()), image_dim, 128, 4, 3)
    made = {
        "token_replacement": lambda: TokenReplacement(TokenReplacementConfig(), sites),
        "kv_concat": lambda: KVConcat(KVConcatConfig(), sites),
    }
    return Strategies({name: made[name]() for name in names})


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return build_clip(ClipConfig(pretrained="none"))[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---- Stable Diffusion ----


@torch.no_grad()
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("size", [(8, 8), (6, 10), (7, 5)])
def test_a_still_video_is_the_image_models_output(
    tmp_path: Path, text: TextEncoder, size: tuple[int, int], safetensors: bool, linear: bool
) -> None:
    """Group norms of residual blocks pool over the frames: different frames are not one image at a time."""
    image = official.randomised(official.image_unet(**official.TINY_UNET, use_linear_projection=linear))
    image.save_pretrained(tmp_path, safe_serialization=safetensors)
    video = VideoUNet(config(plan="self", linear_projection=linear))
    assert load_pretrained(video, text, str(tmp_path), "unet") == {}
    x, tokens, t = torch.randn(2, 4, *size), torch.randn(2, 5, 128), torch.tensor([3.0, 871.0])
    expected = image(x, t, tokens).sample
    assert expected.abs().max() > 0.3
    for frames in (1, 3):
        ours = video(x[:, None].expand(-1, frames, -1, -1, -1), t, Text(tokens, tokens[:, 0]))
        assert ours.shape[1] == frames
        assert (ours - expected[:, None]).abs().max() <= 2e-5
    if size == (8, 8):
        assert same(to_diffusers(video.state_dict()), dict(image.state_dict()))


@pytest.mark.parametrize("safetensors", [True, False])
def test_a_pipelines_folder_brings_its_text_encoder(tmp_path: Path, safetensors: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    official.write_sd(tmp_path, safetensors=safetensors)
    text = build_clip(ClipConfig(pretrained="none"))[0]
    projection = text.text_projection.clone()
    load_pretrained(VideoUNet(config()), text, str(tmp_path), "unet")
    oracle = CLIPTextModel(CLIPTextConfig(**official.TINY_TEXT)).eval()
    prompt = text.tokenize(["a red dog runs", "None"])
    ends = (prompt.ids == 2047).int().argmax(dim=1)
    if safetensors:
        stored = load_file(tmp_path / "text_encoder" / "model.safetensors")
    else:
        stored, _ = read_pickle(tmp_path / "text_encoder" / "pytorch_model.bin")
    oracle.load_state_dict(
        {k.removeprefix("text_model."): v for k, v in stored.items() if "position_ids" not in k}
    )
    with torch.no_grad():
        ours, theirs = text(prompt), oracle(input_ids=prompt.ids).last_hidden_state
    assert (ours.tokens - theirs).abs().max() <= 2e-5
    assert torch.equal(text.text_projection, projection), "a pipeline has none: CLIP's stays"
    pooled = theirs[torch.arange(2), ends] @ projection
    assert (ours.pooled - pooled).abs().max() <= 2e-5
    before = text.ln_final.weight.clone()
    nn.init.ones_(text.ln_final.weight)
    load_pretrained(VideoUNet(config()), text, str(tmp_path / "unet"), "unet")
    assert torch.equal(text.ln_final.weight, torch.ones_like(before)), "the U-Net's own folder has no text"


def test_a_configuration_that_shows_in_no_shape_is_compared(tmp_path: Path, text: TextEncoder) -> None:
    official.image_unet().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"config\.json: attention_head_dim is 2, unet\.heads is 4: set --unet.heads 2$"
    ):
        load_pretrained(VideoUNet(config(heads=4)), text, str(tmp_path), "unet")
    with pytest.raises(ValueError, match=r"unet\.channels is \(8, 24\): set --unet\.channels 8 16"):
        load_pretrained(VideoUNet(config(channels=(8, 24))), text, str(tmp_path), "unet")
    with pytest.raises(ValueError, match=r"unet\.positions is rotary: set --unet\.positions none"):
        load_pretrained(VideoUNet(config(heads=1, positions="rotary")), text, str(tmp_path), "unet")
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, says in (
        ({"norm_num_groups": 8}, "set --unet.norm-groups 8"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos is False, this U-Net has True"),
        ({"cross_attention_dim": 64}, "text_dim is 128: choose the --clip it was made with"),
        ({"attention_head_dim": [5, 10]}, "attention_head_dim is (5, 10)"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"use_linear_projection": True}, "set --unet.linear-projection True"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "do not mirror"),
        (
            {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]},
            "set --unet.down-attention False True",
        ),
    ):
        (found, *_) = find_unet_mismatches({**settings, **change}, config())
        assert says in found
    assert find_unet_mismatches(settings, config()) == []


def test_a_folder_that_cannot_be_read(tmp_path: Path, text: TextEncoder) -> None:
    official.image_unet().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"holds a U-Net; set --backbone unet"):
        load_pretrained(nn.Linear(2, 2), text, str(tmp_path), "dit")
    with pytest.raises(ValueError, match=r"is an image U-Net; give its folder, with config\.json"):
        file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
        load_pretrained(VideoUNet(config()), text, str(file), "unet")
    file.unlink()
    with pytest.raises(
        ValueError, match=r"unet has no diffusion_pytorch_model\.safetensors or diffusion_.*bin"
    ):
        load_pretrained(VideoUNet(config()), text, str(tmp_path), "unet")
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        load_pretrained(VideoUNet(config()), text, str(tmp_path), "unet")


# ---- VideoBooth ----


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for folder in GOLDEN:
        if (folder / f"{name}.safetensors").is_file():
            tensors = load_file(folder / f"{name}.safetensors")
            state = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
            return json.loads((folder / f"{name}.json").read_text())["config"], state
    pytest.skip(f"golden file {name} is absent")


@pytest.mark.parametrize("name", ["videobooth_unet_l1", "videobooth_unet_l2", "videobooth_unet_watermark"])
def test_the_originals_u_net_goes_round(tmp_path: Path, text: TextEncoder, name: str) -> None:
    """From the original's names to ours, into our modules, and back: the same names, shapes and bits."""
    settings, original = golden(name)
    torch.save({"ema_unet": original, "steps": 3}, tmp_path / "unet.pt")
    unet = VideoUNet(
        UNetConfig(
            channels=tuple(settings["block_out_channels"]),
            layers_per_block=settings["layers_per_block"],
            heads=settings["attention_head_dim"],
            norm_groups=settings["norm_num_groups"],
            text_dim=settings["cross_attention_dim"],
            watermark=name.endswith("watermark"),
        )
    )
    taps = load_pretrained(unet, text, str(tmp_path / "unet.pt"), "unet")
    strategies = strategies_of(unet)
    load_strategy_weights(strategies, taps, "x")
    root = nn.ModuleDict({"backbone": unet, "strategy": strategies}).state_dict()
    assert same(to_videobooth(root, taps_in_unet=True)["ema_unet"], original)
    plain = to_videobooth(root)["ema_unet"]
    assert set(original) - set(plain) == {
        k for k in original if k.split(".")[-2].endswith(("new", "exemplar", "global"))
    }


def test_both_files_go_round(tmp_path: Path, text: TextEncoder) -> None:
    unet_file, mapper_file = official.write_videobooth(tmp_path)
    unet = VideoUNet(config(watermark=True))
    assert load_pretrained(unet, text, str(unet_file), "unet") == {}
    strategies = strategies_of(unet)
    load_strategy_weights(strategies, read_strategy_weights(str(mapper_file)), "x")
    root = nn.ModuleDict({"backbone": unet, "strategy": strategies}).state_dict()
    files = to_videobooth(root)
    assert same(files["ema_unet"], torch.load(unet_file)["ema_unet"])
    mapper = torch.load(mapper_file)
    assert same(files["ema"], mapper["ema"]), "the averages, not the last weights"
    assert not same(files["ema"], mapper["model"])
    site = "down_blocks.0.attentions.0.transformer_blocks.0"
    flat = mapper["ema"][f"{site.replace('.', '_')}_attn2_to_k.weight"]
    assert torch.equal(root[f"strategy.token_replacement.taps.{site}.attn2.to_k_global.weight"], flat)
    save_file(mapper["ema"], tmp_path / "mapper.safetensors")  # converted by someone who trusts the pickle
    assert same(
        read_strategy_weights(str(tmp_path / "mapper.safetensors")), read_strategy_weights(str(mapper_file))
    )


def test_the_taps_of_a_u_net_are_taken_as_far_as_its_strategies_run(
    tmp_path: Path, text: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    unet_file, _ = official.write_videobooth(tmp_path)
    image = official.image_unet().state_dict()
    state = {**torch.load(unet_file)["ema_unet"], **official.random_like(official.taps_in_unet(image), 8)}
    torch.save({"ema": state}, unet_file)
    unet = VideoUNet(config(watermark=True))
    taps = load_pretrained(unet, text, str(unet_file), "unet")
    only_fine = strategies_of(unet, ("kv_concat",))
    with caplog.at_level(logging.INFO):
        load_strategy_weights(only_fine, taps, "weights=x", optional=True)
    assert "weights=x: tensors for token_replacement are not used" in caplog.text
    site = "mid_block.attentions.0.transformer_blocks.0.attn1"
    found = only_fine.state_dict()[f"kv_concat.taps.{site}.to_v_exemplar.weight"]
    assert torch.equal(found, state[f"{site}.to_v_exemplar.weight"])
    strategies = strategies_of(unet)
    words = strategies.part("token_replacement").state_dict()["mapper.mapping_0.0.weight"].clone()
    load_strategy_weights(
        strategies, read_strategy_weights(str(unet_file)), "x"
    )  # as a source of strategies alone
    assert torch.equal(strategies.state_dict()["token_replacement.mapper.mapping_0.0.weight"], words)
    load_strategy_weights(strategies_of(unet, ()), taps, "weights=x", optional=True)
    with pytest.raises(
        ValueError, match=r"x is for kv_concat, and the run's strategies are token_replacement"
    ):
        fine = {k: v for k, v in taps.items() if k.startswith("kv_concat")}
        load_strategy_weights(strategies_of(unet, ("token_replacement",)), fine, "x")


def test_elites_mapper_brings_its_mlps_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """VideoBooth's first stage does not load ELITE's K/V: they belong to an image model."""
    state = official.write_elite(tmp_path / "global_mapper.pt")
    strategies = strategies_of(VideoUNet(config()))
    before = {name: tensor.clone() for name, tensor in strategies.state_dict().items()}
    with caplog.at_level(logging.INFO):
        load_strategy_weights(strategies, read_strategy_weights(str(tmp_path / "global_mapper.pt")), "x")
    assert "ELITE's mapper; the text attention's K/V stay the backbone's" in caplog.text
    for name, tensor in strategies.state_dict().items():
        official_name = name.removeprefix("token_replacement.mapper.")
        assert torch.equal(tensor, state[official_name] if official_name != name else before[name])


def test_later_sources_of_strategies_win_and_ours_are_read_as_they_are(tmp_path: Path) -> None:
    _, mapper = official.write_videobooth(tmp_path)
    first, second = strategies_of(VideoUNet(config())), strategies_of(VideoUNet(config()))
    load_strategy_weights(first, read_strategy_weights(str(mapper)), "x")
    weights.write(tmp_path / "strategy.safetensors", first.state_dict())
    for source in (tmp_path, tmp_path / "strategy.safetensors"):
        load_strategy_weights(second, read_strategy_weights(str(source)), "x")
        assert same(first.state_dict(), second.state_dict())
    other = {"shift.project.weight": torch.ones(2)}  # of someone's own strategy
    weights.write(tmp_path / "other.safetensors", other)
    assert same(read_strategy_weights(str(tmp_path / "other.safetensors")), other)


# ---- what is refused ----


def test_a_watermark_branch_and_positions_must_fit(tmp_path: Path, text: TextEncoder) -> None:
    unet_file, _ = official.write_videobooth(tmp_path)
    with pytest.raises(
        ValueError, match=r"has a watermark branch, and .* is False; set --unet\.watermark True"
    ):
        load_pretrained(VideoUNet(config()), text, str(unet_file), "unet")
    state = torch.load(unet_file)["ema_unet"]
    torch.save({"ema": {k: v for k, v in state.items() if "watermark" not in k}}, unet_file)
    with pytest.raises(
        ValueError, match=r"has no watermark branch, and .* is True; set --unet\.watermark False"
    ):
        load_pretrained(VideoUNet(config(watermark=True)), text, str(unet_file), "unet")
    with pytest.raises(ValueError, match=r"knows no positions, and .* is rotary; set --unet\.positions none"):
        load_pretrained(VideoUNet(config(heads=1, positions="rotary")), text, str(unet_file), "unet")
    load_pretrained(VideoUNet(config()), text, str(unet_file), "unet")


def test_what_is_missing_and_unexpected_is_listed(tmp_path: Path, text: TextEncoder) -> None:
    unet_file, mapper_file = official.write_videobooth(tmp_path)
    unet = VideoUNet(config(watermark=True))
    state, mapper = torch.load(unet_file)["ema_unet"], torch.load(mapper_file)["ema"]
    del state["conv_in.bias"]
    state["rotary.freqs"], state["conv_out.bias"] = torch.zeros(2), torch.zeros(5)
    torch.save({"ema_unet": state}, unet_file)
    with pytest.raises(ValueError) as error:
        load_pretrained(unet, text, str(unet_file), "unet")
    for words in (
        "1 missing (conv_in.bias)",
        "1 unexpected (rotary.freqs)",
        "(conv_out.bias: (5,) in the file, (4,) here)",
    ):
        assert words in str(error.value)
    lost = "mid_block_attentions_0_transformer_blocks_0_attn1_to_v_new.weight"
    wide = {k: torch.zeros(3, 3) if k == "mapping_patch_4.6.weight" else v for k, v in mapper.items()}
    for change, says in (
        (
            {k: v for k, v in mapper.items() if k != lost},
            r"1 missing \(kv_concat\.taps\.mid_block\..*to_v_new",
        ),
        (
            {k: v for k, v in mapper.items() if k != "mapping_3.1.bias"},
            r"1 missing .*mapper\.mapping_3\.1\.bias",
        ),
        (
            wide,
            r"of another shape \(token_replacement\.mapper\.mapping_patch_4\.6\.weight: \(3, 3\) in the file",
        ),
        ({**mapper, "mapping_5.0.bias": torch.zeros(1)}, r"1 unexpected \(.*mapping_5\.0\.bias"),
    ):
        torch.save({"ema": change}, mapper_file)
        with pytest.raises(ValueError, match=says):
            load_strategy_weights(strategies_of(unet), read_strategy_weights(str(mapper_file)), "x")
    with pytest.raises(ValueError, match=r"to_k_new\.weight is in the file twice"):
        dotted = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_k_new.weight": torch.zeros(1)}
        from_videobooth({**mapper, **dotted})
    with pytest.raises(
        ValueError, match=r"strategy\.adaln\.taps\.blocks\.0\.weight has no place in VideoBooth"
    ):
        to_videobooth({"strategy.adaln.taps.blocks.0.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"strategy_weights has 'nowhere\.pt', but nowhere\.pt is not a file"
    ):
        read_strategy_weights("nowhere.pt")
