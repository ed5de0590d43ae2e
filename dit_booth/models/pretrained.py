"""Initial weights of a model: the backbone's, the text encoder's and the strategies', from any supported source."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from dit_booth.models.dit.config import DiTConfig
from dit_booth.models.unet.config import UNetConfig
from dit_booth.models.upstream.clip import find_clip_mismatches, from_transformers
from dit_booth.models.upstream.dit import from_official, inflate, is_official_dit
from dit_booth.models.upstream.stable_diffusion import find_unet_mismatches, from_diffusers, is_video_only
from dit_booth.models.upstream.videobooth import MAPPER, from_videobooth
from dit_booth.models.upstream.wan import (
    DIFFUSERS,
    ORIGINAL,
    find_wan_mismatches,
    from_original,
    from_original_settings,
    is_original_wan,
)
from dit_booth.models.wan.model import VideoWan
from dit_booth.models.weights import (
    ASSETS,
    Shards,
    load_shards,
    load_strictly,
    part,
    raise_mismatches,
    read_any,
    read_folder,
    read_json,
)

log = logging.getLogger(__name__)
UNET = "UNet2DConditionModel"
"""``_class_name`` of Stable Diffusion's U-Net in diffusers."""


def load_pretrained(backbone: nn.Module, text: nn.Module, source: str, kind: str) -> dict[str, Tensor]:
    """Load the backbone, and the text encoder if the source has one; return the source's tensors for strategies.

    source: `embedded`, `none`, a run folder, a weights file of ours, a Stable Diffusion folder (diffusers), a folder or
    file of Wan (diffusers' or the original's names), VideoBooth's U-Net (.pt), or DiT's official file (.pt).
    ValueError: it is missing, or of another architecture; the error lists the differences.
    """
    if source == "none":
        return {}
    path = ASSETS / f"{kind}.safetensors" if source == "embedded" else Path(source).expanduser()
    if source == "embedded" and not path.is_file():
        raise ValueError(
            f"weights is 'embedded', but no {kind} weights are embedded; use none, or a source of yours"
        )
    if path.is_dir() and (folder := _find_network_folder(path)):
        _load_folder(backbone, text, path, folder, f"weights={source}")
        return {}
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"weights is {source!r}, but {file} is not a file; use embedded, none, a run folder, a .safetensors file,"
            " a Stable Diffusion or Wan folder (with unet/ or transformer/config.json), VideoBooth's U-Net or DiT (.pt)"
        )
    label = f"weights={source}: {file.name} for the {kind} backbone"
    state, _ = read_any(file)
    if is_official_dit(state):
        _load_dit(backbone, state, label)
        return {}
    if isinstance(backbone, VideoWan) and is_original_wan(state):
        load_strictly(backbone, from_original(state), label)
        return {}
    if source != "embedded" and not path.is_dir() and not part(state, "backbone."):
        split = from_videobooth(state)
        _check_branches(backbone, split.backbone, f"weights={source}")
        load_strictly(backbone, split.backbone, label)
        return split.strategy
    load_strictly(backbone, part(state, "backbone."), label)
    if words := part(state, "text."):
        load_strictly(text, words, f"weights={source}: {file.name} for the text encoder")
    return {}


def _find_network_folder(path: Path) -> Path | None:
    """Return the network's folder inside a pipeline (diffusers), or the folder itself if it is a network's."""
    return next(
        (
            folder
            for folder in (path / "unet", path / "transformer", path)
            if (folder / "config.json").is_file()
        ),
        None,
    )


def _load_folder(backbone: nn.Module, text: nn.Module, path: Path, folder: Path, source: str) -> None:
    """Load a network's folder by the kind that its ``config.json`` names. ValueError: none that is known."""
    kind = read_json(folder / "config.json").get("_class_name", UNET)
    if kind in (DIFFUSERS, ORIGINAL):
        _load_wan(backbone, folder, source)
    elif kind == UNET:
        _load_diffusers(backbone, text, path, folder, source)
    else:
        raise ValueError(
            f"{source}: {folder / 'config.json'} is of a {kind}; give a folder of Stable Diffusion 1.x ({UNET}) or of"
            f" Wan ({DIFFUSERS}, {ORIGINAL})"
        )


def _load_wan(backbone: nn.Module, folder: Path, source: str) -> None:
    """Load Wan's transformer from diffusers' folder, or from the original's."""
    if not isinstance(backbone, VideoWan):
        raise ValueError(f"{source} is a Wan folder; set --backbone wan")
    file = folder / "config.json"
    settings, shards = read_json(file), Shards.find(folder, "diffusion_pytorch_model")
    names = {name: name for name in shards.files}  # ours -> the folder's
    if settings.get("_class_name") == ORIGINAL:
        settings, names = from_original_settings(settings, names), from_original(names)
    mismatches = find_wan_mismatches(
        settings, backbone.config, channels=backbone.exit.dim, text_dim=backbone.text_dim
    )
    raise_mismatches(mismatches, f"{source}: {file}")
    load_shards(backbone, shards, f"{source}: {folder} for the wan backbone", names)


def _load_diffusers(backbone: nn.Module, text: nn.Module, path: Path, folder: Path, source: str) -> None:
    """Load a Stable Diffusion 1.x U-Net, inflated, and the pipeline's text encoder if `path` has one."""
    config = getattr(backbone, "config", None)
    if not isinstance(config, UNetConfig):
        raise ValueError(f"{source} is a Stable Diffusion folder, which holds a U-Net; set --backbone unet")
    file = folder / "config.json"
    raise_mismatches(find_unet_mismatches(read_json(file), config), f"{source}: {file}")
    state = from_diffusers(read_folder(folder, "diffusion_pytorch_model"), backbone.state_dict())
    load_strictly(backbone, state, f"{source}: {folder} for the unet backbone")
    file = path / "text_encoder" / "config.json"
    if folder == path or not file.is_file():
        return
    fix = "choose the --clip.model that it is"
    mismatches = find_clip_mismatches(read_json(file), text.get_submodule("transformer"))
    raise_mismatches(mismatches, f"{source}: {file}", fix)
    words = from_transformers(read_folder(file.parent, "model", "pytorch_model"))
    own = text.state_dict()
    words = {"text_projection": own["text_projection"], **words}  # a pipeline has none: keep CLIP's
    load_strictly(text, words, f"{source}: {file.parent} for the text encoder", fix=fix)


def _load_dit(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load DiT's image model, inflated."""
    config = getattr(backbone, "config", None)
    if not isinstance(config, DiTConfig):
        raise ValueError(f"{source}: these are DiT's weights; set --backbone dit")
    load_strictly(backbone, inflate(from_official(state), backbone.state_dict(), config), source)


def _check_branches(backbone: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError for mismatches that a list of missing and unexpected names would not explain."""
    config = getattr(backbone, "config", None)
    if not isinstance(config, UNetConfig):
        return
    there = any(name.startswith("watermark_") for name in state)
    if there != config.watermark:
        raise ValueError(
            f"{source} has {'a' if there else 'no'} watermark branch, and unet.watermark is {config.watermark};"
            f" set --unet.watermark {there}"
        )
    if config.positions != "none":
        raise ValueError(
            f"{source} knows no positions, and unet.positions is {config.positions}; set --unet.positions none"
        )
    if "conv_in.weight" in state and not any(map(is_video_only, state)):
        raise ValueError(f"{source} is an image U-Net; give its folder, with config.json, and it is inflated")


def load_strategy_weights(
    strategies: nn.Module, state: Mapping[str, Tensor], source: str, *, optional: bool = False
) -> frozenset[str]:
    """Load the tensors that a source has for the strategies, and return their names.

    A mapper or tree of taps must be complete. Tensors of strategies that `strategies` lacks are skipped, with a line in
    the log; `optional` allows this for all of them. Parameters without a source keep their initial values:
    `training.stage.check_starts` reports where that cannot be intended. ValueError: see `load_strictly`.
    """
    present = dict(strategies.named_children())
    mine = {name: tensor for name, tensor in state.items() if name.split(".")[0] in present}
    others = ", ".join(sorted({name.split(".")[0] for name in state if name not in mine}))
    if not mine and not optional:
        raise ValueError(
            f"{source} is for {others or 'nothing'}, and the run's strategies are {', '.join(present)}"
        )
    if others:
        log.info("%s: tensors for %s are not used: the run has no such strategy", source, others)
    groups = {_group(name) for name in mine}
    names = [name for name in strategies.state_dict() if _group(name) in groups]
    load_strictly(
        strategies, mine, source, names=names, fix="set the strategies' options that it was made with"
    )
    return frozenset(mine)


def _group(name: str) -> str:
    return ".".join(name.split(".")[:2])  # token_replacement.mapper, kv_concat.taps


def read_strategy_weights(source: str) -> dict[str, Tensor]:
    """Read the strategies' tensors of VideoBooth's or ELITE's mapper, VideoBooth's U-Net, a run folder or its file.

    A bare state dict that torch.save wrote is ELITE's: its K/V of the text attention are skipped, as in VideoBooth's
    first stage. ValueError: the file is missing or broken.
    """
    path = Path(source).expanduser()
    file = path / "strategy.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"strategy_weights has {source!r}, but {file} is not a file; give a mapper (.pt), VideoBooth's U-Net (.pt),"
            " a run folder, or its strategy.safetensors"
        )
    state, key = read_any(file)
    if any(".taps." in name or name.startswith(MAPPER) for name in state):
        return state
    found = from_videobooth(state).strategy
    mapper = {name: tensor for name, tensor in found.items() if name.startswith(MAPPER)}
    if file.suffix != ".safetensors" and not key and mapper and len(mapper) < len(found):
        log.info("strategy_weights %s: ELITE's mapper; the text attention's K/V stay the backbone's", source)
        return mapper
    return found or state  # names of another strategy
