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
from dit_booth.config.parse import merge
from dit_booth.models.assemble import build_backbone
from dit_booth.models.layers import linear_sites
from dit_booth.models.pretrained import load_strategy_weights
from dit_booth.models.upstream.peft import TAPS, Lora, from_peft, to_peft
from dit_booth.models.weights import part, read, write


def export_lora(source: str | Path, out: str | Path) -> list[str]:
    """Write strategy `lora` of an adapter as diffusers' ``load_lora_weights`` and PEFT read it; return lines about it.

    source: a run's folder, or its ``strategy.safetensors``. Tensors of other strategies are left out, and the U-Net's
    temporal layers. ValueError: there is no `lora` in it.
    """
    file = Path(source).expanduser()
    file = file / "strategy.safetensors" if file.is_dir() else file
    metadata, state = _metadata(file), read(file)
    mine = {name: tensor for name, tensor in state.items() if name.startswith(TAPS)}
    if not mine or "settings" not in metadata:
        raise ValueError(
            f"{file} has no tensors of strategy lora; give the adapter of a run with lora in --strategy"
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

    config, settings: the run that it belongs to (`RunConfig.create`): backbone, weights and encoders; its strategy
    becomes `lora`, with the file's rank, alpha and layers. ValueError: the file does not fit the backbone.
    """
    file = Path(file).expanduser()
    base = RunConfig.create(config, **merge(dict(settings or {}), {"strategy": "lora"}))
    lora = from_peft(read(file), _metadata(file), base.backbone, str(file))
    globs = shortest_globs(lora.layers, _linear_layers(base), str(file))
    options = {"lora": {"rank": lora.rank, "alpha": lora.alpha, "layers": globs, "where": "*"}}
    built = build(RunConfig.create(base.as_dict(), **options))
    load_strategy_weights(built.model.strategy, lora.state, str(file))
    write(Path(out), part(built.model.state_dict(), "strategy."), built.adapter_metadata())
    return [f"{out}: {len(lora.layers)} layers of rank {lora.rank}, alpha {lora.alpha:g}: {' '.join(globs)}"]


def shortest_globs(layers: Sequence[str], every: Sequence[str], source: str) -> list[str]:
    """Return globs that match `layers` of all linear layers of a model, and no other; one for each kind if they can.

    ValueError: a layer is not in `every`.
    """
    if unknown := sorted(set(layers) - set(every)):
        raise ValueError(
            f"{source} changes {unknown[0]}, which is no linear layer of attentions and MLPs of this backbone"
            f" ({len(unknown)} such layers); choose the backbone and sizes that it was made with"
        )
    globs: dict[str, None] = {}
    for layer in layers:
        *_, block, leaf = layer.rpartition("attn") if "attn" in layer else layer.partition(".")
        kind = f"*.{block}{leaf}"
        fits = all(name in layers for name in every if fnmatchcase(name, kind))
        globs[kind if fits else layer] = None
    return [*globs]


def _linear_layers(config: RunConfig) -> list[str]:
    """Return the paths of the linear layers that the backbone of a run offers."""
    with torch.device("meta"):
        backbone = build_backbone(config.network, channels=4, text_dim=8, text_embed_dim=8)
    return [site.name for site in linear_sites(backbone)]


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as saved:
            return saved.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}; give another file") from error
