"""Weights of feature networks: found by file, folder or hub name, read without running code, loaded strictly."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dit_booth.errors import list_mismatches

HUB = "hf-hub:"
"""Prefix of a model on the Hugging Face hub, as in timm: ``hf-hub:timm/vit_small_patch16_224.dino``."""
_LISTED = 3
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError)


def find_weights(option: str, given: str | None, *, example: str, files: Sequence[str] = ()) -> Path:
    """Return the file or folder of a network's weights.

    Args:
        option: name of the network in ``--weights``.
        given: a file, a folder, or ``hf-hub:owner/name``, whose `files` are downloaded (or taken from the cache).
        example: name of the original file, for the message.
        files: names of the weights on the hub, most wanted first, and of what belongs to them; empty: not on the hub.

    Raises:
        ValueError: no weights were given, or they do not exist.
    """
    if not given:
        hub = f" or --weights {option}={HUB}OWNER/NAME" if files else ""
        raise ValueError(
            f"{option} needs weights, and none were given; pass --weights {option}=FILE (the original is {example})"
            f"{hub}"
        )
    if given.startswith(HUB):
        if not files:
            raise ValueError(f"weights {option} = {given!r}: only a local file or folder; pass {example}")
        return _download(option, given.removeprefix(HUB), files)
    path = Path(given).expanduser()
    if not path.exists():
        raise ValueError(
            f"weights {option} = {given!r}: no such file or folder; copy {example} there, or pass"
            f" --weights {option}=FILE"
        )
    return path


def find_file(option: str, path: Path, files: Sequence[str]) -> Path:
    """Return `path` if it is a file; in a folder the first of `files` that exists. ValueError: there is none."""
    if path.is_file():
        return path
    found = next((path / name for name in files if (path / name).is_file()), None)
    if found is None:
        raise ValueError(
            f"weights {option} = {path}: the folder has none of {', '.join(files)}; copy one there"
        )
    return found


def _download(option: str, repository: str, files: Sequence[str]) -> Path:
    """Return the folder of a hub repository with those of `files` that it has, from the cache if possible."""
    from huggingface_hub import snapshot_download

    for cached in (True, False):
        try:
            folder = Path(snapshot_download(repository, allow_patterns=list(files), local_files_only=cached))
        except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors are among these
            reason = str(error).splitlines()[0]
            continue
        if any((folder / name).is_file() for name in files):
            return folder
        reason = f"it has none of {', '.join(files)}"
    raise ValueError(
        f"weights {option} = {HUB}{repository}: could not be loaded from the hub ({reason});"
        f" offline pass --weights {option}=FILE"
    )


def read_weights(file: Path, *, torchscript: bool = False) -> dict[str, Tensor]:
    """Read a state dict: .safetensors, or what torch.save wrote, through torch's weights-only unpickler.

    Args:
        torchscript: take the weights of a TorchScript archive too, the format of OpenAI's CLIP files.

    Raises:
        ValueError: the file is broken, needs code to be restored, or holds something else.
    """
    try:
        content = _read(file, torchscript)
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{file} cannot be read as plain weights: {reason}; save the network's state dict as .safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(x, Tensor) for x in content.values())
    ):
        raise ValueError(f"{file} holds no state dict; save the network's state dict as .safetensors")
    return {str(k): v.float() if v.is_floating_point() else v for k, v in content.items()}


def _read(file: Path, torchscript: bool) -> object:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    try:
        with warnings.catch_warnings():  # it announces what it finds in the file
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if torchscript and "TorchScript" in str(error):
            return dict(read_torchscript(file).state_dict())
        raise


def read_torchscript(file: Path) -> torch.jit.ScriptModule:
    """Load a TorchScript archive on the CPU, in eval mode. ValueError: the file is none.

    No Python is run, but the archive's own program is when it is called: take it from a source you trust.
    """
    try:
        with warnings.catch_warnings():  # PyTorch deprecates the format, in which FVD's network is published
            warnings.simplefilter("ignore", FutureWarning)
            module: torch.jit.ScriptModule = torch.jit.load(str(file), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file} is no TorchScript file: {reason}; save it with torch.jit.save") from error
    return module.eval()


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict in place. ValueError: names or shapes differ; the first few are listed."""
    own = module.state_dict()
    found = list_mismatches(own, state, own, _LISTED)
    if found:
        raise ValueError(f"{source} holds the weights of another network: {found}; give the file of this one")
    module.load_state_dict(dict(state))
