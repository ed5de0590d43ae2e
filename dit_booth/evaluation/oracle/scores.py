"""The oracle's scores of a video, frame by frame."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from dit_booth.data.example import IdentityDict
from dit_booth.data.toyworld import Identity, as_identity
from dit_booth.evaluation.case import Case, Values
from dit_booth.evaluation.long_scene import under_scene_light
from dit_booth.evaluation.oracle.pose import Array
from dit_booth.evaluation.oracle.seen import FIT_SIDE, Plane, Seen, see
from dit_booth.evaluation.oracle.shape import match_shapes, overlap_bounds
from dit_booth.evaluation.oracle.subject import Track, fit_subject, render_subject
from dit_booth.evaluation.oracle.texture import name_textures
from dit_booth.evaluation.segment import case_masks, delta_e, subject_masks, to_lab


@under_scene_light
def oracle_scores(case: Case) -> dict[str, Values]:
    """Score every frame of a toy-world video against its true subject; a case without an identity has no scores.

    Returns:
        `appearance`, `right_shape`, `shape`, `right_texture`, `speed`, `growth` and `rotation` (`catalogue`), each
        of one value per frame. `shape` is not clipped: below 0 fits worse than the mean wrong shape. In
        a frame without a subject the true one is compared with the bare background, `right_*` are 0, and the
        overlap is 0, which makes `shape` negative.

    Raises:
        ValueError: the frames are not square.
    """
    if case.identity is None:
        return {}
    identity, masks = as_identity(case.identity), case_masks(case)
    seen = see(case.video, masks, side=FIT_SIDE)
    found, visible = seen.found, seen.only(seen.found)
    floor, ceiling = overlap_bounds(identity.shape, seen.cover.shape[-1])
    right_shape, right_texture, overlap = np.zeros((3, len(found)))
    track = Track(np.full((len(found), 4), np.nan), mirrored=False, turns=1)
    if found.any():
        match = match_shapes(visible.cover, identity.shape)
        right_shape[found], overlap[found] = match.true.overlap > match.wrong, match.true.overlap
        track = fit_subject(seen, identity, match.true.poses)
        names = name_textures(visible, track.poses[found])
        right_texture[found] = [name == identity.texture for name in names]
    whole = seen if case.video.shape[-1] <= FIT_SIDE else see(case.video, masks)
    return {
        "appearance": _appearance(whole, identity, track),
        "right_shape": right_shape,
        "shape": (overlap - floor) / (ceiling - floor),
        "right_texture": right_texture,
        **track.motion(),
    }


def track_subject(video: Tensor, identity: Identity | IdentityDict) -> Track:
    """Fit the pose of a toy-world subject in every frame of a video `f 3 s s` in [-1, 1].

    Raises:
        ValueError: the frames are not square.
    """
    it = as_identity(identity)
    seen = see(video, subject_masks(video), side=FIT_SIDE)
    if not seen.found.any():
        return Track(np.full((len(video), 4), np.nan), mirrored=False, turns=1)
    match = match_shapes(seen.only(seen.found).cover, it.shape)
    return fit_subject(seen, it, match.true.poses)


def _appearance(seen: Seen, identity: Identity, track: Track) -> Array:
    """Return the mean dE2000 of frames and rendered subject over the union of rendered and segmented subject, `f`."""
    rendered, alpha = render_subject(identity, track, seen.ground)
    difference = delta_e(_lab(seen.frames), _lab(rendered))
    union = (alpha > 0.5) | seen.masks
    return np.asarray((difference * union).sum(axis=(1, 2)) / union.sum(axis=(1, 2)))


def _lab(frames: Plane) -> Array:
    return to_lab(torch.from_numpy(rearrange(frames, "f c h w -> f h w c")) * 2 - 1)
