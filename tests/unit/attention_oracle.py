"""A dense joint softmax, random cases for it, and how an implementation's results and gradients differ from it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_booth.attention import Segment

HEAD_SIZES = (8, 12, 16, 20, 24, 40, 48, 64, 80, 96, 128)
LENGTHS = (1, 2, 3, 5, 7, 13, 17, 33)

Attend = Callable[[Tensor, Sequence[Segment]], Tensor]


def dense(q: Tensor, segments: Sequence[Segment], scale: float | None = None) -> Tensor:
    """One frame after the other, all the keys it may read in one tensor, one softmax."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for i in range(q.shape[1]):
        scores, values = [], []
        for s in segments:
            query = (q if s.query is None else s.query)[:, i]
            for g in s.frames[i]:
                own = scale if s.scale is None else s.scale
                scores.append(torch.einsum("bnkd,bmkd->bknm", query, s.k[:, g]) * own)
                values.append(s.v[:, g])
        weights = torch.cat(scores, dim=-1).softmax(-1)
        out.append(torch.einsum("bknm,bmkd->bnkd", weights, torch.cat(values, dim=1)))
    return torch.stack(out, dim=1)


@dataclass
class Case:
    """q, segments, and the leaves that they are views of."""

    q: Tensor
    segments: list[Segment]
    leaves: list[Tensor]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """The same numbers, rounded, as leaves of their own."""
        leaves: list[Tensor] = []

        def moved(x: Tensor) -> Tensor:
            leaves.append(x.detach().to(device, dtype).requires_grad_())
            return leaves[-1]

        q = moved(self.q)
        segments = [
            replace(s, k=moved(s.k), v=moved(s.v), query=None if s.query is None else moved(s.query))
            for s in self.segments
        ]
        return Case(q, segments, leaves)


def random_case(
    seed: int,
    loud: float = 1.0,
    heads: Sequence[int] = (1, 2, 3),
    sizes: Sequence[int] = HEAD_SIZES,
    lengths: Sequence[int] = LENGTHS,
    own_queries: bool = True,
) -> Case:
    """Segments of random shapes and visibilities: some groups unread, some frames blind to a segment, own queries and
    scales; never a frame that reads nothing."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    b, f, n, k, d = (rng.choice(x) for x in ((1, 1, 2), range(1, 6), lengths, heads, sizes))
    leaves: list[Tensor] = []

    def leaf(*shape: int) -> Tensor:
        x = torch.randn(b, k, *shape, d, generator=generator, dtype=torch.float64)  # b k f n d
        leaves.append(x.requires_grad_())
        return x.permute(0, 2, 3, 1, 4)  # the views that projections give are not contiguous either

    q, segments = leaf(f, n) * loud, []
    for index in range(rng.randint(1, 3)):
        groups, m = rng.randint(1, 5), rng.choice(lengths)
        frames = tuple(
            tuple(sorted(rng.sample(range(groups), rng.randint(index == 0, groups)))) for _ in range(f)
        )
        query = leaf(f, n) * loud if own_queries and rng.random() < 0.4 else None
        scale = rng.uniform(0.05, 0.5) if rng.random() < 0.4 else None
        segments.append(Segment(leaf(groups, m), leaf(groups, m), frames, query, scale))
    rng.shuffle(segments)
    return Case(q, segments, leaves)


def errors(attend: Attend, case: Case, exact: Case | None = None) -> tuple[float, float]:
    """Largest error of the output and of the gradients, as shares of their root mean squares.

    `exact`: the case that the oracle gets, float64; the case itself where it is float64.
    """
    exact = case if exact is None else exact
    ours, theirs = attend(case.q, case.segments), dense(exact.q, exact.segments)
    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, oracle = (
        torch.autograd.grad(
            (y * weight.to(y.device, y.dtype)).sum(), c.leaves, materialize_grads=True, retain_graph=True
        )
        for y, c in ((ours, case), (theirs, exact))
    )
    assert any(gradient.any() for gradient in oracle), "an oracle of zeros would prove nothing"
    scale = max(gradient.square().mean().sqrt().item() for gradient in oracle)
    worst = max((a.cpu().double() - b).abs().max().item() for a, b in zip(mine, oracle, strict=True))
    out = (ours.detach().cpu().double() - theirs).abs().max() / theirs.square().mean().sqrt()
    return out.item(), worst / scale
