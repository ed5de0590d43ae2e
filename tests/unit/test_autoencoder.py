"""Autoencoders against direct diffusers calls, exact pixel round trips, and errors that name the fix."""

import json

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.autoencoder.model import Autoencoder, build_autoencoder


@pytest.fixture(scope="module", autouse=True)
def quiet_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shake(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def kl(tmp_path_factory):
    from diffusers import AutoencoderKL

    model = shake(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(4, 8, 8),
            norm_num_groups=2,
            latent_channels=4,
        )
    )
    folder = tmp_path_factory.mktemp("kl")
    model.save_pretrained(folder / "vae")
    return model, folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from diffusers import AutoencoderTiny

    model = shake(
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    )
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return model, folder


def video(b: int = 2, f: int = 3, h: int = 16, w: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(b, f, 3, h, w, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1


# ---- pixel ------------------------------------------------------------------------------------------------


@given(
    patch=st.integers(1, 4),
    b=st.integers(1, 2),
    f=st.integers(1, 3),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_pixel_round_trip_is_exact(patch, b, f, h, w):
    autoencoder = build_autoencoder(AutoencoderConfig(patch=patch))
    x = video(b, f, h * patch, w * patch)
    latents = autoencoder.encode(x)
    assert latents.shape == (b, f, autoencoder.channels, h, w) and autoencoder.factor == patch
    assert torch.equal(autoencoder.decode(latents), x)


def test_pixel_patch_one_is_the_identity():
    autoencoder = build_autoencoder(AutoencoderConfig())
    x = video()
    assert autoencoder.channels == 3 and torch.equal(autoencoder.encode(x), x)
    assert list(autoencoder.parameters()) == []


def test_pixel_channels_are_torchs_pixel_unshuffle():
    x = video()
    latents = build_autoencoder(AutoencoderConfig(patch=2)).encode(x)
    assert torch.equal(latents, nn.functional.pixel_unshuffle(x, 2))


# ---- kl ---------------------------------------------------------------------------------------------------


def load(folder, **options) -> Autoencoder:
    return build_autoencoder(AutoencoderConfig(path=str(folder), **options))


def test_kl_equals_diffusers(kl):
    model, folder = kl
    ours = load(folder, kind="kl", subfolder="vae", posterior="mode")
    assert (ours.channels, ours.factor) == (4, 4)
    x = video()
    with torch.no_grad():
        frames = rearrange(x, "b f c h w -> (b f) c h w")
        expected = model.encode(frames).latent_dist.mode() * 0.18215
        decoded = model.decode(expected / 0.18215).sample
    latents = ours.encode(x)
    assert latents.shape == (2, 3, 4, 4, 6)
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(rearrange(latents, "b f c h w -> (b f) c h w"), expected, **close)
    torch.testing.assert_close(rearrange(ours.decode(latents), "b f c h w -> (b f) c h w"), decoded, **close)


def test_kl_samples_as_diffusers_whatever_the_chunk(kl):
    model, folder = kl
    x = video()
    with torch.no_grad():
        posterior = model.encode(rearrange(x, "b f c h w -> (b f) c h w")).latent_dist
        expected = posterior.sample(torch.Generator().manual_seed(3)) * 0.18215
    for chunk in (1, 4, 100):
        ours = load(folder, kind="kl", subfolder="vae", chunk=chunk)
        latents = ours.encode(x, torch.Generator().manual_seed(3))
        torch.testing.assert_close(
            rearrange(latents, "b f c h w -> (b f) c h w"), expected, rtol=0, atol=1e-6
        )
        assert not torch.equal(latents, ours.encode(x, torch.Generator().manual_seed(4)))


def test_chunks_bound_the_frames_of_a_pass(kl, monkeypatch):
    ours = load(kl[1], kind="kl", subfolder="vae", chunk=4)
    seen: list[int] = []
    ours.vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    ours.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    ours.decode(ours.encode(video()))
    assert seen == [4, 2, 4, 2]


def test_shift_and_scale_come_from_the_weights_folder(kl, tmp_path):
    kl[0].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**settings, "shift_factor": 0.5, "scaling_factor": 2.0})
    )
    plain = load(kl[1], kind="kl", subfolder="vae", posterior="mode")
    ours = load(tmp_path, kind="kl", posterior="mode")
    x = video()
    torch.testing.assert_close(ours.encode(x), (plain.encode(x) / 0.18215 - 0.5) * 2)
    torch.testing.assert_close(ours.decode(ours.encode(x)), plain.decode(plain.encode(x)), rtol=0, atol=1e-5)


def test_kl_keeps_the_videos_precision_and_its_own(kl):
    ours = load(kl[1], kind="kl", subfolder="vae", posterior="mode")
    x = video(1, 1)
    assert ours.encode(x.double()).dtype == torch.float64
    half = ours.to(torch.bfloat16)
    assert half.encode(x).dtype == torch.float32 and half.decode(half.encode(x)).dtype == torch.float32


def test_old_attention_names_load(kl, tmp_path):
    """Stable Diffusion 1's published autoencoder has them; the strict check must not refuse it."""
    kl[0].save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    renames = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(path).items():
        for new, old in renames.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        state[name] = value
    assert any(".query." in name for name in state)
    save_file(state, path, metadata={"format": "pt"})
    x = video(1, 1)
    old, new = (
        load(tmp_path, kind="kl", posterior="mode"),
        load(kl[1], kind="kl", subfolder="vae", posterior="mode"),
    )
    assert torch.equal(old.encode(x), new.encode(x))


# ---- tiny -------------------------------------------------------------------------------------------------


def test_tiny_equals_diffusers(tiny):
    model, folder = tiny
    ours = load(folder, kind="tiny", chunk=4)
    assert (ours.channels, ours.factor) == (4, 4)
    x = video()
    with torch.no_grad():
        expected = model.encode(rearrange(x, "b f c h w -> (b f) c h w")).latents
        decoded = model.decode(expected).sample
    latents = ours.encode(x)
    torch.testing.assert_close(rearrange(latents, "b f c h w -> (b f) c h w"), expected, rtol=1e-5, atol=1e-5)
    found = rearrange(ours.decode(latents), "b f c h w -> (b f) c h w")
    torch.testing.assert_close(found, decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_frozen_and_in_eval(kind, kl, tiny):
    ours = load({"kl": kl[1] / "vae", "tiny": tiny[1]}[kind], kind=kind).train()
    assert not any(module.training for module in ours.modules())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not ours.encode(video(1, 1)).requires_grad


# ---- errors -----------------------------------------------------------------------------------------------


def test_sizes_that_do_not_divide(kl):
    for ours in (load(kl[1], kind="kl", subfolder="vae"), build_autoencoder(AutoencoderConfig(patch=4))):
        with pytest.raises(
            ValueError, match=r"video size 18 x 24 is not divisible .* factor 4: .* to 16 x 24"
        ):
            ours.encode(video(h=18))
        with pytest.raises(ValueError, match=r"\(3, 3, 16, 24\): expected \(b, f, 3, h, w\)"):
            ours.encode(video()[0])
        with pytest.raises(ValueError, match=r"expected \(b, f, \d+, h, w\)"):
            ours.decode(video())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 0}, r"patch is 0; use a whole number in"),
        ({"path": "x"}, r"path = 'x'.*is for kind = kl, tiny or wan, but kind = pixel"),
        ({"kind": "kl"}, r"path is empty but kind = kl: give a local diffusers folder"),
        ({"kind": "kl", "path": "/nowhere/vae"}, r"'/nowhere/vae'.*this folder does not exist"),
        ({"kind": "tiny", "path": "./nowhere"}, r"'./nowhere'.*this folder does not exist"),
        ({"kind": "tiny", "path": "taesd"}, r"'taesd'.*this folder does not exist.*hub name owner/name"),
        ({"kind": "kl", "path": "a/b", "patch": 2}, r"patch = 2 is for kind = pixel"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        build_autoencoder(AutoencoderConfig(**options))


def test_bad_folders(kl, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"config.json does not exist.*set subfolder \(vae"):
        load(kl[1], kind="kl")
    with pytest.raises(ValueError, match=r"holds AutoencoderTiny, not AutoencoderKL.*change kind"):
        load(tiny[1], kind="kl")
    with pytest.raises(ValueError, match=r"chunk is 0; use a whole number in"):
        load(tiny[1], kind="tiny", chunk=0)
    tiny[0].save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(dict(list(state.items())[1:]), path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights do not fit AutoencoderTiny: .*missing_keys"):
        load(tmp_path, kind="tiny")
    path.unlink()
    with pytest.raises(ValueError, match=r"could not be loaded.*only safetensors weights are read"):
        load(tmp_path, kind="tiny")
    torch.save(dict(list(state.items())[1:]), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"1 missing \(decoder\.layers\.0\.bias\); use the folder it was saved"
    ):
        load(tmp_path, kind="tiny")
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    found = load(tmp_path, kind="tiny").vae.state_dict()
    assert set(found) == set(state) and all(torch.equal(found[k], v) for k, v in state.items())


def test_a_pickle_of_tensors_is_read_and_one_that_runs_code_is_not(kl, tmp_path):
    """Stable Diffusion 1.x's own vae/*.bin, with the older names of its attention."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in kl[0].state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = tensor
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
    kl[0].save_config(tmp_path)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    ours, x = load(tmp_path, kind="kl", posterior="mode"), video()
    plain = load(kl[1], kind="kl", subfolder="vae", posterior="mode")
    assert torch.equal(ours.encode(x), plain.encode(x))
    torch.save({**state, "hook": print}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only a pickle that runs code restores"):
        load(tmp_path, kind="kl")


def test_a_hub_name_without_network(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("diffusers.AutoencoderKL.load_config", no_network)
    with pytest.raises(ValueError, match=r"'owner/name'.*no network.*needs the network or a filled cache"):
        load("owner/name", kind="kl")
