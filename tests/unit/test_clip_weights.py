"""Which CLIP gets built, from which weights, and errors that name the fix."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dit_booth.models.clip import weights as clip_weights
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import ImageEncoder, TextEncoder, build_clip
from dit_booth.models.clip.weights import build_clip_model, clip_state_dict

RANDOM = ClipConfig(pretrained="none")


def shake(model: nn.Module) -> nn.Module:
    """Random weights everywhere: initial biases of 0 and norms of 1 would hide mistakes."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def test_weights_round_trip(tmp_path):
    model = shake(build_clip_model(RANDOM))
    save_file(clip_state_dict(model), tmp_path / "clip.safetensors")
    torch.save(clip_state_dict(model), tmp_path / "clip.pt")
    save_file(clip_state_dict(model, torch.float16), tmp_path / "half.safetensors")
    image = torch.rand(1, 3, 32, 32)
    expected = ImageEncoder(model)(image).embedding
    for name, tolerance in (("clip.safetensors", 0), ("clip.pt", 0), ("half.safetensors", 0.05)):
        _, encoder = build_clip(ClipConfig(pretrained=str(tmp_path / name)))
        found = encoder(image).embedding
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= tolerance


def test_embedded_weights_come_from_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_weights, "EMBEDDED_WEIGHTS", tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match=r"embedded'.*clip.safetensors is missing.*pretrained = none"):
        build_clip_model(ClipConfig())
    model = shake(build_clip_model(RANDOM))
    save_file(clip_state_dict(model), tmp_path / "clip.safetensors")
    assert torch.equal(build_clip_model(ClipConfig()).text_projection, model.text_projection)
    with pytest.raises(ValueError, match=r"embedded' is dit-booth-tiny only, not model = 'ViT-B-32'"):
        build_clip_model(ClipConfig(model="ViT-B-32"))


def test_local_folder(tmp_path):
    config = ClipConfig(pretrained=f"local-dir:{tmp_path}")
    with pytest.raises(ValueError, match=r"open_clip_config.json does not exist"):
        build_clip_model(config)
    settings = json.loads((clip_weights._CONFIGS / "dit-booth-tiny.json").read_text())
    settings["text_cfg"]["layers"] = 1
    mean = {"mean": [0.1, 0.2, 0.3]}
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": settings, "preprocess_cfg": mean})
    )
    with pytest.raises(ValueError, match=r"holds no .safetensors"):
        build_clip_model(config)
    save_file(clip_state_dict(shake(build_clip_model(RANDOM))), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"could not be loaded(?s:.*)resblocks\.1"):
        build_clip_model(config)
    import open_clip

    model = shake(open_clip.CLIP(**settings))
    save_file(clip_state_dict(model), tmp_path / "model.safetensors")
    text, encoder = build_clip(config)
    assert len(text.transformer.resblocks) == 1 and torch.equal(text.text_projection, model.text_projection)
    torch.testing.assert_close(encoder.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))


class Payload:
    def __reduce__(self):
        return (logging.critical, ("a pickle ran code",))


def test_bad_weights_are_refused(tmp_path, caplog):
    torch.save({"state_dict": Payload()}, tmp_path / "evil.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    save_file({"logit_scale": torch.zeros(())}, tmp_path / "short.safetensors")
    for name in ("evil.pt", "broken.safetensors", "short.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}.*could not be loaded(?s:.*)as .safetensors"):
            build_clip_model(ClipConfig(pretrained=str(tmp_path / name)))
    assert "a pickle ran code" not in caplog.text
    (tmp_path / "clip.txt").write_text("")
    with pytest.raises(ValueError, match=r"clip.txt.*must end in .safetensors"):
        build_clip_model(ClipConfig(pretrained=str(tmp_path / "clip.txt")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ClipConfig(model="ViT-L-14-quikgelu"),
            "'ViT-L-14-quikgelu' is not an open_clip model; nearest: .*quickgelu",
        ),
        (
            ClipConfig(model="ViT-L-14", pretrained="openai"),
            "with QuickGELU.*use model = 'ViT-L-14-quickgelu'",
        ),
        (
            ClipConfig(model="ViT-B-32-quickgelu", pretrained="laion2b_s34b_b79k"),
            "neither a file nor a tag of ViT-B-32-quickgelu.*openai",
        ),
        (ClipConfig(pretrained="/nowhere/clip.safetensors"), "'/nowhere/clip.safetensors' is neither a file"),
        (ClipConfig(model="xlm-roberta-base-ViT-B-32", pretrained="none"), "another tokenizer"),
        (ClipConfig(model="coca_ViT-B-32", pretrained="none"), "another tokenizer"),
    ],
)
def test_bad_configurations(config, message):
    with pytest.raises(ValueError, match=message):
        build_clip_model(config)


def test_a_failed_download_names_the_fix(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("open_clip.factory.download_pretrained", no_network)
    with pytest.raises(ValueError, match=r"openai'.*no network.*give a local .safetensors"):
        build_clip_model(ClipConfig(model="ViT-B-32-quickgelu", pretrained="openai"))


def test_towers_that_are_not_clips_are_refused():
    model = build_clip_model(RANDOM)
    model.text_pool_type = "last"
    with pytest.raises(ValueError, match="text tower is not CLIP's"):
        TextEncoder(model)
    model.visual = nn.Identity()
    with pytest.raises(ValueError, match="image tower Identity is not"):
        ImageEncoder(model)
