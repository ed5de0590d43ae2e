"""Weights in and out: strict loading that lists what differs, and the files that a run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ASSETS = Path(__file__).parents[1] / "assets"


def load_start(backbone: nn.Module, text: nn.Module, source: str, kind: str) -> None:
    """Load the backbone's start (and the text encoder's, where the file has one): `embedded`, `none` or a path.

    ValueError: the file is missing, or belongs to another architecture; the error lists what differs.
    """
    if source == "none":
        return
    file = ASSETS / f"{kind}.safetensors" if source == "embedded" else Path(source)
    if file.is_dir():
        file = file / "weights.safetensors"
    if not file.is_file():
        raise ValueError(
            f"weights is {source!r}, but {file} is not a file; use embedded, none, a run folder or a .safetensors file"
        )
    state = read(file)
    load_strictly(
        backbone, part(state, "backbone."), f"weights={source}: {file.name} for the {kind} backbone"
    )
    if words := part(state, "text."):
        load_strictly(text, words, f"weights={source}: {file.name} for the text encoder")


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
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".part")
    plain = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    save_file(plain, partial, dict(metadata) if metadata else None)  # {} without tensors is a broken file
    partial.replace(file)


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(text)
    partial.replace(file)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], what: str, *, partial: bool = False
) -> None:
    """Load a state dict; what is missing (unless `partial`), unexpected or of another shape is a listing error."""
    own = module.state_dict()
    missing = [] if partial else [k for k in own if k not in state]
    unexpected = [k for k in state if k not in own]
    shapes = [
        f"{k}: {tuple(v.shape)} in the file, {tuple(own[k].shape)} here"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
    found = "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for kind, names in problems
        if names
    )
    if found:
        raise ValueError(
            f"{what}: the weights are of another architecture: {found};"
            " choose the sizes that the file was made with, or weights=none"
        )
    module.load_state_dict(dict(state), strict=not partial)
