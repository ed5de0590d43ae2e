"""The settings that change a run's result; its fingerprint and the addresses of its stages are made of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from dit_booth.config.data import DATA_KINDS
from dit_booth.config.long import LongConfig
from dit_booth.config.stages import STAGES
from dit_booth.diffusion.clip_sampling import ClipsConfig
from dit_booth.diffusion.known_frames import KnownFramesConfig
from dit_booth.models.text.config import TextConfig
from dit_booth.models.wan.model import WanConfig

PlainDict = dict[str, Any]
"""Nested settings as YAML and JSON hold them: mappings, lists, strings, numbers, None."""
ANCHORED = ("decoupled_attention", "elite_local", "in_context", "spatial_concat", "token_bank")
LATER: dict[str, object] = {
    "data.toyworld.scene": "short",
    "sample.long": dataclasses.asdict(LongConfig()),
    "objective.per_frame": False,
    "objective.max_timestep": 999,
    "guidance.negative": "",
    "text": dataclasses.asdict(TextConfig()),
    "autoencoder.tile": 0,
    "data.variations": 0,
    "data.buckets": [],
    "data.image_prompts": 1,
    "clips": dataclasses.asdict(ClipsConfig()),
    "wan.image_encoder": "",
    "wan": dataclasses.asdict(WanConfig()),
    "known": {**dataclasses.asdict(KnownFramesConfig()), "previous": [1]},  # a run.yaml has lists
    **{f"stages.{name}.foreground": False for name in STAGES},
    "lora.layers": ["*.to_q", "*.to_v"],
    "kv_concat.projections": "copies",
    "kv_concat.rank": 128,
    "kv_concat.reference_place": "backbone",
    **{f"{name}.reference_at": "all" for name in ANCHORED},
    **{f"{name}.keyframe_every": 8 for name in ANCHORED},
    "in_context.place": "before",
    "start.background": 0.0,
}
"""Settings and sections that came after the first runs: at these values a run is as if without them."""


def decisive(settings: Mapping[str, Any]) -> PlainDict:
    """Return the settings (`RunConfig.as_dict`, or a ``run.yaml``) that change a run's result.

    Left out: folders, what only watches a run, the sections of data sets that are not read, and `LATER`.
    """
    out: PlainDict = copy.deepcopy(dict(settings))
    for field in sorted(
        LATER, key=lambda name: name.count("."), reverse=True
    ):  # settings before their sections
        *path, name = field.split(".")
        section, default = functools.reduce(lambda at, key: at.get(key, {}), path, out), LATER[field]
        if isinstance(default, dict):  # a section, perhaps older than some of its settings
            default = {key: value for key, value in default.items() if f"{field}.{key}" not in LATER}
        if section.get(name) == default:
            del section[name]
    for name in ("out", "store", "stop_after"):
        out.pop(name, None)
    data = out.get("data", {})
    for name in ("workers", "cache", *(kind for kind in DATA_KINDS if kind != data.get("kind"))):
        data.pop(name, None)
    for name in ("checkpoint_every", "validate_every", "validate_examples", "validate_prompts"):
        out.get("train", {}).pop(name, None)
    return out
