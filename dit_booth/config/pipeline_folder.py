"""A pipeline's folder, as diffusers saves it, as settings of a run.

Given as `weights`, it stands for what it fixes: the network's sizes, text encoder, autoencoder, and how its scheduler
samples. A setting of a configuration file or of the command line goes before the folder's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_booth.models.wan.config import SIZES, Size

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
"""Pipelines of diffusers that a folder may hold."""
CONFIG = "wan"
"""The packaged configuration of a run from such a folder, where none is named."""


def is_pipeline(weights: str) -> bool:
    """Return True for the folder of a pipeline that a run can start from."""
    return _read(Path(weights).expanduser() / "model_index.json").get("_class_name") in PIPELINES


def pipeline_settings(weights: str) -> dict[str, Any]:
    """Return the settings that a pipeline's folder fixes; empty for any other `weights`.

    The paths of text encoder and autoencoder stay empty, which means the folder in `weights`. ValueError: two networks,
    or a scheduler whose sampling has no equal here.
    """
    if not weights or not is_pipeline(weights):
        return {}
    folder = Path(weights).expanduser()
    if _read(folder / "model_index.json").get("boundary_ratio") is not None:
        raise ValueError(
            f"weights: {folder} is a pipeline of two networks, one for high and one for low noise (Wan 2.2 A14B); give"
            " the folder of one of them (transformer, transformer_2) with --config wan, --text.path, --autoencoder.path"
        )
    return {
        "backbone": "wan",
        "wan": _network(folder / "transformer" / "config.json"),
        "text": {"kind": "umt5"},
        "autoencoder": {"kind": "wan"},
        **_scheduler(folder / "scheduler" / "scheduler_config.json"),
    }


def _network(file: Path) -> dict[str, Any]:
    """Return the options of the network in a folder. ValueError: it is not Wan's."""
    found = _read(file)
    try:
        heads = found["num_attention_heads"]
        shape = Size(found["num_layers"], heads * found["attention_head_dim"], heads, found["ffn_dim"])
        channels = found["in_channels"] - found["out_channels"]
        patch = found["patch_size"][-1]
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"weights: {file} is no configuration of Wan's transformer ({error}); copy it again"
        ) from error
    named = next((name for name, size in SIZES.items() if size == shape), None)
    return {
        **({"size": named} if named else shape._asdict()),
        "patch": patch,
        "cross_attn_norm": bool(found.get("cross_attn_norm", True)),
        "image_dim": found.get("image_dim") or 0,
        "condition_channels": channels,
    }


def _scheduler(file: Path) -> dict[str, Any]:
    """Return objective and sampler of a scheduler's configuration."""
    found = _read(file)
    name = found.get("_class_name")
    if name == "UniPCMultistepScheduler" and found.get("use_flow_sigmas"):
        shift, sampler = found["flow_shift"], {"kind": "unipc"}
    elif name == "FlowMatchEulerDiscreteScheduler" and not found.get("use_dynamic_shifting"):
        shift, sampler = found["shift"], {"kind": "euler", "spacing": "diffusers"}
    else:
        raise ValueError(
            f"weights: {file} is of {name or 'no scheduler'}; known are UniPCMultistepScheduler with use_flow_sigmas"
            " and FlowMatchEulerDiscreteScheduler without use_dynamic_shifting"
        )
    flow = {"kind": "flow", "prediction": "velocity", "shift": shift, "max_timestep": 1000}
    return {"objective": flow, "sampler": sampler}


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty without one."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
