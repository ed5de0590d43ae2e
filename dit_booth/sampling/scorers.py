"""Scorers that need no download: a run's own CLIP, and judges that no network was conditioned on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch

from dit_booth.components import Components
from dit_booth.evaluation.case import Case, Scorer, Values
from dit_booth.evaluation.learned.similarity import similarity_scorer
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import ImageEncoder, TextEncoder, build_clip
from dit_booth.models.weights import ASSETS

JUDGES = (101, 102, 103)
"""Seeds of the toy world's judges (``experiments/base/toyworld_clip.py``)."""


def own_scorer(components: Components) -> Scorer:
    """Return the scorer of a run's own CLIP, which its strategies are conditioned on: ``own_i``, ``own_t`` ..."""
    text = components.model.text
    if not isinstance(text, TextEncoder):  # umT5 shares no space with the images
        text = build_clip(components.config.clip)[0]
    return _clip_scorer("own", text, components.image_encoder, components.device)


def judge_scorer(device: torch.device) -> Scorer:
    """Return the scorer of the toy world's judges: the mean of three CLIPs with seeds of their own, ``judge_i`` ..."""
    scorers = [_clip_scorer("judge", *judge, device) for judge in judges()]

    def score(case: Case) -> Mapping[str, Values]:
        found = [scorer(case) for scorer in scorers]
        return {
            name: np.mean(np.stack([np.asarray(one[name]) for one in found]), axis=0) for name in found[0]
        }

    return score


@cache
def judges() -> tuple[tuple[TextEncoder, ImageEncoder], ...]:
    """Load the judges' text and image towers."""
    files = [ASSETS / f"judge-{seed}.safetensors" for seed in JUDGES]
    return tuple(build_clip(ClipConfig(model="dit-booth-judge", pretrained=str(file))) for file in files)


def _clip_scorer(prefix: str, text: TextEncoder, image: ImageEncoder, device: torch.device) -> Scorer:
    text.to(device)
    image.to(device)

    @torch.no_grad()
    def scored(case: Case) -> Mapping[str, Values]:
        return scorer(case)

    scorer = similarity_scorer(
        prefix,
        lambda pictures: image(pictures.to(device)).embedding,
        lambda sentences: text(text.tokenize(list(sentences))).pooled,
    )
    return scored
