"""Check of a strategy under DeepSpeed: partitioned over ranks it trains as it does in one piece.

    deepspeed --module dit_booth.testing.zero mine --plugin path/to/mine.py      # two ranks: one of the two videos each

On the CPU set ``LOCAL_SIZE=2`` in the shell, for as many ranks. A line says what was checked; a broken promise is an
AssertionError. Without names, every registered strategy is checked.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_booth.config.parse import load_plugin
from dit_booth.inject import Reference
from dit_booth.models.clip.encoders import Prompt
from dit_booth.models.injected import Prediction
from dit_booth.strategy import registered
from dit_booth.testing import Trial, trial, worst
from dit_booth.training.distributed import Ranks, initialize, start, stop

Arguments = tuple[Tensor, Tensor, Prompt, Reference, None, Tensor]


def check_under_zero(
    strategy: str, ranks: Ranks, *, zero: int, backbone: str = "dit-factorised", plain: Trial | None = None
) -> None:
    """Check that a step of the strategy's last stage at a ZeRO stage gives the same parameters as without ZeRO.

    Call it in all ranks of a launch, of which there may be one or two: the tiny batch has two videos.
    """
    plain = plain or stepped(strategy, backbone, ranks)
    run = trial(strategy, backbone).perturb()
    run.components.to(ranks.device)
    parameters = run.train_in(run.stages[-1])
    engine = _engine(run, list(parameters.values()), ranks, zero)
    arguments = _mine(run, ranks)
    engine.backward(_loss(engine, arguments))
    engine.step()
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(run.model.parameters())):
        ours, theirs = dict(run.model.named_parameters()), dict(plain.model.named_parameters())
        where = f"{strategy} on {backbone} at ZeRO stage {zero}"
        for name, p in ours.items():
            difference, scale = worst(p, theirs[name]), max(1.0, theirs[name].abs().max().item())
            assert difference <= 1e-5 * scale, (
                f"{where}: after a step {name} differs by {difference:.1e} of {scale:.1e}"
            )
    engine.destroy()


def stepped(strategy: str, backbone: str, ranks: Ranks) -> Trial:
    """Take the step in one process, on the videos of all ranks; return the trial after it."""
    run = trial(strategy, backbone).perturb()
    run.components.to(ranks.device)
    optimizer = torch.optim.SGD(run.train_in(run.stages[-1]).values(), lr=1.0)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    rows = [run.row(rank % 2) for rank in range(ranks.world)]
    torch.stack([_loss(run.model, row) for row in rows]).mean().backward()
    optimizer.step()
    moved = [name for name, p in run.model.named_parameters() if worst(p, before[name]) > 1e-5]
    assert moved, f"{strategy} on {backbone}: the step moves nothing"
    return run


def _loss(model: nn.Module, arguments: Arguments) -> Tensor:
    prediction: Prediction = model(*arguments)
    loss = prediction.output.square().mean() + prediction.aux_loss
    return (
        loss
        if prediction.aux_prediction is None
        else loss + prediction.aux_prediction.prediction.square().mean()
    )


def _mine(run: Trial, ranks: Ranks) -> Arguments:
    return run.row(ranks.rank % 2)


def _engine(run: Trial, trained: list[nn.Parameter], ranks: Ranks, zero: int) -> Any:
    return initialize(
        model=run.model,
        optimizer=torch.optim.SGD(trained, lr=1.0),
        config={
            "train_batch_size": ranks.world,
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m dit_booth.testing.zero", description=__doc__)
    options.add_argument("strategies", nargs="*", help="names, or combinations (a+b)")
    options.add_argument("--plugin", nargs="*", default=[], help="Python files that register strategies")
    options.add_argument("--backbones", nargs="*", default=["dit-factorised", "unet"])
    options.add_argument("--zero", nargs="*", type=int, default=[2, 3])
    options.add_argument("--local_rank", type=int)
    given = options.parse_args(argv)
    registered()
    for path in given.plugin:
        load_plugin(path)
    ranks = start()
    gc.freeze()  # every engine of stage 3 collects garbage: half a second among all that the imports made
    try:
        for name in given.strategies or [n for n, cls in registered().items() if cls.stages()]:
            for backbone in given.backbones:
                plain = stepped(name, backbone, ranks)
                for zero in given.zero:
                    check_under_zero(name, ranks, zero=zero, backbone=backbone, plain=plain)
                if ranks.first:
                    stages = " and ".join(map(str, given.zero))
                    sys.stdout.write(
                        f"{name} on {backbone}, ranks {ranks.world}: ZeRO {stages} as one piece\n"
                    )
    finally:
        stop()


if __name__ == "__main__":
    main()
