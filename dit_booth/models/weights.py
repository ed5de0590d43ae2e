"""Weights files: safetensors and pickles, read strictly and written atomically."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_booth.errors import HasShape, list_mismatches
from dit_booth.files import PACKAGE, replacing, within

JsonObject = Mapping[str, Any]
"""Content of a configuration file."""

EMA_KEYS = ("ema_unet", "ema")
"""Keys of the averaged weights in VideoBooth's and DiT's files."""
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    AssertionError,
    struct.error,
)
"""Errors of torch.load for files that are cut off, damaged or of another format."""

ASSETS = PACKAGE / "assets"
LISTED = 20
"""Names of each kind that an error lists, beside their count."""


def read_any(file: Path) -> tuple[dict[str, Tensor], str]:
    """Read a .safetensors file, or one that torch.save wrote: its tensors and the key that they stood under."""
    return (read(file), "") if file.suffix == ".safetensors" else read_pickle(file)


def read_folder(folder: Path, *stems: str) -> dict[str, Tensor]:
    """Read the weights of a diffusers or transformers folder: ``<stem>.safetensors``, else ``<stem>.bin``."""
    files = [folder / f"{stem}{suffix}" for suffix in (".safetensors", ".bin") for stem in stems]
    for file in files:
        if file.is_file():
            return read_any(file)[0]
    names = " or ".join(file.name for file in files)
    raise ValueError(f"{folder} has no {names}; copy the weights there, in one file")


def read_json(file: Path) -> JsonObject:
    """Read a JSON object; ValueError if the file holds anything else."""
    try:
        settings = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}; copy it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a {type(settings).__name__}, not an object; copy it again")
    return settings


def read_pickle(file: Path) -> tuple[dict[str, Tensor], str]:
    """Read the averaged weights of a file that torch.save wrote, in float32, and their key ("": a bare state dict).

    torch's weights-only unpickler reads the file and runs no code. An `argparse.Namespace`, where training scripts
    like DiT's keep their arguments, is allowed: it holds plain values. ValueError: the file needs code to run, is
    broken, or holds no weights.
    """
    content = _unpickle(file)
    keys = [key for key in EMA_KEYS if isinstance(content, dict) and isinstance(content.get(key), dict)]
    key = keys[0] if keys else ""
    state = content[key] if key and isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        names = (
            ", ".join(map(str, list(content)[:4])) if isinstance(content, dict) else type(content).__name__
        )
        raise ValueError(
            f"{file} holds no weights under {' or '.join(EMA_KEYS)}, and is no state dict itself (it has: {names});"
            " save the state dict, or give another file"
        )
    return _to_float32(state), key


def _unpickle(file: Path) -> object:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
            )
    except _UNREADABLE as error:
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


def _to_float32(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def read(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file in float32; ValueError if it is broken."""
    try:
        return _to_float32(load_file(file))
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors: {error}; it may be cut off: copy it again"
        ) from error


def write(file: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors atomically: the file appears whole, or not at all. OSError: such as a full disk."""
    plain = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    with replacing(file) as partial:
        try:
            save_file(
                plain, partial, dict(metadata) if metadata else None
            )  # {} without tensors is a broken file
        except SafetensorError as error:
            raise OSError(f"{file} cannot be written: {error}") from error


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without the prefix."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def raise_mismatches(mismatches: list[str], source: str, fix: str = "") -> None:
    """Raise ValueError if a source differs from the model that was built."""
    if mismatches:
        raise ValueError(f"{source}: {'; '.join([*mismatches, *([fix] if fix else [])])}")


def load_strictly(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    partial: bool = False,
    names: Collection[str] | None = None,
    fix: str = "choose the sizes that the file was made with, or weights=none",
) -> None:
    """Load a state dict. ValueError: lists names that are missing, unexpected or of another shape, then `fix`.

    `names` are required (default: all names of the module; with `partial`: none).
    """
    own = module.state_dict()
    required = () if partial else own if names is None else names
    _raise_unless_equal(own, state, required, source, fix)
    module.load_state_dict(dict(state), strict=False)  # checked above


def _raise_unless_equal(
    own: Mapping[str, HasShape],
    state: Mapping[str, HasShape],
    required: Collection[str],
    source: str,
    fix: str,
) -> None:
    found = list_mismatches(own, state, required, LISTED)
    if found:
        raise ValueError(f"{source}: the weights are of another architecture: {found}; {fix}")


# ---- folders of shards -------------------------------------------------------------------------------------


class Size(NamedTuple):
    """The shape of a tensor that was not read."""

    shape: torch.Size


class Shards(NamedTuple):
    """Tensors of a folder's safetensors files, unread: their shapes, and the files they are in."""

    shapes: dict[str, Size]
    files: dict[str, Path]

    @classmethod
    def find(cls, folder: Path, stem: str) -> Shards:
        """Find ``<stem>.safetensors``, or the files that ``<stem>.safetensors.index.json`` lists.

        ValueError: a file is missing or broken, lies outside the folder, or lacks a tensor that the index names.
        """
        index, whole = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if not index.is_file():
            if not whole.is_file():
                raise ValueError(f"{folder} has no {whole.name} or {index.name}; copy the weights there")
            shapes = _read_shapes(whole)
            return cls(shapes, dict.fromkeys(shapes, whole))
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise ValueError(f"{index} has no weight_map; copy it again")
        files = {name: within(str(index), folder, Path(str(file))) for name, file in listed.items()}
        there: dict[str, Size] = {}
        for file in dict.fromkeys(files.values()):
            if not file.is_file():
                raise ValueError(f"{index} names {file.name}, which is not there; copy all shards")
            there |= _read_shapes(file)
        lost = [name for name in files if name not in there]
        if lost:
            raise ValueError(
                f"{files[lost[0]]} lacks {lost[0]}, which {index.name} says it has; copy it again"
            )
        return cls({name: there[name] for name in files}, files)


def _read_shapes(file: Path) -> dict[str, Size]:
    try:
        with safe_open(file, "pt") as opened:
            names = opened.keys()  # no dict
            return {name: Size(torch.Size(opened.get_slice(name).get_shape())) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as safetensors: {error}; it may be cut off: copy it again"
        ) from error


@torch.no_grad()
def load_shards(module: nn.Module, shards: Shards, source: str, upstream: Mapping[str, str]) -> None:
    """Load a folder's tensors one at a time, so that memory holds the module's and one more. ValueError: mismatches.

    upstream: our name -> the folder's, for each of its tensors.
    """
    own = module.state_dict()
    given = {name: shards.shapes[theirs] for name, theirs in upstream.items()}
    fix = "choose the sizes that the file was made with, or weights=none"
    _raise_unless_equal(own, given, own, source, fix)
    for name, theirs in upstream.items():
        # Opened anew: what was read of a mapped file stays resident.
        with safe_open(shards.files[theirs], "pt") as opened:
            own[name].copy_(opened.get_tensor(theirs))
