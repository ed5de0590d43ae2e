"""Motion of a video: of its segmented subject, of all pixels by optical flow, and flicker of its background.

A still video has the best consistency, so motion stands beside it, and none of these metrics calls stillness better but
`flicker`, which motion does not enter. The toy world's exact motion comes from the fitted pose
(`dit_booth.evaluation.oracle`); these are for every other video, under the same names and in the same units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from dit_booth.evaluation.case import Case, Scorer, Values
from dit_booth.evaluation.long_scene import under_scene_light
from dit_booth.evaluation.segment import case_masks

Array = NDArray[np.float64]
Flow = Callable[[NDArray[np.uint8], NDArray[np.uint8]], NDArray[np.floating]]
"""Optical flow from one frame (h w 3, RGB) to the next: where each pixel moves, (x, y) in pixels, h w 2."""

NEARLY_ROUND = 0.8
"""Ratio of the smaller to the larger second moment above which a subject has no orientation."""
MARGIN = 1 / 16
"""Width by which the subject is dilated before the rest counts as background, as a share of the shorter side."""


def motion_scores(case: Case, *, masks: Tensor | None = None) -> dict[str, Values]:
    """Track the segmented subject over the frames, and measure the background's flicker; needs no network.

    The subject's centre, its size (the root of its area) and its orientation (the main axis of its second moments)
    come from its mask. Of a subject that leaves the frame, the visible part is tracked. Noise moves a mask: on still
    videos of the toy world, 32 x 32 pixels in [-1, 1], with a standard deviation of 0.05, `speed` is 0.002 on average
    and `rotation` 1 degree; at 0.1, where specks are taken for the subject, 0.017 and 18 degrees.

    Args:
        masks: `f h w` bool, true on the subject, for videos that `subject_mask` cannot segment (a background that is
            not smooth); None: `subject_mask` of every frame.

    Returns:
        `speed`, `growth`, `rotation` and `flicker` (`catalogue`), `f` each, to the frame before: NaN in the first
        frame, beside a frame without subject (`flicker`: without background), and `rotation` where the subject is
        nearly as wide as long. An axis has no direction, so `rotation` is at most 90 degrees.

    Raises:
        ValueError: `masks` has another shape or type.
    """
    frames, _, height, width = case.video.shape
    if masks is None:
        masks = case_masks(case)
    if tuple(masks.shape) != (frames, height, width) or masks.dtype != torch.bool:
        raise ValueError(
            f"masks is {masks.dtype} of shape {tuple(masks.shape)}; it must be torch.bool of the video's shape"
            f" (f, h, w) = {(frames, height, width)}"
        )
    inside = masks.cpu().numpy()
    x, y, size, angle = np.array([moments(mask) for mask in inside]).T
    return {
        "speed": to_frame_before(np.hypot(np.diff(x), np.diff(y)) / min(height, width)),
        "growth": to_frame_before(np.abs(size[1:] / size[:-1] - 1)),
        "rotation": to_frame_before(np.abs((np.diff(angle) + 90) % 180 - 90)),
        "flicker": to_frame_before(background_flicker(case.video, inside)),
    }


@under_scene_light
def flicker_scores(case: Case) -> dict[str, Values]:
    """Return `flicker` alone, for the toy world, whose oracle tracks the exact pose."""
    return {"flicker": to_frame_before(background_flicker(case.video, case_masks(case).numpy()))}


def moments(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return a mask's centre (x, y), the root of its area, both in pixels, and its axis in degrees, in [-90, 90].

    All are NaN for an empty mask; the axis is too for a mask that is nearly as wide as long.
    """
    y, x = np.nonzero(mask)
    if not len(x):
        return math.nan, math.nan, math.nan, math.nan
    centre_x, centre_y = float(x.mean()), float(y.mean())
    # A pixel is a square of side 1, whose own second moment is 1/12.
    xx, yy = x.var() + 1 / 12, y.var() + 1 / 12
    xy = float(((x - centre_x) * (y - centre_y)).mean())
    middle, spread = (xx + yy) / 2, math.hypot((xx - yy) / 2, xy)
    nearly_round = (middle - spread) / (middle + spread) > NEARLY_ROUND
    angle = math.nan if nearly_round else math.degrees(math.atan2(2 * xy, xx - yy) / 2)
    return centre_x, centre_y, math.sqrt(len(x)), angle


def background_flicker(video: Tensor, inside: NDArray[np.bool_]) -> Array:
    """Compute the mean absolute difference of consecutive frames outside the subject: `f - 1`, shares of the range.

    A pixel counts if it lies outside the dilated subject (`inside`: f h w) in both frames; NaN if none does.
    """
    pixels = video.detach().to("cpu", torch.float64).clamp(-1, 1).numpy() / 2
    margin = max(1, round(MARGIN * min(inside.shape[1:])))
    near = np.array([ndimage.binary_dilation(mask, iterations=margin) for mask in inside])
    outside = ~(near[1:] | near[:-1])
    changes = reduce(np.abs(np.diff(pixels, axis=0)), "f c h w -> f h w", "mean")
    return np.array(
        [
            float(change[here].mean()) if here.any() else math.nan
            for change, here in zip(changes, outside, strict=True)
        ]
    )


def flow_scores(case: Case, *, flow: Flow | None = None, fps: float = 8.0) -> dict[str, Values]:
    """Measure the motion of all pixels, camera included, by optical flow.

    Args:
        flow: computes the flow; None: `opencv_flow`. VBench's is RAFT, whose lengths differ: a dynamic degree by
            another flow cannot be compared with published ones.
        fps: frames per second of the video; for the dynamic degree it is thinned to about 8.

    Returns:
        `flow` (`catalogue`), the mean length to the frame before, and `dynamic_degree` (VBench, Huang et al., arXiv
        2311.17982, as its code has it): 1 if the largest 5 % of the flow is longer than 6 min(h, w) / 256 pixels on
        average in at least round(4 n / 16) pairs of n frames, and in one pair at least. NaN for one frame. The rule is
        made for real resolutions: at 32 x 32 pixels it asks for 0.75 pixels, which noise of 0.05 exceeds in a third of
        still videos; read `speed` there.

    Raises:
        ValueError: `fps` is not positive, or OpenCV is not installed.
    """
    if not (fps > 0 and math.isfinite(fps)):
        raise ValueError(f"fps is {fps}; give the video's frames per second, above 0")
    flow = flow or opencv_flow
    pictures = to_bytes(case.video)
    shorter = min(case.video.shape[-2:])
    lengths = flow_lengths(pictures, flow)
    means = np.array([float(length.mean()) / shorter for length in lengths])
    thinned = pictures[:: max(1, round(fps / 8))]
    if len(thinned) < len(pictures):
        lengths = flow_lengths(thinned, flow)
    return {"flow": to_frame_before(means), "dynamic_degree": dynamic_degree(lengths)}


def flow_scorer() -> Scorer:
    """Return `flow_scores` with OpenCV's flow. ValueError: it is not installed."""
    _opencv()
    return flow_scores


def flow_lengths(pictures: Sequence[NDArray[np.uint8]], flow: Flow) -> list[Array]:
    """Return the flow's length in pixels, h w, between each frame (h w 3) and the next."""
    flows = [flow(one, two) for one, two in pairwise(pictures)]
    expected = (*pictures[0].shape[:2], 2)
    for got in flows:
        if got.shape != expected:
            raise ValueError(f"flow returned shape {got.shape}; it must be (h, w, 2) = {expected}")
    return [np.linalg.norm(got.astype(np.float64), axis=-1) for got in flows]


def dynamic_degree(lengths: Sequence[Array]) -> float:
    """Return VBench's dynamic degree, 1 or 0, of the flow's lengths (h w) between consecutive frames; NaN for none."""
    if not lengths:
        return math.nan
    frames, height, width = len(lengths) + 1, *lengths[0].shape
    threshold, needed = 6 * min(height, width) / 256, max(1, round(4 * frames / 16))
    top = max(1, int(height * width * 0.05))
    largest = [float(np.sort(length, axis=None)[-top:].mean()) for length in lengths]
    return float(sum(value > threshold for value in largest) >= needed)


def opencv_flow(one: NDArray[np.uint8], two: NDArray[np.uint8]) -> NDArray[np.floating]:
    """Compute dense optical flow by inverse search (DIS, Kroeger et al., arXiv 1603.03590) with OpenCV, on grey frames.

    ValueError: OpenCV is not installed, or a side is shorter than the 12 pixels that it needs.
    """
    cv2 = _opencv()
    if min(one.shape[:2]) < 12:
        raise ValueError(
            f"the video is {one.shape[0]} x {one.shape[1]} pixels; optical flow needs 12 or more"
        )
    grey = [cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) for picture in (one, two)]
    flow: NDArray[np.floating] = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(
        *grey, None
    )
    return flow


def _opencv() -> Any:
    try:
        return import_module("cv2")
    except ImportError as error:
        raise ValueError(
            f"optical flow needs OpenCV ({error}); install it: pip install opencv-python-headless, or pass a flow"
        ) from error


def to_bytes(video: Tensor) -> list[NDArray[np.uint8]]:
    """Return the frames (h w 3, 0 to 255) of a video (f 3 h w in [-1, 1])."""
    pixels = ((video.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(rearrange(pixels, "f c h w -> f h w c").contiguous().numpy())


def to_frame_before(values: Array) -> Array:
    """Return a value for each frame of what is measured between frames: NaN for the first one."""
    return np.concatenate([[math.nan], values])
