"""Wan's forward pass on the CPU against diffusers' class, and with an injected reference.

    python -m experiments.bench.wan                                   # two threads, a few minutes
    python -m experiments.bench.wan --table docs/results/wan_cpu.md

``diffusers``: `WanTransformer3DModel`. ``ours``: `VideoWan`, plan `all`. ``reference``: every frame also reads the keys
and values of a clean reference (`kv_concat`, update direct), made once, as in sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import tyro
from diffusers import WanTransformer3DModel  # here, so that every job's memory has it
from dit_booth.strategies.kv_concat import KVConcat, KVConcatConfig
from einops import rearrange
from torch import Tensor

from dit_booth.inject import Recorder, Reference, Sites
from dit_booth.models.clip.encoders import Text
from dit_booth.models.wan.model import VideoWan, WanConfig
from dit_booth.strategy import Strategies
from experiments.bench.side_by_side import Row, SideBySideArguments, about, run

MODULE = "experiments.bench.wan"
CONFIG = WanConfig(depth=4, hidden=768, heads=6, ffn=4480)
FRAMES, CHANNELS, SIDE, TOKENS, TEXT = 5, 16, 24, 512, 512
NAMES = ("kv_concat",)
REFERENCE_BAR = 1.1 * (1 + 1 / FRAMES)  # of our own pass without


class Inputs:
    """One video, its timestep and its text."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.t = torch.randn(1, FRAMES, CHANNELS, SIDE, SIDE), torch.tensor([500.0])
        words = torch.randn(1, TOKENS, TEXT)
        self.text = Text(words, words[:, -1])


def diffusers_pass(given: Inputs) -> Callable[[], Tensor]:
    depth, hidden, heads, ffn = CONFIG.shape
    net = WanTransformer3DModel(
        num_layers=depth,
        num_attention_heads=heads,
        attention_head_dim=hidden // heads,
        ffn_dim=ffn,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT,
    ).eval()
    x = rearrange(given.x, "b f c h w -> b c f h w")
    return lambda: rearrange(net(x, given.t, given.text.tokens).sample, "b c f h w -> b f c h w")


def our_pass(given: Inputs) -> Callable[[], Tensor]:
    net = network()
    return lambda: net(given.x, given.t, given.text)


def pass_with_reference(given: Inputs) -> Callable[[], Tensor]:
    net, latent = network(), torch.randn(1, 1, CHANNELS, SIDE, SIDE)
    options = KVConcatConfig(
        update="direct", reference_at="all", reference_noise="clean", train_frame_kv=False
    )
    strategies = Strategies(
        {"kv_concat": KVConcat(options, Sites(tuple(net.sites()), 8, 8, CHANNELS, FRAMES))}
    )
    recorder = Recorder(strategies.bind(NAMES), strategies.needs["kv_concat"].sites)
    net(latent, torch.zeros(1), given.text, recorder)
    image = Reference(torch.ones(1, 3, 8, 8), (), torch.zeros(1, 8), latent)
    inject = strategies.bind(NAMES, strategies(image, {"clean": recorder.hidden}, NAMES))
    del recorder
    return lambda: net(given.x, given.t, given.text, inject)


def network() -> VideoWan:
    """Return our network with random weights, its output layer too."""
    net = VideoWan(CONFIG, channels=CHANNELS, text_dim=TEXT).eval()
    torch.nn.init.normal_(net.proj_out.weight, std=0.02)
    return net


JOBS = {"diffusers": diffusers_pass, "ours": our_pass, "reference": pass_with_reference}


@torch.no_grad()
def job(name: str) -> Callable[[], Tensor]:
    """Return one of the jobs, with a network of its own."""
    return torch.no_grad()(JOBS[name](Inputs()))


def more(row: Row) -> Row:
    """Return no further field."""
    return {}


def page(rows: list[Row]) -> str:
    """The table, for people."""
    first, ours = (next(r for r in rows if r["job"] == name) for name in ("diffusers", "ours"))
    lines = [
        "# Wan's forward pass on the CPU",
        "",
        about(rows[0], MODULE),
        "",
        f"{CONFIG.shape.depth} blocks of width {CONFIG.shape.hidden}, one video of {FRAMES} x {SIDE} x {SIDE} latents,"
        f" {TOKENS} text tokens. Targets: `ours` no slower than `diffusers`, with no more memory; `reference` at most"
        f" {REFERENCE_BAR:.2f} of `ours`, (1 + 1/F) plus 10 %.",
        "",
        "| job | s | best s | of diffusers' | of ours | peak MiB | of diffusers' |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        of_ours, memory = r["over_first"] / ours["over_first"], r["peak_mib"] / first["peak_mib"]
        lines.append(
            f"| {r['job']} | {r['seconds']:.2f} | {r['best']:.2f} | {r['over_first']:.2f} | {of_ours:.2f}"
            f" | {r['peak_mib']} | {memory:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jobs = {name: partial(job, name) for name in JOBS}
    run(tyro.cli(SideBySideArguments, description=__doc__), MODULE, jobs, more, page)
