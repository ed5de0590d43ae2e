"""Distances between two sets of videos: FVD and JEDi. Lower is better.

Both depend on the number of videos: the Frechet distance of few samples is too high (its covariances are poorly
known), and JEDi's estimate is biased by about 1/n. Compare values of equally many videos only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from dit_booth.evaluation.case import Case
from dit_booth.evaluation.learned.video_networks import VideoFeatures

Array = NDArray[np.float64]
SetScorer = Callable[[Sequence[Case]], Mapping[str, float]]
"""Computes metrics of a set of videos, by name (`catalogue`, level `set`)."""

FVD_SAMPLES = 2048
"""Videos of each set that published FVDs are measured on (Unterthiner et al. 2018; Ge et al. 2024)."""

log = logging.getLogger(__name__)


def frechet_distance(a: Array, b: Array) -> float:
    """Compute |mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), S the covariances (n - 1 in the denominator).

    Without a matrix square root: with centered samples A and B, the trace of (S_a S_b)^(1/2) is the sum of the
    singular values of A B^T / sqrt((n - 1)(m - 1)). So singular covariances (few samples) do no harm.

    Args:
        a, b: features, `n d` and `m d`.

    Raises:
        ValueError: fewer than 2 samples, other channels, or features that are not finite.
    """
    _check_features(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    means = a.mean(axis=0), b.mean(axis=0)
    # The triangular factor of a QR decomposition has the singular values of the samples, and at most d rows.
    factors = [
        np.linalg.qr(x - mean, mode="r") / np.sqrt(len(x) - 1) for x, mean in zip((a, b), means, strict=True)
    ]
    traces = sum(float(np.square(factor).sum()) for factor in factors)
    cross = float(np.linalg.svd(factors[0] @ factors[1].T, compute_uv=False).sum())
    distance = float(np.square(means[0] - means[1]).sum()) + traces - 2 * cross
    return max(0.0, distance)  # rounding


def polynomial_mmd(
    a: Array, b: Array, *, degree: int = 2, coef0: float = 0.0, gamma: float | None = None
) -> float:
    """Compute the squared maximum mean discrepancy with the kernel (gamma <x, y> + coef0)^degree, biased estimate.

    Args:
        a, b: features, `n d` and `m d`.
        gamma: None: 1/d.

    Raises:
        ValueError: see `frechet_distance`.
    """
    _check_features(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = 1 / a.shape[1] if gamma is None else gamma

    def mean_kernel(x: Array, y: Array) -> float:
        return float(((scale * (x @ y.T) + coef0) ** degree).mean())

    return mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)


def jedi(a: Array, b: Array) -> float:
    """Compute JEDi of two sets of V-JEPA features (n d, m d): 100 times the MMD of degree 2 (Luo et al. 2024)."""
    return 100 * polynomial_mmd(a, b)


def fvd_scorer(features: VideoFeatures, name: str = "fvd") -> SetScorer:
    """Return a scorer of the Frechet distance between the cases' videos and their real videos.

    Below 2,048 videos it logs a warning: the value compares with others of equally many videos only.
    """

    def score(cases: Sequence[Case]) -> Mapping[str, float]:
        generated, real = _both(name, cases, features)
        if len(cases) < FVD_SAMPLES:
            log.warning(
                "%s over %d videos is too high by an unknown amount (published values use %d);"
                " compare it with values over %d videos only",
                name, len(cases), FVD_SAMPLES, len(cases),
            )  # fmt: skip
        return {name: frechet_distance(generated, real)}

    return score


def jedi_scorer(features: VideoFeatures) -> SetScorer:
    """Return a scorer of `jedi` between the cases' videos and their real videos."""

    def score(cases: Sequence[Case]) -> Mapping[str, float]:
        return {"jedi": jedi(*_both("jedi", cases, features))}

    return score


def _both(name: str, cases: Sequence[Case], features: VideoFeatures) -> tuple[Array, Array]:
    """Return the features of the videos and of the real videos, each `n d`; one video in memory at a time."""
    without = [case.prompt for case in cases if case.truth is None]
    if without:
        raise ValueError(
            f"{name} compares with the real videos, and {len(without)} of {len(cases)} cases have none (first: prompt"
            f" {without[0]!r}); drop {name}"
        )
    generated = [_features(features, case.video) for case in cases]
    real = [_features(features, case.truth) for case in cases if case.truth is not None]
    return np.array(generated).reshape(len(cases), -1), np.array(real).reshape(len(cases), -1)


@torch.no_grad()
def _features(features: VideoFeatures, video: Tensor) -> Array:
    values: Array = features(rearrange(video, "f c h w -> 1 f c h w"))[0].detach().cpu().double().numpy()
    return values


def _check_features(a: Array, b: Array) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"the features have shapes {a.shape} and {b.shape}; they must be (n d) and (m d), with n and m at least 2"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("the features contain NaN or infinity; check the network's weights and the videos")
