"""Crop and match with a detector of the user's: the subject is found by the image prompt, cropped and compared.

After OpenS2V-Eval (Yuan et al. 2025), whose detector is YOLO-World with image prompts and whose features are those of
GME-Qwen2-VL-7B. Here detector and features are functions: scores compare only where both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.evaluation.case import Case, Scorer, Values
from dit_booth.evaluation.learned.similarity import (
    ImageFeatures,
    TextFeatures,
    cosines,
    features_of,
    unit_features,
)

Array = NDArray[np.float64]
Detector = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""Frames `f 3 h w` and a reference `3 s s`, both in [-1, 1] -> for each frame its boxes `n 5`: x1, y1, x2, y2 in pixels
and confidence in [0, 1]. OpenS2V keeps boxes above 0.5 after non-maximum suppression at 0.7."""

FRAMES = 32  # frames that are compared, evenly spaced, both ends included
CONFIDENCE = 0.6
TEXT = 0.30  # cosine of crop and subject's name below which a box is another object


class Nexus(NamedTuple):
    """NexusScore of a video: `released` divides the mean by the number of detections once more."""

    released: float
    corrected: float


def nexus_score(confidence: Array, text: Array, image: Array, detected: int) -> Nexus:
    """Compute NexusScore: the mean cosine with the reference over the boxes that count; 0 if none does.

    A box counts if its confidence exceeds 0.6 and the cosine of its crop and the subject's name exceeds 0.30. The
    released code (eval/get_nexusscore.py) then divides the mean by the number of frames with a detection, so that a
    video in which the subject is found more often scores lower.

    Args:
        confidence, text, image: of every box of the video, `n`.
        detected: frames in which the detector returned a box.

    Raises:
        ValueError: the arrays differ in length.
    """
    if not len(confidence) == len(text) == len(image):
        raise ValueError(
            f"there are {len(confidence)} confidences, {len(text)} text and {len(image)} image similarities;"
            " give one of each for every box"
        )
    kept = image[_counted(confidence, text) & (image != 0)]
    mean = float(kept.mean()) if len(kept) else 0.0
    return Nexus(mean / detected if detected else 0.0, mean)


def crop_and_match_scorer(detect: Detector, image: ImageFeatures, text: TextFeatures) -> Scorer:
    """Return a scorer of `match_i`, `match_found`, `nexus` and `nexus_released`.

    `match_i` is the cosine of the frame's best box and the reference (NaN: no box counts, or not among the 32 frames),
    `match_found` is 1 where a box counts. The text is the case's `subject`, or its caption if that is empty.
    """

    def score(case: Case) -> Mapping[str, Values]:
        indices = np.linspace(0, len(case.video) - 1, FRAMES, dtype=int)
        chosen = np.unique(indices)  # a video of fewer frames is sampled with repetitions
        found = _check_boxes(detect(case.video[chosen.tolist()], case.image), frames=len(chosen))
        reference = unit_features("image", image(case.image[None]), rows=1)
        words = unit_features("text", text([case.subject or case.caption]), rows=1)
        matched = {
            index: _match(case.video[index], boxes, image, reference, words)
            for index, boxes in zip(chosen.tolist(), found, strict=True)
        }
        best, counted = np.full(len(case.video), np.nan), np.full(len(case.video), np.nan)
        for index, (confidence, named, cosine) in matched.items():
            kept = cosine[_counted(confidence, named)]
            counted[index] = float(len(kept) > 0)
            best[index] = kept.max() if len(kept) else math.nan
        rows = [matched[index] for index in indices.tolist()]
        confidence, named, cosine = (np.concatenate(column) for column in zip(*rows, strict=True))
        nexus = nexus_score(confidence, named, cosine, sum(len(row[0]) > 0 for row in rows))
        return {
            "match_i": best,
            "match_found": counted,
            "nexus": nexus.corrected,
            "nexus_released": nexus.released,
        }

    return score


def _counted(confidence: Array, text: Array) -> NDArray[np.bool_]:
    return (confidence > CONFIDENCE) & (text > TEXT)


def _match(
    frame: Tensor, boxes: Tensor, image: ImageFeatures, reference: Tensor, words: Tensor
) -> tuple[Array, Array, Array]:
    """Return confidence, cosine with the text and cosine with the reference of a frame's boxes (n 5)."""
    crops = [_crop(frame, box) for box in boxes]
    kept = [number for number, crop in enumerate(crops) if crop.numel()]
    if not kept:
        return (np.empty(0),) * 3
    features = features_of("image", image, [crops[number] for number in kept])
    confidence = boxes[kept, 4].detach().cpu().double().numpy()
    return confidence, cosines(features, words), cosines(features, reference)


def _crop(frame: Tensor, box: Tensor) -> Tensor:
    height, width = frame.shape[-2:]
    x1, y1, x2, y2 = (round(float(x)) for x in box[:4])
    return frame[:, max(0, y1) : min(height, max(0, y2)), max(0, x1) : min(width, max(0, x2))]


def _check_boxes(found: Sequence[Tensor], *, frames: int) -> Sequence[Tensor]:
    if len(found) != frames or any(boxes.ndim != 2 or boxes.shape[1] != 5 for boxes in found):
        shapes = [tuple(boxes.shape) for boxes in found][:4]
        raise ValueError(
            f"the detector returned boxes of shape {shapes}... for {len(found)} frames; it must return a"
            f" tensor (n 5) of x1, y1, x2, y2, confidence for each of the {frames} frames"
        )
    return found
