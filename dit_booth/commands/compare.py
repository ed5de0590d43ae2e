"""Compare systems of subject-driven video generation, each with the same budget for a subject.

    dit-booth compare --budget 60s --subjects 12 --out runs/compare
    dit-booth compare --budget 2PFLOP --subjects 8 --methods videobooth dreambooth --seeds 0 1 --out runs/two

The budget pays for class images, training and sampling, in counted FLOPs; seconds are converted once, at a throughput
that is measured here. Ends in a page (dit-booth report). The same command resumes an interrupted
comparison; started twice, both processes share the work.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dit_booth.commands.program import RESUMES, run_program


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    budget: str = "60s"
    """For one subject: FLOPs such as 2PFLOP, or seconds such as 60s."""
    subjects: int = 12
    """Subjects: the first prompts of the split, each with its own subject."""
    split: Literal["dev", "test"] = "test"
    """Prompts to compare on: dev while settings are chosen, test for what is published."""
    methods: tuple[str, ...] = ()
    """Systems by the names of their configurations, such as videobooth dreambooth; empty: all packaged ones."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training."""
    noise_seeds: tuple[int, ...] = (0,)
    """Seeds of the sampling noise: each subject gets a video of every seed, paid from the budget."""
    amortise: int = 12
    """Subjects that share the training of a system that is trained once."""
    backbone: Literal["dit", "unet"] = "dit"
    """The network of all systems: the video DiT or VideoBooth's U-Net."""
    out: str = "runs/compare"
    """Folder of the comparison."""
    set: tuple[str, ...] = ()
    """Settings of all runs to replace, such as sampler.steps=10 data.frames=4."""
    page: bool = True
    """Write report.html and report.csv into the folder at the end."""


def main(argv: Sequence[str], prog: str | None = None) -> int:
    """0: finished; 1: an error, said in one line; 130: interrupted, resumable."""
    command = shlex.join(["dit-booth", "compare", *argv])
    return run_program(
        CompareArguments,
        lambda arguments: compare(arguments, command),
        argv,
        prog=prog,
        description=__doc__,
        level=logging.INFO,
        stopped=RESUMES,
    )


def compare(arguments: CompareArguments, command: str) -> list[str]:
    """Run a comparison to its end, and return a line for each file of its page."""
    from dit_booth.commands.report import ReportArguments, write_report
    from dit_booth.commands.sample import nested
    from dit_booth.comparison.compare import Comparison
    from dit_booth.comparison.compare import compare as run
    from dit_booth.config.parse import merge

    folder = Path(arguments.out)
    run(
        Comparison(
            budget=arguments.budget,
            split=arguments.split,
            subjects=arguments.subjects,
            methods=arguments.methods,
            seeds=arguments.seeds,
            noise_seeds=arguments.noise_seeds,
            amortise=arguments.amortise,
            folder=folder,
            settings=merge({"backbone": arguments.backbone}, nested(arguments.set)),
            command=command,
        )
    )
    if not arguments.page:
        return [str(folder)]
    return write_report(ReportArguments(folders=(str(folder),), csv=True))
