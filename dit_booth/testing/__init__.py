"""Checks of what every strategy promises, for its author; the built-in ones pass them too.

    from dit_booth.testing import check_strategy

    check_strategy("mine")                        # a registered name, a combination, or the class
    check_strategy("mine", backbones=["unet"])    # on one of `BACKBONES`

A failed promise is an AssertionError that says which one, on which backbone. The models are tiny, with every parameter
random, so that nothing hides behind a zero; all checks of a strategy take seconds. How a strategy behaves under
DeepSpeed is `check_under_zero`, called in every process of a launch.
"""

from dit_booth.testing.promises import PROMISES, check_strategy
from dit_booth.testing.tiny import BACKBONES, FRAMES, SIZE, Trial, trial, worst

__all__ = ["BACKBONES", "FRAMES", "PROMISES", "SIZE", "Trial", "check_strategy", "trial", "worst"]
