"""Similarity in a network's features: to the image prompt, to the caption, to the previous frame.

Cosines of features, frame by frame: DreamBooth's CLIP-I, DINO and CLIP-T (Ruiz et al. 2023, section 4.1), which
VideoBooth averages over all frames (section 5.2). The papers' tables show them times 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.evaluation.case import Case, Scorer, Values
from dit_booth.evaluation.learned.crops import FindSubject, crop_subjects, find_on_smooth, find_on_white

Array = NDArray[np.float64]
ImageFeatures = Callable[[Tensor], Tensor]
"""`n 3 h w` in [-1, 1], of any size, to `n d`; resizes and normalizes for its model."""
TextFeatures = Callable[[Sequence[str]], Tensor]
"""`n` sentences to `n d`, the same `d`."""


def unit_features(name: str, features: Tensor, *, rows: int) -> Tensor:
    """Return features (n d) at unit length, float64 on the CPU. ValueError: another shape, or not finite."""
    if features.ndim != 2 or len(features) != rows:
        raise ValueError(
            f"{name} returned features of shape {tuple(features.shape)}; they must be ({rows}, d)"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError(f"{name} returned NaN or infinite features; check its weights and the video")
    return F.normalize(features.detach().to("cpu", torch.float64), dim=-1)


def features_of(name: str, network: ImageFeatures, pictures: Sequence[Tensor]) -> Tensor:
    """Return unit features (n d) of pictures 3 h w of several sizes; those of one size go in one batch."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        sizes.setdefault(tuple(picture.shape), []).append(index)
    rows: dict[int, Tensor] = {}
    for indices in sizes.values():
        batch = torch.stack([pictures[index] for index in indices])
        rows |= zip(indices, unit_features(name, network(batch), rows=len(indices)), strict=True)
    return torch.stack([rows[index] for index in range(len(pictures))])


def to_previous(features: Tensor) -> Array:
    """Return the cosine of every frame and the one before (f); NaN for the first. features: f d of unit length."""
    cosines = reduce(features[:-1] * features[1:], "f d -> f", "sum")
    return np.concatenate([[np.nan], cosines.numpy()])


def similarity_scorer(
    prefix: str,
    image: ImageFeatures,
    text: TextFeatures | None = None,
    find: FindSubject = find_on_smooth,
) -> Scorer:
    """Return a scorer of `<prefix>_i`, `<prefix>_i_crop`, `<prefix>_consistency` and, with `text`, `<prefix>_t`.

    Args:
        prefix: the network's prefix in the catalogue.
        image: pictures n 3 h w in [-1, 1] -> n d.
        text: sentences -> n d, of the same space.
        find: finds the subject in the frames; the image prompt's subject is what is not white.
    """

    def score(case: Case) -> Mapping[str, Values]:
        frames = unit_features(prefix, image(case.video), rows=len(case.video))
        prompt = unit_features(prefix, image(rearrange(case.image, "c h w -> 1 c h w")), rows=1)
        crops = features_of(prefix, image, crop_subjects(case.video, find))
        target = features_of(prefix, image, crop_subjects(case.image[None], find_on_white))
        scores: dict[str, Values] = {
            f"{prefix}_i": cosines(frames, prompt),
            f"{prefix}_i_crop": cosines(crops, target),
            f"{prefix}_consistency": to_previous(frames),
        }
        if text is not None:
            words = unit_features(f"{prefix}'s text tower", text([case.caption]), rows=1)
            if words.shape[1] != frames.shape[1]:
                raise ValueError(
                    f"{prefix}: images have {frames.shape[1]} channels and text {words.shape[1]};"
                    " take both from one model"
                )
            scores[f"{prefix}_t"] = cosines(frames, words)
        return scores

    return score


def cosines(frames: Tensor, other: Tensor) -> Array:
    """Return the cosine (f) of every frame (f d) with one vector (1 d), both of unit length."""
    values: Array = einsum(frames, other, "f d, n d -> f n")[:, 0].numpy()
    return values
