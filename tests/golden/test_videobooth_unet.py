"""The video U-Net, plain and under VideoBooth's two strategies, against the tensors of the original code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from einops import rearrange
from files import has, load
from torch import Tensor

from dit_booth.inject import Condition, Injection, Recorder, Reference, Site, Sites, no_injection
from dit_booth.models.clip import Text
from dit_booth.models.unet import UNetConfig, VideoUNet
from dit_booth.strategy import Strategies
from strategies.kv_concat import KVConcat, KVConcatConfig
from strategies.token_replacement import TokenReplacement, TokenReplacementConfig

torch.set_num_threads(1)
TOLERANCE = 2e-5
NAMES = [
    name for name in ("videobooth_unet_l1", "videobooth_unet_l2", "videobooth_unet_watermark") if has(name)
]
INJECTED = ("to_k_new", "to_v_new", "to_k_exemplar", "to_v_exemplar", "to_k_global", "to_v_global")
pytestmark = [
    pytest.mark.parametrize("name", NAMES),
    pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"]),
]


def config_of(upstream: Mapping[str, Any], watermark: bool) -> UNetConfig:
    return UNetConfig(
        in_channels=upstream["in_channels"],
        out_channels=upstream["out_channels"],
        channels=tuple(upstream["block_out_channels"]),
        layers_per_block=upstream["layers_per_block"],
        heads=upstream["attention_head_dim"],
        norm_groups=upstream["norm_num_groups"],
        text_dim=upstream["cross_attention_dim"],
        linear_projection=upstream.get("use_linear_projection", False),
        watermark=watermark,
    )


class Case:
    """The original's weights, split into backbone and strategies, and one of its cases' inputs and output."""

    def __init__(self, name: str) -> None:
        info, tensors = load(name)
        self.tensors = tensors
        weights = {
            key.removeprefix("weights."): x for key, x in tensors.items() if key.startswith("weights.")
        }
        own = {key: x for key, x in weights.items() if key.split(".")[-2] not in INJECTED}
        self.unet = VideoUNet(config_of(info["config"], watermark=any("watermark" in key for key in own)))
        self.unet.load_state_dict(own)  # strict: the parameter names are upstream's, all of them
        prompt = Site(name="text.words", port="prompt", role="words", dim=self.unet.config.text_dim)
        sites = Sites(
            (prompt, *self.unet.sites()), image_dim=8, image_embed_dim=8, latent_channels=4, frames=4
        )
        self.strategies = Strategies(
            {
                "token_replacement": TokenReplacement(TokenReplacementConfig(), sites),
                "kv_concat": KVConcat(KVConcatConfig(), sites),
            }
        )
        injected = {key: x for key, x in weights.items() if key not in own}
        for part in self.strategies.children():
            taps = part.get_submodule("taps").state_dict()
            part.get_submodule("taps").load_state_dict({key: injected.pop(key) for key in taps})
        assert not injected, "every parameter of the original has one owner"

    def to(self, dtype: torch.dtype) -> Case:
        self.unet.to(dtype)
        self.strategies.to(dtype)
        self.dtype = dtype
        return self

    def video(self, key: str) -> Tensor:
        return rearrange(self.tensors[key].to(self.dtype), "b c f h w -> b f c h w")

    def text(self, key: str) -> Text:
        tokens = self.tensors[key].to(self.dtype)
        return Text(tokens, tokens[:, -1])

    def error(self, ours: Tensor, output: str) -> float:
        return (ours - self.video(f"outputs.{output}")).abs().max().item()

    def reference(self, noisy: Tensor, t: Tensor, text: Text) -> Reference:
        """A reference (b f c h w) that records itself without reading an image, as the original's does."""

        def record(latent: Tensor, clean: bool, sites: Sequence[str]) -> dict[str, Tensor]:
            no_image = self.strategies.bind({name: Condition() for name in self.strategies.names})
            recorder = Recorder(no_image, sites)
            self.unet(latent, t, text, recorder)
            pixels = {site: hidden.shape[1] // latent.shape[1] for site, hidden in recorder.hidden.items()}
            return {site: hidden[:, : pixels[site]] for site, hidden in recorder.hidden.items()}  # frame 0

        nothing = noisy.new_zeros(noisy.shape[0], 1)
        return Reference(nothing, (), nothing, noisy, noisy, record)

    def fine(self, reference: Reference | None) -> Injection:
        part = self.strategies.part("kv_concat")
        image = Condition() if reference is None else part(reference)
        return self.strategies.bind({"token_replacement": Condition(), "kv_concat": image})

    @torch.no_grad()
    def run(self, inject: Injection, batch: str = "", frames: int | None = None) -> Tensor:
        x = self.video(f"inputs.sample{batch}")[:, :frames]
        text = self.text(f"inputs.encoder_hidden_states{batch}")
        return self.unet(x, self.tensors[f"inputs.timestep{batch}"], text, inject)


@lru_cache(maxsize=1)
def _case(name: str) -> Case:
    return Case(name)


@pytest.fixture
def case(name: str, dtype: torch.dtype) -> Case:
    return _case(name).to(dtype)


@pytest.mark.parametrize("batch", ["", "_b2"])
def test_plain(case: Case, batch: str) -> None:
    assert case.error(case.run(no_injection, batch), f"a_plain{batch}") <= TOLERANCE


def test_plain_with_one_frame(case: Case) -> None:
    assert case.error(case.run(no_injection, frames=1), "a_plain_f1") <= TOLERANCE


@pytest.mark.parametrize("batch", ["", "_b2"])
def test_coarse_stage(case: Case, batch: str) -> None:
    inject = case.strategies.bind({"token_replacement": Condition()})
    assert case.error(case.run(inject, batch), f"b_coarse{batch}") <= TOLERANCE


def test_fine_stage_without_an_image(case: Case) -> None:
    assert case.error(case.run(case.fine(None)), "c_fine_no_exemplar") <= TOLERANCE


FINE = {  # output: (latent, timestep, text of the reference, batch, frames of the reference)
    "c_fine_same_noise": ("same_noise", "exemplar_timestep", "exemplar_encoder_hidden_states", "", 1),
    "c_fine_same_noise_b2": ("same_noise", "exemplar_timestep", "exemplar_encoder_hidden_states", "_b2", 1),
    "c_fine_other_exemplar_timestep": (
        "same_noise",
        "exemplar_timestep_other",
        "exemplar_encoder_hidden_states",
        "",
        1,
    ),
    # Without a text of its own the reference reads the video's.
    "c_fine_exemplar_text_none": ("same_noise", "exemplar_timestep", "encoder_hidden_states", "", 1),
    # The released code noises every copy anew; they reach frame 0 through norms and temporal attention.
    "d_fine_own_noise": ("own_noise", "exemplar_timestep", "exemplar_encoder_hidden_states", "", 4),
    "d_fine_own_noise_b2": ("own_noise", "exemplar_timestep", "exemplar_encoder_hidden_states", "_b2", 4),
}


@pytest.mark.parametrize("output", FINE)
def test_fine_stage(case: Case, output: str) -> None:
    latent, timestep, text, batch, frames = FINE[output]
    with torch.no_grad():
        noisy = case.video(f"inputs.exemplar_latent_{latent}{batch}")[:, :frames]
        t = case.tensors[f"inputs.{timestep}{batch}"]
        inject = case.fine(case.reference(noisy, t, case.text(f"inputs.{text}{batch}")))
    assert case.error(case.run(inject, batch), output) <= TOLERANCE


@torch.no_grad()
def test_guided_predictions(case: Case) -> None:
    """The two predictions of guidance: the unconditional one has no image, but the trained projections."""
    x, t = case.video("inputs.sample_b2")[:1], case.tensors["inputs.e_timestep"][:1]
    cond, uncond = case.text("inputs.encoder_hidden_states_b2").tokens.chunk(2)
    noisy = case.video("inputs.exemplar_latent_own_noise_b2")[:1]
    null = case.text("inputs.exemplar_encoder_hidden_states_b2").tokens[:1]
    inject = case.fine(
        case.reference(noisy, case.tensors["inputs.exemplar_timestep_b2"][:1], Text(null, null))
    )
    ours = case.unet(x, t, Text(cond, cond), inject)
    assert case.error(ours, "e_cond") <= TOLERANCE
    assert case.error(case.unet(x, t, Text(uncond, uncond), case.fine(None)), "e_uncond") <= TOLERANCE
