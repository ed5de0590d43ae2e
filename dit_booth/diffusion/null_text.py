"""Null-text optimisation: guided sampling that follows an inversion (Mokady et al., arXiv 2211.09794; Video-P2P)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_booth.diffusion.guidance import guide
from dit_booth.diffusion.inversion import DDIMPath

PredictWithText = Callable[[Tensor, Tensor, Tensor], Tensor]
"""predict(x (b ...), t (b,), text (b l d)) -> eps (b ...)."""


@dataclass(frozen=True, kw_only=True)
class NullTextConfig:
    """Options of the optimisation; the defaults are Video-P2P's."""

    scale: float = 7.5
    """Guidance scale of the sampling that is to follow the inversion."""
    inner_steps: int = 10
    """Largest number of Adam's updates at each timestep."""
    lr: float = 1e-2
    """Adam's learning rate at the noisiest timestep; it falls by a hundredth of itself with each timestep."""
    epsilon: float = 1e-5
    """Stop at a timestep after the update whose loss was below this, plus 2e-5 for each timestep before."""


@dataclass(frozen=True)
class NullText:
    """A null embedding for each sampling step, and what guided sampling with them gives."""

    embeddings: list[Tensor]  # n of (b l d), the noisiest timestep's first
    states: list[Tensor]  # n + 1 of (b ...), the noise first
    updates: list[int]  # n, Adam's updates at each timestep


def optimise_null_text(
    path: DDIMPath,
    predict: PredictWithText,
    inverted: Sequence[Tensor],
    text: Tensor,
    null: Tensor,
    config: NullTextConfig | None = None,
) -> NullText:
    """Find the null embeddings (b l d) with which guided sampling retraces `inverted` (section 3.3, algorithm 1).

    inverted: n + 1 latents (b ...) of `invert_along` with the text (b l d) alone, the data first. Only the embeddings
    change, and no parameter of the network gets a gradient. Raises ValueError for another length.
    """
    config = config or NullTextConfig()
    if len(inverted) != len(path) + 1:
        raise ValueError(
            f"inverted has {len(inverted)} states; a path of {len(path)} steps needs {len(path) + 1}"
        )
    x, made = inverted[-1], NullText([], [inverted[-1]], [])
    for order, i in enumerate(reversed(range(len(path)))):
        t = path.t(i, x)
        with torch.no_grad():
            cond = predict(x, t, text)

        def guided(
            embedding: Tensor, i: int = i, x: Tensor = x, t: Tensor = t, cond: Tensor = cond
        ) -> Tensor:
            return path.denoise(i, x, guide(cond, predict(x, t, embedding), config.scale))

        null, updates = _fit(guided, null, inverted[i], order, config)
        with torch.no_grad():
            x = guided(null)
        made.embeddings.append(null)
        made.states.append(x)
        made.updates.append(updates)
    return made


def _fit(
    guided: Callable[[Tensor], Tensor], start: Tensor, target: Tensor, order: int, config: NullTextConfig
) -> tuple[Tensor, int]:
    """Return the embedding that brings one guided step close to its target, and the number of updates."""
    null = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([null], lr=config.lr * max(1 - order / 100, 0.01))
    with torch.enable_grad():
        for done in range(1, config.inner_steps + 1):
            loss = F.mse_loss(guided(null), target)
            (null.grad,) = torch.autograd.grad(loss, null)
            adam.step()
            if loss.item() < config.epsilon + order * 2e-5:
                return null.detach(), done
    return null.detach(), config.inner_steps
