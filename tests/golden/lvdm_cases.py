"""LVDM: training with given frames, clips sampled one from the other, and the plan of a long video."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import torch
from cases import CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from torch import Tensor

from dit_booth.diffusion import clip_sampling, inversion
from dit_booth.diffusion.clip_sampling import (
    ClipSampler,
    ClipsConfig,
    Known,
    continuations,
    interpolate_frames,
    predict_frames,
    sparse_frames,
    windows,
)
from dit_booth.diffusion.inversion import DDIMPath, sample_along
from dit_booth.diffusion.known_frames import (
    KnownFramesConfig,
    known_mask,
    network_input,
    per_sample_l1,
    training_pair,
)
from dit_booth.diffusion.objectives import EpsObjective
from dit_booth.diffusion.samplers import Model
from dit_booth.diffusion.schedule import DiscreteSchedule, scaled_linear_betas

LEVEL = 1e-6
"""Largest error of abar and of what follows from it: the original's is a product in float32."""
TRAINING = {
    "pred": KnownFramesConfig(),
    "interp": KnownFramesConfig(interpolation=0.9, prediction=0.0),
    "stride": KnownFramesConfig(interpolation=0.7, prediction=0.0),  # the stride is the file's
    "pred_multi": KnownFramesConfig(prediction=0.8, previous=(1, 2)),
}


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output: tables, ``train_*``, and sampling without (``plain``) and with guidance (``cfg``)."""
    objective = EpsObjective(DiscreteSchedule(scaled_linear_betas(1000, 0.0015, 0.0155)))
    for name in sorted(outputs(tensors)):
        stored = tensors[f"outputs.{name}"]
        if (table := table_of(name, info, stored, objective)) is not None:
            yield CaseResult(name, worst(table, stored), LEVEL if table.is_floating_point() else 0.0)
            continue
        for dtype in (torch.float32, torch.float64):
            given = cast(tensors, dtype)
            if found := re.fullmatch(r"train_(\w+?)_(mask|unet_input|loss|loss_one_noise)", name):
                made = Training(found[1], info, given, objective).output(found[2])
            elif found := re.fullmatch(r"(plain|cfg)_(\w+)", name):
                made = Sampling(info, given, objective, found[1]).output(found[2])
            else:
                break
            yield CaseResult(labelled(name, dtype), worst(made, stored), tolerance(dtype, stored))


# ---- tables --------------------------------------------------------------------------------------------------------


def table_of(name: str, info: Info, stored: Tensor, objective: EpsObjective) -> Tensor | None:
    path, eta = path_of(info, objective), info["config"]["eta"]
    if name == "hierarchy_table":
        return torch.tensor([plan(*row[:4]) for row in stored.tolist()])
    if name == "interp_loop_table":
        return torch.tensor([[t, windows(t, True), windows(t, True) + 1] for t in stored[:, 0].tolist()])
    tables = {
        "alphas_cumprod": lambda: objective.schedule.alphas_cumprod,
        "ddim_timesteps": lambda: path.timesteps,
        "ddim_alphas": lambda: path.levels[1:],
        "ddim_alphas_prev": lambda: path.levels[:-1],
        "ddim_sigmas": lambda: torch.tensor([path.sigma(i, eta) for i in range(len(path))]).double(),
    }
    return tables[name]() if name in tables else None


def path_of(info: Info, objective: EpsObjective) -> DDIMPath:
    """A constant stride from 1; the last step ends at abar_0."""
    abar, steps = objective.schedule.alphas_cumprod, info["config"]["ddim_steps"]
    timesteps = torch.arange(0, len(abar), len(abar) // steps) + 1
    return DDIMPath(timesteps, torch.cat([abar[:1], abar[timesteps]]))


def plan(frames: int, clip: int, filled: int, interpolates: int) -> list[int]:
    """The released plan, and what its loops make of it (four frames are one latent frame)."""
    latent = frames // 4
    wanted = sparse_frames(latent, filled) if interpolates else latent
    more = continuations(wanted, clip)
    sparse = clip + more * (clip - 1)
    gaps = windows(sparse, released=True)
    return [frames, clip, filled, interpolates, latent, wanted, more, sparse, gaps, gaps * (filled - 1) + 1]


# ---- the network ---------------------------------------------------------------------------------------------------


class Network(NamedTuple):
    """The file's linear network of one task, on (b f (c + 1) h w)."""

    tensors: Tensors
    task: str

    def __call__(self, x: Tensor, t: Tensor, level: Tensor | None) -> Tensor:
        a, m, b, c = (self.tensors[f"weights.{self.task}.{name}"] for name in "AMbc")
        e = torch.einsum("dc,bfchw->bfdhw", a, x)
        e = torch.einsum("gf,bfdhw->bgdhw", m, e)
        constant = t.to(x.dtype)[:, None] / 1000 * b
        if level is not None:
            constant = constant + level.to(x.dtype)[:, None] / 250 * c
        return e + constant[:, None, :, None, None]


def swapped(x: Tensor) -> Tensor:
    """b c f h w <-> b f c h w."""
    return x.transpose(1, 2)


# ---- training ------------------------------------------------------------------------------------------------------


class Training:
    def __init__(self, tag: str, info: Info, tensors: Tensors, objective: EpsObjective) -> None:
        self.tag, self.tensors, self.objective, self.config = tag, tensors, objective, TRAINING[tag]
        if tag == "stride":
            self.config = replace(self.config, stride=info["config"]["interp_frame_stride"])

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"inputs.train_{self.tag}_{name}"]

    def mask(self) -> Tensor:
        """The file has the number of given frames of those samples only that predict."""
        uniform, share = self["uniforms"], self.config.interpolation
        previous = torch.ones(len(uniform), dtype=torch.int64)
        predicts = (uniform >= share) & (uniform < share + self.config.prediction)
        if predicts.any():
            previous[predicts] = self["chosen_n_prev"]
        return known_mask(self.config, uniform, previous, self["x0"].shape[2])

    def pair(self, one_noise: bool) -> tuple[Tensor, Tensor]:
        x0, eps, eps_given = (swapped(self[name]) for name in ("x0", "noise_t", "noise_s"))
        eps_given = eps if one_noise else eps_given
        return training_pair(self.objective, x0, self["t"], self["s"], self.mask(), eps, eps_given)

    def output(self, what: str) -> Tensor:
        if what == "mask":
            height, width = self["x0"].shape[-2:]
            return swapped(self.mask().expand(-1, -1, -1, height, width))
        x, target = self.pair(one_noise=what == "loss_one_noise")
        if what == "unet_input":
            return swapped(x)
        pred = Network(self.tensors, f"train_{self.tag}")(x, self["t"], self["s"])
        return per_sample_l1(pred, target).mean()


# ---- sampling ------------------------------------------------------------------------------------------------------


class Sampling:
    """The released sampling of a tag: each run takes the file's draws in their order and keeps the network's inputs."""

    def __init__(self, info: Info, tensors: Tensors, objective: EpsObjective, tag: str) -> None:
        self.info, self.tensors, self.objective, self.tag = info, tensors, objective, tag
        self.calls: list[Tensor] = []

    def sampler(self, task: str) -> ClipSampler:
        config, network = self.info["config"], Network(self.tensors, task)

        def watched(x: Tensor, t: Tensor, known: Known | None) -> Tensor:
            mask = torch.zeros_like(x[:, :, :1, :1, :1]) if known is None else known.shown
            self.calls.append(network_input(x, mask))
            return network(self.calls[-1], t, None if known is None else known.timestep)

        def run(model: Model, noise: Tensor) -> Tensor:
            return sample_along(path, model, noise, config["eta"], generator)[-1]

        options = ClipsConfig(
            overlap=config["T_cond"],
            level=config["sample_cond_noise_level"],
            guidance=config["cfg"] if self.tag == "cfg" else 0.0,
            released=True,
        )
        path, generator = path_of(self.info, self.objective), torch.Generator()
        return ClipSampler(watched, self.objective, run, options, generator)

    def predicted(self) -> Tensor:
        sampler, config = self.sampler("pred"), self.info["config"]
        with self.draws("pred") as draw:
            first = sampler.sample(draw(None, None))
            return predict_frames(sampler, first, config["n_pred_steps"])

    def interpolated(self) -> Tensor:
        with self.draws("interp"):
            base = swapped(self.tensors[f"outputs.{self.tag}_pred_base"])
            return interpolate_frames(self.sampler("interp"), base, self.info["config"]["T_interp"])

    @contextmanager
    def draws(self, task: str) -> Iterator[Callable[[Tensor | None, object], Tensor]]:
        """Noise is the next of the file's."""
        names = sorted(k for k in self.tensors if k.startswith(f"inputs.{self.tag}_{task}_draw_"))
        left = iter([swapped(self.tensors[name]) for name in names])

        def draw(like: Tensor | None, generator: object) -> Tensor:
            noise = next(left)
            assert like is None or like.shape == noise.shape
            return noise

        with (
            mock.patch.object(clip_sampling, "randn_like", draw),
            mock.patch.object(inversion, "randn_like", draw),
        ):
            yield draw

    def output(self, what: str) -> Tensor:
        if what == "pred_base":
            return swapped(self.predicted())
        made = swapped(self.interpolated()) if "interp" in what else swapped(self.predicted())
        if what == "interp_z":
            return made
        steps = self.info["config"]["ddim_steps"]  # calls of the first clip, which has no given frames
        first = {"first_pred_call_input": steps, "first_pred_uncond_call_input": steps + 1}.get(what, 0)
        return swapped(self.calls[first])
