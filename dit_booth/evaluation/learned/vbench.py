"""VBench's consistency and flickering (Huang et al. 2024), and VBench-I2V's subject score (Huang et al. 2024b).

Definitions and preprocessing follow the released code (Vchitect/VBench). All are values of a whole video in [0, 1];
a still video has 1 in the first three: read them beside the motion. A video of one frame has none (NaN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from einops import reduce
from torch import Tensor

from dit_booth.evaluation.case import Case, Scorer, Values
from dit_booth.evaluation.learned.networks import FeatureNetwork
from dit_booth.evaluation.learned.preprocessing import VBENCH_CLIP, VBENCH_DINO
from dit_booth.evaluation.learned.similarity import ImageFeatures, unit_features

_I2V = {"max": 0.4, "mean": 0.3, "min": 0.3}


def consistency(features: Tensor) -> float:
    """Compute VBench's consistency: mean over i >= 1 of (max(0, cos(i-1, i)) + max(0, cos(0, i))) / 2.

    Subject consistency over DINO's features, background consistency over CLIP's.

    Args:
        features: `f d`, of unit length.
    """
    if len(features) < 2:
        return math.nan
    previous = reduce(features[:-1] * features[1:], "f d -> f", "sum").clamp(min=0)
    first = (features[1:] @ features[0]).clamp(min=0)
    return float((previous + first).mean() / 2)


def i2v_subject(features: Tensor, reference: Tensor) -> float:
    """Compute 0.4 max_i cos(ref, i) + 0.3 mean_i cos(i-1, i) + 0.3 min_i cos(i-1, i), cosines clamped at 0.

    Args:
        features: `f d`, of unit length.
        reference: `1 d`, of unit length.
    """
    if len(features) < 2:
        return math.nan
    to_reference = (features @ reference[0]).clamp(min=0)
    previous = reduce(features[:-1] * features[1:], "f d -> f", "sum").clamp(min=0)
    return float(
        _I2V["max"] * to_reference.max() + _I2V["mean"] * previous.mean() + _I2V["min"] * previous.min()
    )


def temporal_flickering(video: Tensor) -> float:
    """Compute 1 - (mean absolute difference of consecutive 8-bit frames) / 255; video: `f 3 h w` in [-1, 1].

    VBench measures it on prompts for static scenes only; elsewhere wanted motion lowers it.
    """
    if len(video) < 2:
        return math.nan
    values = ((video.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return 1 - float((values[1:] - values[:-1]).abs().double().mean()) / 255


def subject_scorer(dino: ImageFeatures) -> Scorer:
    """Return a scorer of `vbench_subject` and `vbench_i2v_subject`; dino: DINO ViT-B/16's features."""

    def score(case: Case) -> Mapping[str, Values]:
        frames = unit_features("dino_b", dino(case.video), rows=len(case.video))
        reference = unit_features("dino_b", dino(case.image[None]), rows=1)
        return {"vbench_subject": consistency(frames), "vbench_i2v_subject": i2v_subject(frames, reference)}

    return score


def background_scorer(clip: ImageFeatures) -> Scorer:
    """Return a scorer of `vbench_background`; clip: CLIP ViT-B/32's image features."""

    def score(case: Case) -> Mapping[str, Values]:
        frames = unit_features("clip", clip(case.video), rows=len(case.video))
        return {"vbench_background": consistency(frames)}

    return score


def score_flickering(case: Case) -> Mapping[str, Values]:
    """Score `vbench_flickering`; needs no network."""
    return {"vbench_flickering": temporal_flickering(case.video)}


def with_vbench_dino(network: FeatureNetwork) -> FeatureNetwork:
    """Return DINO with VBench's preprocessing: bilinear to 224 without antialiasing, and no crop."""
    return replace(network, prepare=VBENCH_DINO)


def with_vbench_clip(network: FeatureNetwork) -> FeatureNetwork:
    """Return CLIP with VBench's preprocessing: bicubic to 224 without antialiasing, center crop."""
    return replace(network, prepare=VBENCH_CLIP)
