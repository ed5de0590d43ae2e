"""Weights in and out: strict loading that lists what differs, and the files that a run writes."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_booth.files import replacing
from dit_booth.models.dit.config import DiTConfig
from dit_booth.models.unet.config import UNetConfig
from dit_booth.models.upstream.clip import from_transformers, unlike_transformers
from dit_booth.models.upstream.dit import from_official, inflate, is_official
from dit_booth.models.upstream.unet import (
    MAPPER,
    from_diffusers_unet,
    from_videobooth,
    of_video_only,
    unlike_diffusers,
)

log = logging.getLogger(__name__)

KEYS = ("ema_unet", "ema")
"""Where VideoBooth's files have their averaged weights."""
_BROKEN = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    AssertionError,
    struct.error,
)
"""What torch.load raises for files that were cut off, damaged or are something else."""

ASSETS = Path(__file__).parents[1] / "assets"
LISTED = 20
"""Names of each kind that an error lists; their number is always said."""


def load_start(backbone: nn.Module, text: nn.Module, source: str, kind: str) -> dict[str, Tensor]:
    """Load the backbone's start, and the text encoder's where the source has one; returns what it has for strategies.

    source: `embedded`, `none`, a run folder, a weights file of ours, a Stable Diffusion folder (diffusers),
    VideoBooth's U-Net (.pt), or DiT's official file (.pt). ValueError: it is missing, or of another architecture; the
    error lists what differs.
    """
    if source == "none":
        return {}
    path = ASSETS / f"{kind}.safetensors" if source == "embedded" else Path(source).expanduser()
    if path.is_dir() and (folder := _unet_folder(path)):
        _load_diffusers(backbone, text, path, folder, f"weights={source}")
        return {}
    file = path / "weights.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(
            f"weights is {source!r}, but {file} is not a file; use embedded, none, a run folder, a .safetensors file,"
            " a Stable Diffusion folder (with unet/config.json), VideoBooth's U-Net or DiT (.pt)"
        )
    what = f"weights={source}: {file.name} for the {kind} backbone"
    state, _ = read_any(file)
    if is_official(state):
        _load_dit(backbone, state, what)
        return {}
    if source != "embedded" and not path.is_dir() and not part(state, "backbone."):
        split = from_videobooth(state)
        _check_branches(backbone, split.backbone, f"weights={source}")
        load_strictly(backbone, split.backbone, what)
        return split.strategy
    load_strictly(backbone, part(state, "backbone."), what)
    if words := part(state, "text."):
        load_strictly(text, words, f"weights={source}: {file.name} for the text encoder")
    return {}


def _unet_folder(path: Path) -> Path | None:
    """The folder of the U-Net in a diffusers pipeline's folder, or the folder itself if it is the U-Net's."""
    return next((folder for folder in (path / "unet", path) if (folder / "config.json").is_file()), None)


def _load_diffusers(backbone: nn.Module, text: nn.Module, path: Path, folder: Path, what: str) -> None:
    """A Stable Diffusion 1.x U-Net, inflated; the pipeline's text encoder too, where `path` has one."""
    config = getattr(backbone, "config", None)
    if not isinstance(config, UNetConfig):
        raise ValueError(f"{what} is a Stable Diffusion folder, which holds a U-Net; set --backbone unet")
    file = folder / "config.json"
    refuse(unlike_diffusers(read_json(file), config), f"{what}: {file}")
    state = from_diffusers_unet(read_folder(folder, "diffusion_pytorch_model"), backbone.state_dict())
    load_strictly(backbone, state, f"{what}: {folder} for the unet backbone")
    file = path / "text_encoder" / "config.json"
    if folder == path or not file.is_file():
        return
    fix = "choose the --clip.model that it is"
    refuse(unlike_transformers(read_json(file), text.get_submodule("transformer")), f"{what}: {file}", fix)
    words = from_transformers(read_folder(file.parent, "model", "pytorch_model"))
    own = text.state_dict()
    words = {"text_projection": own["text_projection"], **words}  # a pipeline has none: CLIP's stays
    load_strictly(text, words, f"{what}: {file.parent} for the text encoder", fix=fix)


def _load_dit(backbone: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """DiT's image model, inflated."""
    config = getattr(backbone, "config", None)
    if not isinstance(config, DiTConfig):
        raise ValueError(f"{what}: these are DiT's weights; set --backbone dit")
    load_strictly(backbone, inflate(from_official(state), backbone.state_dict(), config), what)


def _check_branches(backbone: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """What the listing of missing and unexpected names would not say, or not how to mend."""
    config = getattr(backbone, "config", None)
    if not isinstance(config, UNetConfig):
        return
    there = any(name.startswith("watermark_") for name in state)
    if there != config.watermark:
        raise ValueError(
            f"{what} has {'a' if there else 'no'} watermark branch, and unet.watermark is {config.watermark};"
            f" set --unet.watermark {there}"
        )
    if config.positions != "none":
        raise ValueError(
            f"{what} knows no positions, and unet.positions is {config.positions}; set --unet.positions none"
        )
    if "conv_in.weight" in state and not any(map(of_video_only, state)):
        raise ValueError(f"{what} is an image U-Net; give its folder, with config.json, and it is inflated")


def load_strategies(
    strategies: nn.Module, state: Mapping[str, Tensor], what: str, *, optional: bool = False
) -> frozenset[str]:
    """Load the strategies' tensors that a source has: of each mapper or tree of taps in it, all. Returns their names.

    Those of strategies that `strategies` lacks are left out, with a line in the log; `optional` allows that for all.
    What no source has keeps its start: `training.stage.check_starts` says where that cannot be meant.
    ValueError: see `load_strictly`.
    """
    present = dict(strategies.named_children())
    mine = {name: tensor for name, tensor in state.items() if name.split(".")[0] in present}
    others = ", ".join(sorted({name.split(".")[0] for name in state if name not in mine}))
    if not mine and not optional:
        raise ValueError(
            f"{what} is for {others or 'nothing'}, and the run's strategies are {', '.join(present)}"
        )
    if others:
        log.info("%s: what it has for %s is not used: the run has no such strategy", what, others)
    groups = {_group(name) for name in mine}
    names = [name for name in strategies.state_dict() if _group(name) in groups]
    load_strictly(strategies, mine, what, names=names, fix="set the strategies' options as it was made with")
    return frozenset(mine)


def _group(name: str) -> str:
    return ".".join(name.split(".")[:2])  # token_replacement.mapper, kv_concat.taps


def read_strategies(source: str) -> dict[str, Tensor]:
    """The strategies' tensors in VideoBooth's or ELITE's mapper, VideoBooth's U-Net, a run folder or its file.

    A bare state dict that torch.save wrote is ELITE's: its K/V of the text attention are left out, as in VideoBooth's
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
    return found or state  # another strategy's own names


# ---- files -------------------------------------------------------------------------------------------------


def read_any(file: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a .safetensors file, or of one that torch.save wrote, and the key that these stood under."""
    return (read(file), "") if file.suffix == ".safetensors" else read_pickle(file)


def read_folder(folder: Path, *stems: str) -> dict[str, Tensor]:
    """The weights in a folder of diffusers or transformers: ``<stem>.safetensors``, else ``<stem>.bin``."""
    files = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]
    for file in files:
        if file.is_file():
            return read_any(file)[0]
    names = " or ".join(file.name for file in files)
    raise ValueError(f"{folder} has no {names}; copy the weights there, in one file")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; ValueError if it is none."""
    try:
        settings = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}; copy it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}, not an object; copy it again")
    return settings


def read_pickle(file: Path) -> tuple[dict[str, Tensor], str]:
    """The averaged weights in a file that torch.save wrote, in float32, and their key (empty: the file is bare).

    The file is read by torch's weights-only unpickler, which runs no code. Training scripts like DiT's keep their
    arguments beside the weights: an `argparse.Namespace`, which holds plain values, may be there. ValueError: code
    would need to run, the file is broken, or it holds no weights.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
    except _BROKEN as error:
        if unsafe := re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)", str(error)):
            raise ValueError(
                f"{file} holds {unsafe[1]}, which only a pickle that runs code restores; that is not done: have someone"
                " you trust save its tensors alone, as .safetensors"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} cannot be read as PyTorch weights: {reason}; it may be cut off, or a Git LFS pointer:"
            " copy it again"
        ) from error
    keys = [key for key in KEYS if isinstance(content, dict) and isinstance(content.get(key), dict)]
    key = keys[0] if keys else ""
    state = content[key] if key else content
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        names = (
            ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(
            f"{file} holds no weights under {' or '.join(KEYS)}, and is no state dict itself (it has: {names});"
            " save the state dict, or give another file"
        )
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, key


def read(file: Path) -> dict[str, Tensor]:
    """A safetensors file in float32; ValueError if it is broken."""
    try:
        return {name: t.float() if t.is_floating_point() else t for name, t in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors: {error}; it may be cut off: copy it again"
        ) from error


def write(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically: the file is there whole, or not at all."""
    plain = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    with replacing(file) as partial:
        save_file(plain, partial, dict(metadata) if metadata else None)  # {} without tensors is a broken file


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def refuse(unlike: list[str], what: str, fix: str = "") -> None:
    """ValueError if a source is unlike what was built."""
    if unlike:
        raise ValueError(f"{what}: {'; '.join([*unlike, *([fix] if fix else [])])}")


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    what: str,
    *,
    partial: bool = False,
    names: Collection[str] | None = None,
    fix: str = "choose the sizes that the file was made with, or weights=none",
) -> None:
    """Load a state dict; what is missing, unexpected or of another shape is a listing error that ends with `fix`.

    `names` must be there (default: all of the module's; `partial`: none).
    """
    own = module.state_dict()
    missing = [] if partial else [k for k in (own if names is None else names) if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} here"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    found = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''})"
        for kind, names in problems
        if names
    )
    if found:
        raise ValueError(f"{what}: the weights are of another architecture: {found}; {fix}")
    module.load_state_dict(dict(state), strict=False)  # checked above
