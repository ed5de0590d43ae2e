"""Options of the diffusion objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_booth.diffusion.schedule import BetaSchedule
from dit_booth.errors import check_ranges

_CHOICES = {
    "kind": ("eps", "v", "flow"),
    "beta_schedule": ("linear", "scaled_linear"),
    "prediction": ("velocity", "x0"),
    "t_sampling": ("logit_normal", "uniform"),
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Options of the diffusion objective."""

    kind: Literal["eps", "v", "flow"] = "eps"
    """eps: predict the noise (VideoBooth); v: predict alpha*eps - sigma*x0; flow: rectified flow."""
    beta_schedule: BetaSchedule = "linear"
    """eps and v: linear (VideoBooth, DiT) or scaled_linear (Stable Diffusion 1.x)."""
    beta_start: float | None = None
    """eps and v: beta of the first step; none: 0.0001 for linear, 0.00085 for scaled_linear."""
    beta_end: float | None = None
    """eps and v: beta of the last of the 1000 steps; none: 0.02 for linear, 0.012 for scaled_linear."""
    min_snr: float = 0.0
    """eps and v: the loss is x0's error times min(SNR, this) (Hang et al., arXiv 2303.09556: 5); 0: no weight."""
    prediction: Literal["velocity", "x0"] = "velocity"
    """flow: the network's output. x0 keeps the velocity loss and suits pixel-space transformers (JiT)."""
    t_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """flow: distribution of t in training."""
    logit_mean: float = 0.0
    """flow: mean of logit(t), larger is noisier. JiT in pixel space: 0.8 (its t runs the other way)."""
    logit_std: float = 1.0
    """flow: standard deviation of logit(t). JiT: 0.8."""
    shift: float = 1.0
    """flow: shift s towards noise, t -> s t / (1 + (s - 1) t), in training and sampling; 1 is none."""
    max_timestep: int = 999
    """flow: the network's timestep at t = 1, pure noise; 1000 for networks of diffusers' flow schedulers."""
    per_frame: bool = False
    """Train with a timestep of its own for every frame (Diffusion Forcing, arXiv 2407.01392)."""
    t_min: float = 0.05
    """flow with prediction x0: the loss divides by max(t, t_min)."""

    def __post_init__(self) -> None:
        """Raise ValueError, naming the field, for values that cannot work."""
        check_ranges(
            self,
            "objective",
            beta_start="(0, 1)",
            beta_end="(0, 1)",
            min_snr="[0, 1000000]",
            logit_mean="[-100, 100]",
            logit_std="(0, 100]",
            shift="(0, 1000]",
            max_timestep="[1, 1000]",
            t_min="(0, 1)",
        )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(choices)}")
        if self.kind != "flow" and self.prediction != "velocity":
            raise ValueError(f"prediction={self.prediction!r} belongs to kind=flow, not to kind={self.kind}")
        if self.kind == "flow" and self.min_snr:
            raise ValueError(
                f"min_snr={self.min_snr} belongs to kind=eps and kind=v, not to kind=flow; use 0"
            )
