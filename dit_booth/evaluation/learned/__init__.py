"""Metrics of learned networks: one family a file, built by name with the weights that the user gives.

`SCORERS` score one video frame by frame, `SET_SCORERS` a set of videos; crop and match, whose detector is a function,
is built by `crop_and_match.crop_and_match_scorer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from dit_booth.errors import suggest
from dit_booth.evaluation.case import Scorer
from dit_booth.evaluation.learned import networks, perceptual, sets, vbench, video_networks
from dit_booth.evaluation.learned.networks import Device, Weights
from dit_booth.evaluation.learned.sets import SetScorer
from dit_booth.evaluation.learned.similarity import similarity_scorer

__all__ = ["SCORERS", "SET_SCORERS", "Family", "build", "build_set"]

T = TypeVar("T", Scorer, SetScorer)


@dataclass(frozen=True)
class Family(Generic[T]):
    """A family of metrics: what it measures, the weights that it needs, and how it is built.

    Attributes:
        build: weights and device -> scorer.
        metrics: names in the catalogue.
        weights: name of its network in ``--weights``; empty: it needs no file.
    """

    build: Callable[[Weights, Device], T]
    metrics: tuple[str, ...]
    weights: str = ""


def _clip(weights: Weights, device: Device) -> Scorer:
    clip = networks.load_clip(weights, device)
    return similarity_scorer("clip", clip.image, clip.text)


def _vbench_background(weights: Weights, device: Device) -> Scorer:
    clip = networks.load_clip(weights, device, name="clip_b32")
    return vbench.background_scorer(vbench.with_vbench_clip(clip.image))


def _similarity(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}_i", f"{prefix}_i_crop", f"{prefix}_consistency")


SCORERS: dict[str, Family[Scorer]] = {
    "clip": Family(_clip, (*_similarity("clip"), "clip_t"), "clip"),
    "dino": Family(
        lambda w, d: similarity_scorer("dino", networks.load_dino(w, d)), _similarity("dino"), "dino"
    ),
    "dino_b": Family(
        lambda w, d: similarity_scorer("dino_b", networks.load_dino(w, d, name="dino_b")),
        _similarity("dino_b"),
        "dino_b",
    ),
    "dinov2": Family(
        lambda w, d: similarity_scorer("dinov2", networks.load_dinov2(w, d)), _similarity("dinov2"), "dinov2"
    ),
    "lite0": Family(lambda w, d: similarity_scorer("lite0", networks.load_lite0(w, d)), _similarity("lite0")),
    "vbench_subject": Family(
        lambda w, d: vbench.subject_scorer(vbench.with_vbench_dino(networks.load_dino(w, d, name="dino_b"))),
        ("vbench_subject", "vbench_i2v_subject"),
        "dino_b",
    ),
    "vbench_background": Family(_vbench_background, ("vbench_background",), "clip_b32"),
    "vbench_flickering": Family(lambda w, d: vbench.score_flickering, ("vbench_flickering",)),
    "lpips": Family(lambda w, d: perceptual.lpips_scorer(perceptual.load_lpips(w, d)), ("lpips",), "lpips"),
    "dreamsim": Family(
        lambda w, d: perceptual.dreamsim_scorer(perceptual.load_dreamsim(w, d)),
        ("dreamsim", "dreamsim_crop"),
        "dreamsim",
    ),
}
"""Families of metrics of one video, by name."""

SET_SCORERS: dict[str, Family[SetScorer]] = {
    "fvd": Family(lambda w, d: sets.fvd_scorer(video_networks.load_i3d(w, d)), ("fvd",), "i3d"),
    "fvd_videomae": Family(
        lambda w, d: sets.fvd_scorer(video_networks.load_videomae(w, d), "fvd_videomae"),
        ("fvd_videomae",),
        "videomae",
    ),
    "jedi": Family(lambda w, d: sets.jedi_scorer(video_networks.load_vjepa(w, d)), ("jedi",), "vjepa"),
}
"""Families of metrics of a set of videos, by name."""


def build(name: str, weights: Weights, device: Device = "cpu") -> Scorer:
    """Build the scorer of a family in `SCORERS`.

    Args:
        name: the family.
        weights: network -> file, folder or ``hf-hub:owner/name``.
        device: where the network is put.

    Raises:
        ValueError: an unknown family (nearest names given), or weights that are absent or another network's.
    """
    return _find(name, SCORERS).build(weights, device)


def build_set(name: str, weights: Weights, device: Device = "cpu") -> SetScorer:
    """Build the scorer of a family in `SET_SCORERS`. Arguments and errors: see `build`."""
    return _find(name, SET_SCORERS).build(weights, device)


def _find(name: str, families: dict[str, Family[T]]) -> Family[T]:
    if name not in families:
        raise ValueError(f"there is no learned metric {name!r}{suggest(name, families)}")
    return families[name]
