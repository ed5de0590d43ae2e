"""CLIP-I, CLIP-T and frame consistency, averaged over all frames (VideoBooth section 5.2).

Nothing is cropped or masked, as the paper mentions neither. Scores are cosines; the paper's tables show them
times 100. The features come in as functions, so any CLIP (or DINO, for an image score) fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor

from dit_booth.evaluation.check import check_pictures

ImageFeatures = Callable[[Tensor], Tensor]
"""`n 3 h w` in [-1, 1], of any size, to `n d`; resizes and normalises for its model."""
TextFeatures = Callable[[Sequence[str]], Tensor]
"""`n` sentences to `n d`, the same `d`."""


@torch.no_grad()
def clip_scores(
    videos: Sequence[Tensor],
    images: Sequence[Tensor],
    captions: Sequence[str],
    image_features: ImageFeatures,
    text_features: TextFeatures,
) -> dict[str, list[float]]:
    """Compute the scores of every video, each the mean over its frames.

    Args:
        videos: each `f 3 h w` in [-1, 1].
        images: each video's image prompt, `3 s s`.
        captions: each video's text prompt.
        image_features, text_features: see `ImageFeatures` and `TextFeatures`; called once per video.

    Returns:
        `clip_i` (every frame to the image prompt), `clip_t` (every frame to the caption) and
        `clip_consistency` (every frame to the next; NaN for a video of one frame), one value per video.

    Raises:
        ValueError: the lists differ in length, or a tensor or a feature has the wrong shape.
    """
    if not len(videos) == len(images) == len(captions):
        raise ValueError(
            f"there are {len(videos)} videos, {len(images)} images and {len(captions)} captions; "
            "give one image and one caption for each video"
        )
    scores: dict[str, list[float]] = {"clip_i": [], "clip_t": [], "clip_consistency": []}
    for video, image, caption in zip(videos, images, captions, strict=True):
        check_pictures("video", video, axes="f 3 h w")
        check_pictures("image", image, axes="3 s s")
        frames = _unit("image_features", image_features(video), rows=len(video))
        prompt = _unit("image_features", image_features(rearrange(image, "c h w -> 1 c h w")), rows=1)
        words = _unit("text_features", text_features([caption]), rows=1)
        for name, other in (("clip_i", prompt), ("clip_t", words)):
            if other.shape[1] != frames.shape[1]:
                raise ValueError(
                    f"the features of {name} have {frames.shape[1]} and {other.shape[1]} channels; "
                    "take image_features and text_features from one model"
                )
            scores[name].append(float(einsum(frames, other, "f d, n d -> f n").mean()))
        scores["clip_consistency"].append(float(reduce(frames[:-1] * frames[1:], "f d -> f", "sum").mean()))
    return scores


def _unit(name: str, features: Tensor, *, rows: int) -> Tensor:
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(f"{name} returned shape {tuple(features.shape)}; it must be ({rows}, d)")
    return F.normalize(features.detach().to("cpu", torch.float64), dim=-1)
