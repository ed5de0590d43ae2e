"""Muon (Jordan et al., 2024): the momentum's nearest orthogonal matrix as the update.

torch.optim.Muon and timm's iterate in bfloat16, which is far slower than float32 on CPUs without its instructions.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; they bring singular values near one fast, and do not converge to it."""
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """For matrices, and convolutions' kernels as (out, the rest); updates have AdamW's usual root mean square
    (Liu et al., arXiv 2502.16982, section 2.2). `dtype`: of the iteration."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update at each group's `lr`, which the caller sets; momentum is Nesterov's."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                direction = parameter.grad.lerp(average, group["momentum"]).flatten(1)
                size = 0.2 * max(direction.shape) ** 0.5
                update = orthogonal(direction.to(self.dtype)).view_as(parameter)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly U V^T of the matrix U S V^T (m n), by Newton-Schulz's iteration: singular values about 0.7 to 1.2."""
    if matrix.shape[0] > matrix.shape[1]:  # products of the smaller side
        return orthogonal(matrix.T).T
    a, b, c = COEFFICIENTS
    x: Tensor = matrix / matrix.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
