"""Muon: PyTorch's own update, in a precision of one's choice."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_booth.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_it_moves_as_pytorchs(shape: tuple[int, int]) -> None:
    """Over several steps, with momentum and decay; PyTorch's iterates in bfloat16, whose rounding is the tolerance."""
    torch.manual_seed(0)
    start, grads = torch.randn(shape), torch.randn(4, *shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = Muon([ours], weight_decay=0.1)
    library = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    mine.param_groups[0]["lr"] = 0.05
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        library.step()
    moved = theirs - start
    assert (ours - theirs).norm() < 0.02 * moved.norm()
    assert moved.norm() > 0.1


@pytest.mark.parametrize("kernel", [(6, 4, 3, 3), (40, 1, 3, 3)])
def test_a_kernel_is_its_matrix_of_outputs_and_the_rest(kernel: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(kernel), torch.randn(kernel)
    moved = []
    for shape in (kernel, (kernel[0], -1)):
        parameter = nn.Parameter(start.reshape(shape).clone())
        parameter.grad = grad.reshape(shape).clone()
        optimizer = Muon([parameter], weight_decay=0.0)
        optimizer.param_groups[0]["lr"] = 1.0
        optimizer.step()
        moved.append(parameter.detach().flatten() - start.flatten())
    assert torch.equal(moved[0], moved[1]) and moved[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 8))[0] for n in (8, 20))
    values = torch.linspace(0.2, 1.0, 8)
    made = orthogonal((u * values @ v.T).to(dtype)).float()
    level = u.T @ made @ v
    diagonal = level.diagonal()
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    assert (level - torch.diag(diagonal)).abs().max() < (1e-5 if dtype == torch.float32 else 0.05)
