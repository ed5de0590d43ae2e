"""Video features: functions `n f 3 h w` in [-1, 1] -> `n d`, of networks that the user gives as files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.evaluation.learned.networks import Device, Weights
from dit_booth.evaluation.learned.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from dit_booth.evaluation.learned.weights import (
    find_file,
    find_weights,
    read_torchscript,
    read_weights,
)

VideoFeatures = Callable[[Tensor], Tensor]
"""`n f 3 h w` in [-1, 1], of any size, to `n d`; resizes and normalizes for its network."""

_SIDE = 224
_I3D_FRAMES = 10  # fewer leave I3D nothing after its strides over time
_FILES = ("model.safetensors", "pytorch_model.bin")


def load_i3d(weights: Weights, device: Device = "cpu") -> VideoFeatures:
    """Load I3D of Kinetics-400 from a TorchScript file (StyleGAN-V's `i3d_torchscript.pt`), the network of FVD.

    Frames are resized to 224 (shorter side, bilinear), cropped at the center, and stay in [-1, 1]; the features are
    the 400 logits. At least 10 frames.

    Raises:
        ValueError: the file is absent or no TorchScript; when called, a video is too short.
    """
    file = find_weights("i3d", weights.get("i3d"), example="i3d_torchscript.pt")
    module = read_torchscript(file).to(device)
    schema = module._c._get_method("forward").schema
    takes = {argument.name for argument in schema.arguments}
    options = {"rescale": False, "resize": False, "return_features": True}

    def features(videos: Tensor) -> Tensor:
        if videos.shape[1] < _I3D_FRAMES:
            raise ValueError(
                f"the videos have {videos.shape[1]} frames; I3D needs at least {_I3D_FRAMES}: drop fvd"
            )
        prepared = rearrange(_resize_and_crop(videos.to(device)), "n f c h w -> n c f h w")
        return _check(
            module(prepared, **{k: v for k, v in options.items() if k in takes}), len(videos), "i3d"
        )

    return features


def load_vjepa(weights: Weights, device: Device = "cpu") -> VideoFeatures:
    """Load V-JEPA from a TorchScript file, the network of JEDi (Luo et al. 2024).

    The released metric takes ViT-H/16 and the pooler of its SSv2 probe.
    The module maps `n 3 f 224 224`, normalized with ImageNet's statistics, to `n d`.

    Raises:
        ValueError: the file is absent or no TorchScript.
    """
    file = find_weights("vjepa", weights.get("vjepa"), example="vjepa_torchscript.pt")
    module = read_torchscript(file).to(device)

    def features(videos: Tensor) -> Tensor:
        prepared = rearrange(_normalize(_resize_and_crop(videos.to(device))), "n f c h w -> n c f h w")
        return _check(module(prepared), len(videos), "vjepa")

    return features


def load_videomae(weights: Weights, device: Device = "cpu") -> VideoFeatures:
    """Load VideoMAE from a transformers folder, the network of CD-FVD (Ge et al. 2024), less biased to single frames.

    As many frames as the network takes (16) are sampled evenly, resized to 224 (shorter side, bilinear), cropped and
    normalized with ImageNet's statistics; the features are the mean over tokens, after the classifier's norm if the
    folder has one.

    Raises:
        ValueError: transformers or the folder is absent, the weights do not fit; when called, a video is too short.
    """
    path = find_weights(
        "videomae",
        weights.get("videomae"),
        example="videomae-base-finetuned-ssv2",
        files=(*_FILES, "config.json"),
    )
    encoder, norm = _read_videomae(path)
    encoder.requires_grad_(False).to(device)
    norm.requires_grad_(False).to(device)
    wanted, side = int(encoder.config.num_frames), int(encoder.config.image_size)

    def features(videos: Tensor) -> Tensor:
        frames = videos.shape[1]
        if frames < wanted:
            raise ValueError(
                f"the videos have {frames} frames; this VideoMAE needs {wanted}: drop fvd_videomae"
            )
        chosen = torch.linspace(0, frames - 1, wanted).round().long()
        prepared = _normalize(_resize_and_crop(videos[:, chosen].to(device), side))
        return _check(norm(encoder(prepared).last_hidden_state.mean(dim=1)), len(videos), "videomae")

    return features


def _read_videomae(path: Path) -> tuple[Any, nn.Module]:
    """Return the encoder of a transformers folder and the norm of its classifier (the identity if it has none)."""
    try:
        from transformers import VideoMAEForVideoClassification, VideoMAEModel
    except ImportError as error:
        raise ValueError(
            f"fvd_videomae needs transformers ({error}); install it: pip install transformers"
        ) from error
    source = f"weights videomae = {path}"
    if not (path / "config.json").is_file():
        raise ValueError(f"{source}: no config.json; give a transformers folder of VideoMAE")
    classifies = "fc_norm.weight" in read_weights(find_file("videomae", path, _FILES))
    kind = VideoMAEForVideoClassification if classifies else VideoMAEModel
    try:
        loaded: Any = kind.from_pretrained(
            path, local_files_only=True, weights_only=True, output_loading_info=True
        )
        model, info = loaded
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{source} holds the weights of another network: {error}; give VideoMAE's folder"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{source} holds the weights of another network: {len(missing)} missing ({', '.join(missing[:3])});"
            " give VideoMAE's folder"
        )
    return (model.videomae, model.fc_norm) if classifies else (model, nn.Identity())


def _resize_and_crop(videos: Tensor, side: int = _SIDE) -> Tensor:
    """Resize the shorter side bilinearly, crop the center: n f 3 side side, still in [-1, 1]."""
    frames = rearrange(videos.float().clamp(-1, 1), "n f c h w -> (n f) c h w")
    height, width = frames.shape[-2:]
    short = min(height, width)
    size = (side * height // short, side * width // short)
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False)
    top, left = ((length - side) // 2 for length in size)
    frames = frames[..., top : top + side, left : left + side]
    return rearrange(frames, "(n f) c h w -> n f c h w", n=len(videos))


def _normalize(videos: Tensor) -> Tensor:
    mean, std = (rearrange(videos.new_tensor(x), "c -> c 1 1") for x in (IMAGENET_MEAN, IMAGENET_STD))
    return ((videos + 1) / 2 - mean) / std


def _check(features: Tensor, rows: int, name: str) -> Tensor:
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(
            f"{name} returned shape {tuple(features.shape)}; the module must return features ({rows}, d)"
        )
    return features
