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

_PLAIN = dict.fromkeys(
    ("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False
)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {
        **_PLAIN,
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "disable_corrector": [],
        "thresholding": False,
        "final_sigmas_type": "zero",
        "shift_terminal": None,
        "num_train_timesteps": 1000,
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_PLAIN,
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "shift_terminal": None,
        "num_train_timesteps": 1000,
    },
}
"""Entries of a scheduler's configuration that our samplers have no option for; an absent one is taken as equal."""


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
    name = found.get("_class_name", "no scheduler")
    if name not in SCHEDULERS:
        raise ValueError(f"weights: {file} is of {name}; known are {' and '.join(SCHEDULERS)}")
    wanted = SCHEDULERS[name]
    if other := [k for k, value in wanted.items() if found.get(k, value) != value]:
        raise ValueError(
            f"weights: {file} has {other[0]} {found[other[0]]!r}, our sampler {wanted[other[0]]!r}; give --config wan"
            " and the folder transformer, and choose sampler.kind and objective.shift"
        )
    unipc = name == "UniPCMultistepScheduler"
    shift = found.get("flow_shift" if unipc else "shift", 1.0)
    sampler = {"kind": "unipc"} if unipc else {"kind": "euler", "spacing": "diffusers"}
    flow = {"kind": "flow", "prediction": "velocity", "shift": shift, "max_timestep": 1000}
    return {"objective": flow, "sampler": sampler}


def _read(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty without one."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
