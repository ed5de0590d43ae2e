"""Validation while training: the loss of held-out examples by noise level, and what a caller measures of samples.

The weights are the averages that the stage ends with (`Ema`), or the trained ones where none are kept. Training goes on
as if there had been no validation: noise comes from generators of its own, and weights, the modules' modes and
PyTorch's global generators are put back. It changes no weights, hence no stage's address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from dit_booth.components import Components
from dit_booth.config import StageConfig
from dit_booth.data.example import VideoDataset, collate
from dit_booth.training.distributed import Ranks
from dit_booth.training.ema import Ema
from dit_booth.training.inputs import generator_of, make_inputs

BINS = 5
"""Equal parts of the range of t, each with a loss of its own."""
_SEED = 20_312_000_777  # of the noise: the same for every run, so that runs can be compared

Probe = Callable[[Components, VideoDataset, Ranks], Mapping[str, float]]
"""Measures the network as it is now on held-out examples. Every rank calls it and gets the values of all together."""


@dataclass(frozen=True)
class Validation:
    """The held-out examples of a stage; `rows` of them are in a batch of a rank."""

    components: Components
    stage: StageConfig
    ranks: Ranks
    dtype: torch.dtype
    rows: int
    dataset: VideoDataset
    probe: Probe | None

    @classmethod
    def build(
        cls,
        components: Components,
        stage: StageConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        rows: int,
        probe: Probe | None,
    ) -> Validation | None:
        """Open the held-out data set; None if there is no validation. ValueError: a broken data set."""
        if not components.config.train.validate_every:
            return None
        nothing_dropped = replace(stage, drop=0.0, drop_image=0.0, drop_text=0.0)
        dataset = components.dataset("dev")
        return cls(components, nothing_dropped, ranks, dtype, rows, dataset, probe)

    def measure(self, ema: Ema | None) -> dict[str, float]:
        """Return the losses and the probe's values, the same on every rank; all ranks take part."""
        average = nullcontext() if ema is None else ema.in_place()
        with average, untouched(self.components.model, self.ranks.device), torch.no_grad():
            values = self.losses()
            if self.probe:
                values |= self.probe(self.components, self.dataset, self.ranks)
            return values

    def losses(self) -> dict[str, float]:
        """Compute the mean loss of each part of the range of t, and of all parts together (t uniform).

        An example has the same noise in every part, and a place of its own in each: the middles of as many equal parts
        as there are examples. Both are a function of its index, so a loss does not depend on the number of ranks.
        """
        model, objective = self.components.model, self.components.objective
        count = min(self.components.config.train.validate_examples, len(self.dataset))
        sums = [0.0] * BINS
        for rows, counted in shares(count, self.ranks, self.rows):
            batch = collate([self.dataset[row] for row in rows]).to(self.ranks.device)
            places = (torch.tensor(rows, dtype=torch.float64) + 0.5) / count
            for part in range(BINS):
                draws = [generator_of(_SEED, row) for row in rows]
                t = objective.t_at(((places + part) / BINS).float())
                inputs = make_inputs(
                    self.components, batch, self.stage, draws, self.dtype, bool(model.active), t
                )
                prediction = inputs.predict(model)
                if counted:
                    sums[part] += counted * inputs.loss(objective, prediction).item()
        means = [mean * self.ranks.world / count for mean in self.ranks.mean(*sums)]
        names = [f"loss_{part / BINS:.1f}-{(part + 1) / BINS:.1f}" for part in range(BINS)]
        return {"loss": sum(means) / BINS, **dict(zip(names, means, strict=True))}


def shares(count: int, ranks: Ranks, rows: int) -> Iterator[tuple[list[int], int]]:
    """Iterate over this rank's batches of `count` examples: their indices, and how many of them count.

    Every rank gets as many batches, for ZeRO-3 gathers parameters in all ranks at once; where a rank has no example
    left, its batch is example 0 and counts nothing.
    """
    for start in range(0, count, rows * ranks.world):
        own = range(start + ranks.rank, min(start + rows * ranks.world, count), ranks.world)
        yield list(own) or [0], len(own)


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set a model to evaluation; afterwards its modules' modes and PyTorch's global generators are as before."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
