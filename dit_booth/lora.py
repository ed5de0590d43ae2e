"""LoRA in files of diffusers and PEFT: export of an adapter, and import as one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dit_booth.components import build
from dit_booth.config import RunConfig
from dit_booth.inject import Site
from dit_booth.models.assemble import build_backbone
from dit_booth.models.layers import linear_sites
from dit_booth.models.pretrained import load_strategy_weights
from dit_booth.models.upstream.peft import TAPS, Lora, from_peft, to_peft
from dit_booth.models.weights import part, read, write


def export_lora(source: str | Path, out: str | Path) -> list[str]:
    """Write strategy `lora` of an adapter as diffusers' ``load_lora_weights`` and PEFT read it; return lines about it.

    source: a run's folder, or its ``strategy.safetensors``. The tensors of other strategies and those of the U-Net's
    temporal layers are left out. ValueError: there is no `lora` in it.
    """
    file = Path(source).expanduser()
    file = file / "strategy.safetensors" if file.is_dir() else file
    metadata, state = read_metadata(file), read(file)
    mine = {name: tensor for name, tensor in state.items() if name.startswith(TAPS)}
    if not mine or "settings" not in metadata:
        raise ValueError(
            f"{file} has nothing of strategy lora; give the adapter of a run with lora in --strategy"
        )
    backbone, options = json.loads(metadata["settings"])["backbone"], json.loads(metadata["options"])["lora"]
    lora = Lora(options["rank"], options["alpha"], mine)
    theirs, about = to_peft(lora, backbone)
    write(Path(out), theirs, about)
    layers, others = len(theirs) // 2, sorted({name.split(".")[0] for name in state.keys() - mine.keys()})
    lines = [f"{out}: {layers} layers of rank {lora.rank}, alpha {lora.alpha:g}"]
    if left := len(lora.layers) - layers:
        lines.append(f"left out: {left} temporal layers, which an image model lacks")
    return lines + [f"left out: strategy {name}, which is no LoRA" for name in others]


def import_lora(
    file: str | Path,
    out: str | Path,
    config: str | Path = "demo",
    settings: Mapping[str, object] | None = None,
) -> list[str]:
    """Write a LoRA file of diffusers or PEFT as an adapter that `dit_booth.load` takes; return lines about it.

    config, settings: the run that it belongs to (`RunConfig.create`): backbone, weights and encoders. Its strategy
    becomes `lora`, with the file's rank, alpha and layers, and its schedule that of `lora`. ValueError: the file does
    not fit the backbone.
    """
    file = Path(file).expanduser()
    given = {**(settings or {}), "strategy": "lora", "schedule": [], "strategy_weights": []}
    base = RunConfig.create(config, **given)
    lora = from_peft(read(file), read_metadata(file), base.backbone, str(file))
    with torch.device("meta"):
        backbone = build_backbone(base.network, channels=4, text_dim=8, text_embed_dim=8)
    globs = shortest_globs(lora.layers, linear_sites(backbone), str(file))
    built = build(
        RunConfig.create(
            config, **given, lora={"rank": lora.rank, "alpha": lora.alpha, "layers": globs, "where": "*"}
        )
    )
    load_strategy_weights(built.model.strategy, lora.state, str(file))
    write(Path(out), part(built.model.state_dict(), "strategy."), built.adapter_metadata())
    return [f"{out}: {len(lora.layers)} layers of rank {lora.rank}, alpha {lora.alpha:g}: {' '.join(globs)}"]


def shortest_globs(layers: Sequence[str], sites: Sequence[Site], source: str) -> list[str]:
    """Return globs that match `layers` of a model's linear `sites` and no other: one for each kind, or single names.

    ValueError: a layer is no site.
    """
    leaves = {site.name: site.leaf for site in sites}
    if unknown := sorted(set(layers) - leaves.keys()):
        raise ValueError(
            f"{source} changes {unknown[0]} ({len(unknown)} such layers), which is no linear layer of this backbone's"
            " attentions and MLPs; choose the backbone and sizes that it was made with"
        )
    globs: dict[str, None] = {}
    for layer in layers:
        kind = f"*.{leaves[layer]}"
        fits = set(layers) >= {name for name in leaves if fnmatchcase(name, kind)}
        globs[kind if fits else layer] = None
    return [*globs]


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file. ValueError: it cannot be read."""
    try:
        with safe_open(file, "pt") as saved:
            metadata: dict[str, str] = saved.metadata() or {}
            return metadata
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}; give another file") from error
