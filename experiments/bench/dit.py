"""The video DiT's forward pass on the CPU, in Latte's layout and our own, against Latte's measured figure.

    python -m experiments.bench.dit                                   # two threads, a minute
    python -m experiments.bench.dit --table docs/results/dit_cpu.md

S/2 (hidden 384, depth 12, heads 6, patch 2), one video of 16 x 32 x 32 latents, float32, without gradients.
``interleaved``: spatial and temporal blocks alternate, as in Latte. ``factorised``: both in every block, every frame
reading the first and the previous one. ``joint``: one attention over space and time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import tyro
from torch import Tensor

from dit_booth.models.clip.encoders import Text
from dit_booth.models.dit.model import DiTConfig, VideoDiT
from experiments.bench.side_by_side import Row, SideBySideArguments, about, run

MODULE = "experiments.bench.dit"
FRAMES, CHANNELS, SIDE, WIDTH = 16, 4, 32, 768
CONFIGS = {
    "interleaved": DiTConfig(size="S", layout="interleaved", plan="self"),
    "factorised": DiTConfig(size="S"),
    "joint": DiTConfig(size="S", layout="joint", plan="all"),
}
# Latte's own code at this configuration on a quiet machine of two such cores: seconds, MiB.
LATTE = (1.78, 1051)
BAR = 1.2


def job(name: str) -> Callable[[], Tensor]:
    """A network with random weights on one video; its forward pass."""
    torch.manual_seed(0)
    net = VideoDiT(CONFIGS[name], channels=CHANNELS, text_dim=WIDTH, text_embed_dim=WIDTH).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.02)
    x, t = torch.randn(1, FRAMES, CHANNELS, SIDE, SIDE), torch.tensor([500.0])
    text = Text(torch.randn(1, 8, WIDTH), torch.randn(1, WIDTH))

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = net(x, t, text)
        return out

    return forward


def more(row: Row) -> Row:
    """Return the ratio of Latte's time to ours."""
    return {"latte_over_it": round(LATTE[0] / row["seconds"], 2)}


def page(rows: list[Row]) -> str:
    """The table, for people."""
    lines = [
        "# The video DiT's forward pass on the CPU",
        "",
        about(rows[0], MODULE),
        "",
        f"S/2, one video of {FRAMES} x {SIDE} x {SIDE} latents. Latte's code took {LATTE[0]} s and {LATTE[1]} MiB on a"
        f" quiet machine of this kind in another run; the target for its layout is {BAR} times its speed with no more"
        " memory.",
        "",
        "| layout | s | best s | Latte's time / row | peak MiB |",
        "|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['job']} | {r['seconds']:.2f} | {r['best']:.2f} | {r['latte_over_it']} | {r['peak_mib']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    jobs = {name: partial(job, name) for name in CONFIGS}
    run(tyro.cli(SideBySideArguments, description=__doc__), MODULE, jobs, more, page)
