"""The discrete process: schedule tables, noising, one step of each sampler, and a loop, against a file.

Errors are relative to 1 + |output|: the estimate of x0 at late steps is hundreds, not of order one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from cases import (
    FLOAT32,
    FLOAT64,
    CaseResult,
    Info,
    Tensors,
    cast,
    labelled,
    outputs,
    relative,
    worst,
)
from torch import Tensor

from dit_booth.diffusion import ObjectiveConfig, SamplerConfig, make_objective, sample, samplers
from dit_booth.diffusion.objectives import DiscreteObjective
from dit_booth.diffusion.samplers import ddim_step, ddpm_step
from dit_booth.diffusion.schedule import DiscreteSchedule, linear_betas

TABLES = ("betas", "alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance")


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output ``RESPACING.WHAT``; integers must be equal."""
    for name in sorted(outputs(tensors)):
        respacing, _, what = name.partition(".")
        stored = tensors[f"outputs.{name}"]
        if what in TABLES or what == "fixed_large_log_variance":
            yield CaseResult(name, table_error(respacing, what, stored), FLOAT64)
        elif what in EXACT:
            yield CaseResult(name, worst(EXACT[what](RespacedStep(respacing, tensors)), stored))
        elif what in STEPS or what.startswith("ddim_eta") or what.endswith("_sample_loop"):
            for dtype in (torch.float32, torch.float64):
                made = run(RespacedStep(respacing, cast(tensors, dtype)), what)
                yield CaseResult(labelled(name, dtype), relative(made, stored), FLOAT32)


def spaced(respacing: str) -> DiscreteSchedule:
    """``50``, ``ddim50``, or ``10_15_20`` as a file writes "10,15,20"."""
    return DiscreteSchedule(linear_betas()).respace(respacing.replace("_", ","))


def table_error(respacing: str, table: str, stored: Tensor) -> float:
    """Relative; a variance of nothing may differ by 1e-15."""
    schedule = spaced(respacing)
    if table == "fixed_large_log_variance":
        return relative(schedule.fixed_large_variance.log(), stored, floor=0.0)
    return relative(getattr(schedule, table), stored, floor=1e-6)


class RespacedStep:
    """One step of a respaced process: the inputs of a file, and the estimate of x0 from its eps."""

    def __init__(self, respacing: str, tensors: Tensors) -> None:
        self.respacing, self.tensors, self.schedule = respacing, tensors, spaced(respacing)
        objective = make_objective(ObjectiveConfig(kind="eps"))
        assert isinstance(objective, DiscreteObjective)
        self.objective = objective

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"inputs.{name}"]

    @property
    def t(self) -> Tensor:
        return self[f"{self.respacing}.t"]

    @property
    def training_t(self) -> Tensor:
        return self.schedule.timestep_map[self.t]

    @property
    def x0(self) -> Tensor:
        return self.objective.to_x0(self["eps"], self["x"], self.training_t)

    def ddpm(self, x0: Tensor, noise: Tensor | None = None) -> Tensor:
        return ddpm_step(self.schedule, x0, self["x"], self.t, noise)

    def log_variance(self) -> Tensor:
        return self.schedule.at("fixed_large_variance", self.t, self["x"]).log().expand_as(self["x"])

    def ddim(self, eta: float) -> Tensor:
        return ddim_step(self.schedule, self.x0, self["x"], self.t, eta, self["noise"])

    def noised(self, x0: str, noise: str) -> Tensor:
        """By the objective, as training does; the respaced schedule's own formula must agree."""
        ours = self.objective.noise(self[x0], self.training_t, self[noise])
        torch.testing.assert_close(
            ours, self.schedule.q_sample(self[x0], self.t, self[noise]), rtol=2e-5, atol=2e-5
        )
        return ours

    def loss(self) -> Tensor:
        return self.objective.loss(self["eps"], self["x0"], self["noise"], self.training_t)

    def loop(self, kind: str) -> Tensor:
        """From x to a sample with the file's noises in their order; the model is the one of the file's notes."""
        draws = iter(self["loop_noises"])

        def model(x: Tensor, t: Tensor) -> Tensor:
            return 0.3 * x + 0.1 * torch.sin(t.to(x.dtype)).reshape(-1, *[1] * (x.ndim - 1))

        spacing = self.respacing.replace("_", ",")
        words = {
            "spacing": "even" if spacing.isdigit() else "ddim" if spacing.startswith("ddim") else spacing
        }
        config = SamplerConfig(kind=kind, steps=len(self.schedule), **words)  # type: ignore[arg-type]
        with mock.patch.object(samplers, "randn_like", lambda x, generator: next(draws)):
            return sample(model, self.objective, config, self["x"], torch.Generator())


EXACT: dict[str, Callable[[RespacedStep], Tensor]] = {
    "timestep_map": lambda s: s.schedule.timestep_map,
    "model_ts": lambda s: s.objective.timestep(s.training_t),
    "exemplar_timestep": lambda s: s.objective.from_timestep(s.objective.timestep(s.training_t)),
}
STEPS: dict[str, Callable[[RespacedStep], Tensor]] = {
    "q_sample": lambda s: s.noised("x0", "noise"),
    "exemplar_latent": lambda s: s.noised("exemplar_latent_ori", "exemplar_noise"),
    "training_loss": lambda s: s.loss(),
    "p_pred_xstart": lambda s: s.x0,
    "p_pred_xstart_clip": lambda s: s.x0.clamp(-1, 1),
    "p_mean": lambda s: s.ddpm(s.x0),
    "p_mean_clip": lambda s: s.ddpm(s.x0.clamp(-1, 1)),
    "p_sample": lambda s: s.ddpm(s.x0, s["noise"]),
    "p_log_variance": RespacedStep.log_variance,
    "p_log_variance_clip": RespacedStep.log_variance,
}


def run(step: RespacedStep, what: str) -> Tensor:
    if what.startswith("ddim_eta"):
        return step.ddim(float(what.removeprefix("ddim_eta")))
    if what.endswith("_sample_loop"):
        return step.loop({"p": "ddpm", "ddim": "ddim"}[what.removesuffix("_sample_loop")])
    return STEPS[what](step)
