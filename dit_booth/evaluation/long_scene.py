"""Scores of the toy world's long scenes, whose light and passing bar are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import wraps

import numpy as np

from dit_booth.data.toyworld.long import LongIdentity, as_identity, is_long, under_white_light
from dit_booth.data.toyworld.world import progress_of
from dit_booth.evaluation.case import Case, Scorer, Values


def under_scene_light(scorer: Scorer) -> Scorer:
    """Let a scorer see a long scene without its light, and leave out the frames that have the bar, or follow one.

    The scene's light is divided out of every video alike: one that lacks it is as wrong as a subject of other colours.
    """

    @wraps(scorer)
    def scored(case: Case) -> Mapping[str, Values]:
        if not is_long(case.identity):
            return scorer(case)
        assert case.identity is not None
        identity = as_identity(case.identity)
        assert isinstance(identity, LongIdentity)
        values = scorer(replace(case, video=under_white_light(case.video, identity)))
        bar = identity.has_bar(progress_of(len(case.video)))
        hidden = bar | np.concatenate([[False], bar[:-1]])  # motion is to the frame before
        return {
            name: value if np.ndim(value) == 0 else np.where(hidden, np.nan, value)
            for name, value in values.items()
        }

    return scored
