"""Wan's autoencoder equals diffusers': latents by channel, groups of four frames, tiles; and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_pipeline
from einops import rearrange
from torch import Tensor

from dit_booth.config import DataConfig, RunConfig, StageConfig, StagesConfig, TripletsOptions
from dit_booth.cost.describe import table_of_run
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.autoencoder.model import Autoencoder, build_autoencoder
from dit_booth.models.autoencoder.posterior import Posterior
from dit_booth.models.text.config import TextConfig
from dit_booth.models.wan.config import WanConfig
from dit_booth.study.estimate import latents_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan-vae")
    wan_pipeline.autoencoder().save_pretrained(folder / "vae")
    return folder


def load(folder: Path, **options: Any) -> Autoencoder:
    section = AutoencoderConfig(kind="wan", path=str(folder), subfolder="vae", **options)
    return build_autoencoder(section)


def video(frames: int, height: int = 16, width: int = 24) -> Tensor:
    return torch.rand(2, frames, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def scaled(vae: Any, z: Tensor) -> Tensor:
    """Latents as diffusers' image-to-video pipeline makes them: (z - mean) / std."""
    mean, std = (
        torch.tensor(getattr(vae.config, f"latents_{n}")).view(1, -1, 1, 1, 1) for n in ("mean", "std")
    )
    return (z - mean) / std


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encoding_and_decoding_are_diffusers(folder: Path, frames: int) -> None:
    ours, vae = load(folder, posterior="mode"), wan_pipeline.autoencoder()
    x = video(frames)
    latents = ours.encode(x)
    z = vae.encode(rearrange(x, "b f c h w -> b c f h w")).latent_dist.mode()
    assert latents.shape == (2, 1 + frames // 4, 4, 2, 3) and (ours.channels, ours.factor) == (4, 8)
    torch.testing.assert_close(latents, rearrange(scaled(vae, z), "b c f h w -> b f c h w"))
    decoded = ours.decode(latents * 3)  # outside [-1, 1] before the clamp
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    expected = vae.decode(3 * scaled(vae, z) * std + mean).sample
    torch.testing.assert_close(decoded, rearrange(expected, "b c f h w -> b f c h w"), rtol=1e-4, atol=1e-5)
    assert decoded.shape == x.shape and decoded.abs().max() <= 1


@torch.no_grad()
def test_the_posterior_is_sampled_with_a_rows_own_noise(folder: Path) -> None:
    ours, x = load(folder), video(5)
    draws = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = ours.encode(x, draws)
    alone = ours.encode(x[1:], [torch.Generator().manual_seed(4)])
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both, load(folder, posterior="mode").encode(x))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"patch_size": 2, "in_channels": 12, "out_channels": 12}])
def test_a_video_decoded_in_parts_is_the_whole(options: Any, tmp_path: Path) -> None:
    """Wan 2.1 and 2.2, after any part also from a saved state, which does not grow."""
    wan_pipeline.autoencoder(**options).save_pretrained(tmp_path / "vae")
    ours = load(tmp_path)
    latents = torch.randn(2, 6, 4, 2, 3, generator=torch.Generator().manual_seed(0)) * 3
    whole = ours.decode(latents)
    decoder, at, sizes, device = ours.stream_decoder(), 0, [], torch.device("cpu")
    for count, frames in ((1, 1), (1, 4), (3, 12), (1, 4)):
        state = {name: tensor.clone() for name, tensor in decoder.state().items()}
        sizes.append(sum(tensor.numel() for tensor in state.values()))
        again = ours.stream_decoder()
        again.restore(state, device)
        part = decoder.decode(latents[:, at : at + count])
        assert torch.equal(again.decode(latents[:, at : at + count]), part)
        start = 4 * at - 3 if at else 0
        assert part.shape[1] == frames
        torch.testing.assert_close(part, whole[:, start : start + frames], rtol=1e-4, atol=1e-5)
        at += count
    assert 0 == sizes[0] < sizes[1] < sizes[2] == sizes[3]
    alone = ours.decode(latents[:, 2:])
    assert (alone[:, 1:] - whole[:, 9:]).abs().max() > 1e-3, "a part needs those before it"


@torch.no_grad()
def test_tiles(folder: Path) -> None:
    tiled, vae = load(folder, posterior="mode", tile=32), wan_pipeline.autoencoder()
    vae.enable_tiling(32, 32, 24, 24)
    x = video(5, 32, 56)[:1]
    z = vae.encode(rearrange(x, "b f c h w -> b c f h w")).latent_dist.mode()
    latents = tiled.encode(x)
    torch.testing.assert_close(latents, rearrange(scaled(vae, z), "b c f h w -> b f c h w"))
    plain = load(folder, posterior="mode")
    assert not torch.allclose(latents, plain.encode(x)), "seams"
    torch.testing.assert_close(tiled.encode(x[..., :32]), plain.encode(x[..., :32]))
    assert tiled.decode(latents).shape == x.shape


def test_a_scale_for_each_channel_survives_json() -> None:
    x = torch.randn(1, 2, 3, 2, 2)
    plain = Posterior(scale=[1.0, 2.0, 4.0], shift=[0.5, 0.0, -1.0])
    latents = plain.draw(x)
    torch.testing.assert_close(latents[0, 0, 2], (x[0, 0, 2] + 1) * 4)
    torch.testing.assert_close(plain.undo_scale(latents), x)


def test_frames_that_cannot_be_grouped(folder: Path) -> None:
    section = AutoencoderConfig(kind="wan")
    assert [section.latent_frames(n) for n in (1, 5, 81)] == [1, 2, 21]
    assert [section.video_frames(n) for n in (0, 1, 2, 21)] == [0, 1, 5, 81]
    assert AutoencoderConfig().latent_frames(8) == AutoencoderConfig().video_frames(8) == 8
    with pytest.raises(ValueError, match=r"frames is 6; .* takes 4k \+ 1 frames: use 5 or 9"):
        load(folder).encode(video(6))
    with pytest.raises(ValueError, match=r"data\.frames is 8; .*: use 5 or 9"):
        RunConfig(autoencoder=section)
    assert RunConfig(autoencoder=section, data=DataConfig(frames=9)).latent_frames == 3
    data = DataConfig(
        kind="triplets", frames=9, buckets=("16x16", "16x32x4"), triplets=TripletsOptions(root="x")
    )
    with pytest.raises(ValueError, match=r"frames of 16x32x4 in data\.buckets is 4; .*: use 1 or 5"):
        RunConfig(autoencoder=section, data=data)
    stages = StagesConfig(fine=StageConfig(frames=(5, 7)))
    with pytest.raises(ValueError, match=r"stages\.fine\.frames is 7; .*: use 5 or 9"):
        RunConfig(autoencoder=section, data=DataConfig(frames=9), stages=stages)


def test_costs_count_latent_frames_and_umt5s_tokens() -> None:
    section = AutoencoderConfig(kind="wan")
    config = RunConfig(
        strategy="none",
        backbone="wan",
        wan=WanConfig(depth=1, hidden=32, heads=2, ffn=64),
        autoencoder=section,
        text=TextConfig(kind="umt5"),
        data=DataConfig(frames=9),
    )
    assert latents_of(config) == (16, 4, 4)
    lines = table_of_run(config, (16, 4, 4))
    assert lines[0] == "wan, 3 frames of 16 x 4 x 4 latents, one video"
    by_clip = table_of_run(replace(config, text=TextConfig()), (16, 4, 4))
    assert len({lines[1], by_clip[1]}) == 2 and lines[1].startswith("backbone")


def test_what_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"autoencoder\.tile is 100; .* use a multiple of 32"):
        load(folder, tile=100)
    with pytest.raises(ValueError, match=r"autoencoder\.tile is 64, but autoencoder\.kind is pixel"):
        AutoencoderConfig(tile=64)
    with pytest.raises(ValueError, match=r"path is empty but kind = wan: .* Wan pipeline as weights"):
        build_autoencoder(AutoencoderConfig(kind="wan"))
    with pytest.raises(ValueError, match="holds AutoencoderKLWan, not AutoencoderKL "):
        build_autoencoder(AutoencoderConfig(kind="kl", path=str(folder), subfolder="vae"))
    wan_pipeline.autoencoder(scale_factor_temporal=2).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="2 frames in a latent frame, and kind = wan has 4"):
        load(tmp_path)
