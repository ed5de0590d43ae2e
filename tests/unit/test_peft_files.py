"""LoRA files: diffusers with PEFT computes what we compute, both ways; names, ranks, scales, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import official
import pytest
import torch
from dit_booth.strategies.lora import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import dit_booth
from dit_booth.commands.lora import main
from dit_booth.inject import Dims, Injection
from dit_booth.lora import read_metadata, shortest_globs
from dit_booth.models.assemble import assemble
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import Text, TextEncoder, build_clip
from dit_booth.models.fingerprint import metadata
from dit_booth.models.injected import Injected
from dit_booth.models.layers import linear_sites
from dit_booth.models.pretrained import load_strategy_weights
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.models.upstream.peft import KEY, PREFIXES, from_peft, to_peft
from dit_booth.models.wan.model import VideoWan, WanConfig
from dit_booth.models.weights import write

torch.set_num_threads(1)
UNET = UNetConfig(
    channels=(8, 16), layers_per_block=1, heads=2, norm_groups=4, text_dim=128, down_attention=(True, False)
)
WAN = WanConfig(depth=2, hidden=32, heads=2, ffn=40)
LAYERS = {
    "unet": ("*.attn[12].to_[qkv]", "*.attn[12].to_out.0", "*.ff.net.*"),
    "wan": ("*.to_[qkv]", "*.to_out.0", "*.ffn.net.*"),
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]


@pytest.fixture(scope="module")
def text() -> TextEncoder:
    return build_clip(ClipConfig(pretrained="none"))[0]


@pytest.fixture(scope="module", params=["unet", "wan"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(kind: str) -> Any:
    """diffusers' network, all its parameters random."""
    return official.randomised(official.image_unet() if kind == "unet" else official.wan())


@pytest.fixture(scope="module")
def weights(theirs: Any) -> dict[str, Tensor]:
    """Its weights before any adapter."""
    return {name: tensor.clone() for name, tensor in theirs.state_dict().items()}


def ours(kind: str, weights: dict[str, Tensor], text: TextEncoder, options: LoraConfig) -> Injected:
    """Return our network with diffusers' weights, and strategy lora."""
    backbone = VideoUNet(UNET) if kind == "unet" else VideoWan(WAN, channels=4, text_dim=24)
    backbone.load_state_dict({**backbone.state_dict(), **weights})  # temporal attention adds nothing
    return assemble(backbone, text, "lora", Dims(96, 128, 4, 1), options={"lora": options})


def outputs(kind: str, their: Any, model: Injected) -> tuple[Tensor, Tensor]:
    """Return the prediction of one frame by both."""
    generator = torch.Generator().manual_seed(7)
    x, t = torch.randn(2, 4, 1, 8, 6, generator=generator), torch.tensor([3.0, 871.0])
    words = torch.randn(2, 5 if kind == "unet" else 512, 128 if kind == "unet" else 24, generator=generator)
    with torch.no_grad():
        mine = model.backbone(
            x.transpose(1, 2), t, Text(words, words[:, 0]), model.strategy.bind(("lora",))
        ).transpose(1, 2)
        if kind == "unet":
            return their(x[:, :, 0], t, words).sample, mine[:, :, 0]
        return their(x, t, words).sample, mine


def test_diffusers_computes_the_same_with_an_exported_file(
    kind: str, theirs: Any, weights: dict[str, Tensor], text: TextEncoder, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    model = ours(kind, weights, text, LoraConfig(rank=3, alpha=5.0, layers=LAYERS[kind]))
    official.randomised(model.strategy)
    about = {**metadata(model.backbone, model.strategy), "settings": json.dumps({"backbone": kind})}
    write(tmp_path / "strategy.safetensors", model.strategy.state_dict(), about)
    file = tmp_path / "lora.safetensors"
    (line,) = dit_booth.export_lora(tmp_path, file)
    assert line.endswith("layers of rank 3, alpha 5")
    plain, mine = outputs(kind, theirs, model)
    assert (plain - mine).abs().max() > 1e-2
    found = json.loads(read_metadata(file)[KEY])
    theirs.load_lora_adapter(load_file(file), prefix=PREFIXES[kind], metadata=found, adapter_name="exported")
    try:
        expected, _ = outputs(kind, theirs, model)
    finally:
        theirs.delete_adapters("exported")
    assert (expected - mine).abs().max() < 2e-5


def test_we_compute_the_same_with_a_file_of_diffusers(
    kind: str, theirs: Any, weights: dict[str, Tensor], text: TextEncoder, tmp_path: Path
) -> None:
    """PEFT's own file, with another rank and alpha at some layers."""
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn1.to_v": 7}}
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, **patterns), "made")
    try:
        official.randomised(theirs, size=0.2)  # the adapter too; the weights are put back
        theirs.load_state_dict({base_name(theirs, name): y for name, y in weights.items()}, strict=False)
        theirs.save_lora_adapter(tmp_path, adapter_name="made")
        (file,) = tmp_path.glob("*.safetensors")
        state = {f"{PREFIXES[kind]}.{name}": y for name, y in load_file(file).items()}  # as a pipeline's
        lora = from_peft(state, read_metadata(file), kind, "made")
        sites = linear_sites(ours(kind, weights, text, LoraConfig()).backbone)
        globs = shortest_globs(lora.layers, sites, "made")
        assert len(globs) == 10, "one for each layer of a block"
        options = LoraConfig(rank=lora.rank, alpha=lora.alpha, layers=tuple(globs))
        model = ours(kind, weights, text, options)
        load_strategy_weights(model.strategy, lora.state, "made")
        expected, mine = outputs(kind, theirs, model)
    finally:
        theirs.delete_adapters("made")
    assert (expected - mine).abs().max() < 2e-5
    assert (outputs(kind, theirs, model)[0] - mine).abs().max() > 1e-2, "the adapter does something"
    back, about = to_peft(lora, kind)
    again = from_peft(back, about, kind, "back")
    assert again[:2] == lora[:2] and again.state.keys() == lora.state.keys()
    assert all(torch.equal(again.state[name], tensor) for name, tensor in lora.state.items())


def base_name(network: Any, name: str) -> str:
    """Return the name of a weight in a network with an adapter."""
    *path, leaf = name.split(".")
    wrapped = ".".join([*path, "base_layer", leaf])
    return wrapped if wrapped in network.state_dict() else name


# ---- without diffusers -------------------------------------------------------------------------------------


def small(alpha: float | None = None, prefix: str = "unet.") -> dict[str, Tensor]:
    at = f"{prefix}mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    state = {f"{at}.lora_A.weight": torch.ones(2, 3), f"{at}.lora_B.weight": torch.ones(4, 2)}
    return state if alpha is None else {**state, f"{at}.alpha": torch.tensor(alpha)}


def test_alpha_is_in_the_metadata_in_a_tensor_or_the_rank() -> None:
    told = {KEY: json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True})}
    assert from_peft(small(), {}, "unet", "x").alpha == 2
    assert from_peft(small(0.5), {}, "unet", "x").alpha == 0.5
    assert from_peft(small(), told, "unet", "x").alpha == pytest.approx(2 * 6 / 2**0.5)
    assert from_peft(small(), {}, "unet", "x").layers == [
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ]


def test_kohyas_names_are_diffusers_business() -> None:
    layers = ("attn2_to_k", "attn1_to_out_0", "ff_net_0_proj")
    state = {}
    for layer in layers:
        at = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{layer}"
        state[f"{at}.lora_down.weight"], state[f"{at}.lora_up.weight"] = torch.ones(2, 3), torch.ones(4, 2)
        state[f"{at}.alpha"] = torch.tensor(1.0)
    lora = from_peft(state, {}, "unet", "x")
    assert lora[:2] == (2, 1.0)
    assert sorted(layer.partition("transformer_blocks.0.")[2] for layer in lora.layers) == [
        *("attn1.to_out.0", "attn2.to_k", "ff.net.0.proj")
    ]


def test_names_of_wans_original_layers_are_diffusers_business() -> None:
    """diffusers puts alpha / r into the tensors."""
    state = {}
    for layer in ("self_attn.q", "cross_attn.o", "ffn.0"):
        at = f"diffusion_model.blocks.0.{layer}"
        state[f"{at}.lora_down.weight"], state[f"{at}.lora_up.weight"] = torch.ones(2, 3), torch.ones(4, 2)
        state[f"{at}.alpha"] = torch.tensor(1.0)
    lora = from_peft(state, {}, "wan", "x")
    assert sorted(lora.layers) == [
        f"blocks.0.{at}" for at in ("attn1.to_q", "attn2.to_out.0", "ffn.net.0.proj")
    ]
    change = (
        lora.state["lora.taps.blocks.0.attn1.q.up.weight"]
        @ lora.state["lora.taps.blocks.0.attn1.q.down.weight"]
    )
    assert (lora.alpha / lora.rank * change == 1.0).all(), "1/2 of 1 + 1"


@pytest.mark.parametrize(
    ("state", "about", "said"),
    [
        ({}, {}, r"x is no LoRA of unet layers \(it has nothing\)"),
        (small(prefix="transformer."), {}, r"it has transformer\.mid_block"),
        ({**small(), "unet.a.lora_magnitude_vector": torch.ones(1)}, {}, r"it has a\.lora_magnitude_vector"),
        (dict(list(small().items())[:1]), {}, "is no LoRA"),
        (small(), {KEY: '{"unet.use_dora": true}'}, "without DoRA"),
        (small(), {KEY: "[1"}, "is no JSON object"),
        (small(), {KEY: '{"unet.alpha_pattern": {"(a+)+": 1}}'}, "only names of layers are read"),
    ],
)
def test_other_files_are_refused(state: dict[str, Tensor], about: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_peft(state, about, "unet", "x")


def test_an_adapter_goes_out_and_comes_back_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the toy world's DiT, whose layers a file of ours names as diffusers would."""
    names = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("attn1.to_q", "mlp.2")]
    layers = dict(dit_booth.create_model("dit-nano").backbone.named_modules())
    state = {}
    for name in names:
        down, up = torch.randn(2, layers[name].in_features), torch.randn(layers[name].out_features, 2)
        state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(state, tmp_path / "lora.safetensors")
    adapter, back = tmp_path / "adapter.safetensors", tmp_path / "back.safetensors"
    command = ["import", str(tmp_path / "lora.safetensors"), "--out", str(adapter)]
    assert main([*command, "--set", "sampler.steps=2"]) == 0
    said = capsys.readouterr().out
    assert "4 layers of rank 2, alpha 2: blocks.0.attn1.to_q blocks.0.mlp.2 blocks.1.attn1.to_q" in said
    assert main(["export", str(adapter), "--out", str(back)]) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in load_file(back).items())
    with safe_open(back, "pt") as saved:
        assert set(saved.keys()) == set(state)
    changed = dit_booth.load(adapter, device="cpu")
    assert changed.model.active == ("lora",) and isinstance(changed.model.strategy.bind(("lora",)), Injection)
    for words, line in (
        (
            ["import", str(tmp_path / "no.safetensors"), "--out", str(adapter)],
            "no.safetensors cannot be read",
        ),
        (["export", str(adapter), "--out", "x.bin"], "name a file that ends in .safetensors"),
        ([*command, "--set", "dit.mlp=swiglu"], "changes blocks.0.mlp.2 (2 such layers), which is no linear"),
        (["export", str(back), "--out", str(tmp_path / "c.safetensors")], "has nothing of strategy lora"),
    ):
        assert main(words) == 1
        (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line in error
