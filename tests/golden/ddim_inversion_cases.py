"""DDIM inversion of Tune-A-Video and Video-P2P, sampling back, and null-text optimisation; the network is linear."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from cases import CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from torch import Tensor

from dit_booth.diffusion.guidance import guide
from dit_booth.diffusion.inversion import DDIMPath, invert_along, sample_along
from dit_booth.diffusion.null_text import NullText, NullTextConfig, optimise_null_text
from dit_booth.diffusion.schedule import scaled_linear_betas

LEVEL = 1e-6
"""Largest error of abar: the original's is a product in float32."""


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output: tables, ``tav_*`` (Tune-A-Video) and ``p2p_*`` (Video-P2P)."""
    abar = torch.cumprod(1 - scaled_linear_betas(), dim=0)
    for name in sorted(outputs(tensors)):
        stored, integers = tensors[f"outputs.{name}"], name.endswith(("_timesteps", "_used"))
        if name in ("alphas_cumprod", "final_alpha_cumprod_set_to_one_false"):
            yield CaseResult(name, worst(abar if stored.ndim else abar[0], stored), LEVEL)
            continue
        for dtype in (torch.float32, torch.float64):
            made = Inversion(info, cast(tensors, dtype), abar).output(name)
            if made is not None:
                allowed = 0.0 if integers else tolerance(dtype, stored)
                yield CaseResult(labelled(name, dtype), worst(made, stored), allowed)


class Inversion:
    """The file's network, and the runs whose results are stored."""

    def __init__(self, info: Info, tensors: Tensors, abar: Tensor) -> None:
        self.config, self.tensors, self.abar = info["config"], tensors, abar
        self.x0, self.source, self.empty = (
            tensors[f"inputs.{name}"] for name in ("x0_latent", "emb_source", "emb_uncond")
        )

    def output(self, name: str) -> Tensor | None:
        """The output of that name; None: an unknown one."""
        if found := re.fullmatch(r"tav_(off\d+(?:_one)?)_n(\d+)_(\w+)", name):
            return self.tune_a_video(found[1], int(found[2]), found[3])
        if found := re.fullmatch(r"p2p_(large_epsilon_)?(\w+)", name):
            return self.video_p2p(found[2], large=found[1] is not None)
        return None

    def eps(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The network, linear in the latents (b c f h w), the timestep and the mean of the text's tokens."""
        a, over_time, b, m = (self.tensors[f"weights.{name}"] for name in ("A", "Tm", "b", "M"))
        level, words = t.to(x.dtype) / 1000, text.mean(dim=1)
        channels = torch.einsum("dc,bcfhw->bdfhw", a, x)
        frames = torch.einsum("gf,bdfhw->bdghw", over_time, x)
        constant = level[:, None] * b + words @ m.T
        return channels + frames + constant[:, :, None, None, None]

    def told(self, text: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(self.eps, text=text)

    def path(self, steps: int, offset: int, to_one: bool) -> DDIMPath:
        """diffusers' timesteps, and its level of the data: abar_0 unless set_alpha_to_one."""
        timesteps = torch.arange(steps) * (len(self.abar) // steps) + offset
        data = torch.ones(1).double() if to_one else self.abar[:1]
        return DDIMPath(timesteps, torch.cat([data, self.abar[timesteps]]))

    def tune_a_video(self, tag: str, steps: int, what: str) -> Tensor | None:
        offset = int(tag.removeprefix("off").removesuffix("_one"))
        path = self.path(steps, offset, tag.endswith("_one"))
        text = self.empty if tag == "off0" else self.source
        if what == "timesteps":
            return path.timesteps.flip(0)
        inverted = invert_along(path, self.told(text), self.x0)
        if what == "inverted_all":
            return torch.stack(inverted)
        if what == "sampled_all":
            return torch.stack(sample_along(path, self.told(text), inverted[-1]))
        if what == "sampled_guided":
            return sample_along(path, self.guided(self.config["tav_guidance"]), inverted[-1])[-1]
        return None

    def guided(self, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: guide(self.eps(x, t, self.source), self.eps(x, t, self.empty), scale)

    def video_p2p(self, what: str, large: bool) -> Tensor | None:
        path, inverted = self.p2p_path, self.p2p_inverted
        if what == "timesteps":
            return path.timesteps.flip(0)
        if what == "inverted_all":
            return torch.stack(inverted)
        if what == "guided_without_optimisation":
            return sample_along(path, self.guided(self.config["p2p_guidance"]), inverted[-1])[-1]
        if what == "inner_steps_used":
            return torch.tensor(self.null_text(large).updates)
        if what == "null_embeddings":
            return torch.cat(self.null_text(large).embeddings)
        if what == "guided_with_null_embeddings_all":
            return torch.stack(self.null_text(large).states)
        return None

    @cached_property
    def p2p_path(self) -> DDIMPath:
        return self.path(self.config["p2p_steps"], 0, to_one=False)

    @cached_property
    def p2p_inverted(self) -> list[Tensor]:
        return invert_along(self.p2p_path, self.told(self.source), self.x0)

    def null_text(self, large: bool) -> NullText:
        config = NullTextConfig(
            scale=self.config["p2p_guidance"],
            inner_steps=self.config["p2p_inner_steps"],
            epsilon=self.config.get("p2p_large_epsilon", 0.12) if large else self.config["p2p_epsilon"],
        )
        return optimise_null_text(self.p2p_path, self.eps, self.p2p_inverted, self.source, self.empty, config)
