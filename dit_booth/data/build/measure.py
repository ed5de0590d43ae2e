"""Measure a clip: motion of its subject, stillness, sharpness, perceptual hash, watermark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from dit_booth.data.build.candidate import Candidate
from dit_booth.data.image_files import Mask, Pixels, open_image, read_mask
from dit_booth.data.video import read_video

SAMPLED = 9
"""Frames of a clip that are compared, over its whole length."""
SIDE = 256
"""Pixels of the longer side at which they are."""
MARGIN = 6
"""Pixels around the subject's box that count for its sharpness, so that its outline does."""

Grey = NDArray[np.uint8]
Flow = NDArray[np.float32]


def measure(candidate: Candidate, *, videos: str, masks: str, watermark: str) -> list[Candidate]:
    """Measure a clip with its mask. ValueError: it cannot be read."""
    count, stride = sampling(candidate.end - candidate.start)
    frames = read_video(Path(videos, candidate.video), start=candidate.start, frames=count, stride=stride)
    _, height, width, _ = frames.shape
    mask = read_mask(Path(masks, f"{candidate.name}.png"), height=height, width=width)
    measured = measure_frames(candidate, frames, mask, stride)
    return [replace(measured, watermark=watermark_score(frames, watermark) if watermark else 0.0)]


def sampling(length: int) -> tuple[int, int]:
    """Return the number of frames to compare of a clip, and their distance."""
    count = min(SAMPLED, length)
    return count, max(1, (length - 1) // max(1, count - 1))


def measure_frames(candidate: Candidate, frames: NDArray[np.uint8], mask: Mask, stride: int) -> Candidate:
    """Measure frames (`f h w 3`, `stride` apart) with the mask (`h w`) of the first."""
    _, height, width, _ = frames.shape
    scale = min(1.0, SIDE / max(height, width))
    size = max(8, round(width * scale)), max(8, round(height * scale))
    small = [
        cv2.cvtColor(cv2.resize(f, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for f in frames
    ]
    shape = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
    return replace(
        candidate,
        motion=subject_motion(small, shape) * candidate.fps / stride,
        change=max((float(cv2.absdiff(a, b).mean()) for a, b in pairwise(small)), default=0.0),
        sharpness=sharpness(small[0], shape),
        hash=f"{perceptual_hash(small[0]):016x}{perceptual_hash(small[-1]):016x}",
    )


def subject_motion(frames: list[Grey], mask: Mask) -> float:
    """Return the mean motion of the subject against the background, in diagonals of the frame per pair of frames.

    Flow is OpenCV's DIS (Kroeger et al. 2016). The background's is the median outside the mask, so a moving camera
    is no motion. The mask is known in the first frame, and moves on with the flow.
    """
    found = list(motions(frames, mask))
    return float(np.mean(found)) if found else 0.0


def motions(frames: list[Grey], mask: Mask) -> Iterator[float]:
    """Iterate over the motion of each pair of frames, until the mask has left the frame."""
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    diagonal = float(np.hypot(*frames[0].shape))
    for before, after in pairwise(frames):
        flow = compute_flow(dis, before, after)
        around = ~cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
        if not mask.any() or not around.any():
            return
        ground = np.median(flow[around], axis=0)
        yield float(np.linalg.norm(flow[mask] - ground, axis=1).mean()) / diagonal
        mask = moved(mask, compute_flow(dis, after, before))


def compute_flow(dis: cv2.DISOpticalFlow, before: Grey, after: Grey) -> Flow:
    """Return the flow that leads from one frame to another, `h w 2` in pixels."""
    flow: Flow = np.zeros((*before.shape, 2), np.float32)
    return np.asarray(dis.calc(before, after, flow), np.float32)


def moved(mask: Mask, back: Flow) -> Mask:
    """Return the mask of the next frame, from the flow that leads back (`h w 2`)."""
    height, width = mask.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    values = cv2.remap(mask.astype(np.uint8), x + back[..., 0], y + back[..., 1], cv2.INTER_NEAREST)
    return values.astype(bool)


def sharpness(frame: Grey, mask: Mask) -> float:
    """Return the steepness of the subject's edges: of the Laplacian in its box, in percent of the box's contrast.

    Both are taken without extremes: the 99th percentile of the Laplacian's magnitude, and the range of the grey levels
    between the 2nd and the 98th. So a pale or plain subject counts as sharp if its outline is.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0.0
    top, left = max(0, rows[0] - MARGIN), max(0, columns[0] - MARGIN)
    part = frame[top : rows[-1] + 1 + MARGIN, left : columns[-1] + 1 + MARGIN]
    low, high = np.percentile(part, (2, 98))
    return float(100 * np.percentile(np.abs(cv2.Laplacian(part, cv2.CV_64F)), 99) / max(1.0, high - low))


def perceptual_hash(frame: Grey) -> int:
    """Return pHash (Zauner 2010): the signs of the 64 lowest frequencies of a small picture against their median."""
    small = cv2.resize(frame, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8]
    bits = rearrange(low > np.median(low), "h w -> (h w)")
    return int("".join("1" if bit else "0" for bit in bits), 2)


def watermark_score(frames: NDArray[np.uint8], file: str) -> float:
    """Return the highest correlation of a watermark's edges with the edges that all frames share.

    The median over time keeps what stands still, which a watermark does and a moving scene does not.
    """
    still = edges(np.median(frames, axis=0).astype(np.uint8))
    mark = read_watermark(file)
    if mark.shape[0] > still.shape[0] or mark.shape[1] > still.shape[1]:
        return 0.0
    return float(cv2.matchTemplate(still, mark, cv2.TM_CCOEFF_NORMED).max())


@cache
def read_watermark(file: str) -> Flow:
    """Read a watermark's picture as edges. ValueError: there is no such image."""
    return edges(np.array(open_image(file).convert("RGB")))


def edges(picture: Pixels) -> Flow:
    """Return the magnitude of the gradient, `h w`."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    across, down = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    return np.asarray(cv2.magnitude(across, down), np.float32)
