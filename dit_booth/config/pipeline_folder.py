"""A pipeline's folder, as diffusers saves it, as settings of a run.

Given as `weights`, it stands for what it fixes: text encoder, autoencoder, and how its scheduler samples. A setting of
a configuration file or of the command line goes before the folder's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PIPELINES = ("WanPipeline",)
"""Pipelines of diffusers that a folder may hold."""
CONFIG = "wan"
"""The packaged configuration of a run from such a folder, where none is named."""


def is_pipeline(weights: str) -> bool:
    """Return True for the folder of a pipeline that a run can start from."""
    return _read(Path(weights).expanduser() / "model_index.json").get("_class_name") in PIPELINES


def pipeline_settings(weights: str) -> dict[str, Any]:
    """Return the settings that a pipeline's folder fixes; empty for any other `weights`.

    The paths of text encoder and autoencoder stay empty, which means the folder in `weights`. ValueError: a scheduler
    whose sampling has no equal here.
    """
    if not weights or not is_pipeline(weights):
        return {}
    return {
        "text": {"kind": "umt5"},
        "autoencoder": {"kind": "wan"},
        **_scheduler(Path(weights).expanduser() / "scheduler" / "scheduler_config.json"),
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
