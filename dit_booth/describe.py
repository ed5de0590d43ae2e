"""Print what a network is: its parameters, and the multiply-adds and FLOPs of one forward pass.

python -m dit_booth.describe                                          # DiT's sizes as the paper counts them
python -m dit_booth.describe --backbone dit --dit.size XL --data.frames 16 --strategy kv_concat
python -m dit_booth.describe --backbone unet --strategy token_replacement+kv_concat --latents 4 32 32

A multiply-add is two FLOPs; the DiT paper's "Gflops" are multiply-adds. Counted are matrix products, convolutions and
attention, one video at a time, on the meta device: nothing is computed, no weights are loaded. Text and image encoder
are not counted; their widths are those of CLIP ViT-L/14. All options of a run are understood.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dit_booth.config import RunConfig
from dit_booth.inject import Injection, PromptTokens, Reference, Site, Sites
from dit_booth.injected import Injected
from dit_booth.models.clip import Prompt, Text
from dit_booth.models.dit import DiTConfig, VideoDiT
from dit_booth.models.unet import VideoUNet
from dit_booth.strategy import create, find

TEXT, TOKENS = (
    768,
    77,
)  # of CLIP ViT-L/14: width of both towers' common space and of the text, tokens of a prompt
IMAGE, PATCHES = 1024, 257  # width and tokens of its image tower
Latents = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """Parameters, and multiply-adds of one forward pass."""

    parameters: int
    multiply_adds: int

    @property
    def flops(self) -> int:
        return 2 * self.multiply_adds

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:9.2f} M parameters {self.multiply_adds / 1e9:10.2f} G multiply-adds"
            f" {self.flops / 1e9:10.2f} GFLOPs"
        )


def main(argv: Sequence[str]) -> int:
    """0: printed; 1: settings that cannot work, said in one line."""
    from dit_booth.cli import parse

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--latents", type=int, nargs=3, default=(4, 32, 32), metavar=("C", "H", "W"))
    given, rest = first.parse_known_args(list(argv))
    try:
        lines = (
            table_of_sizes(given.latents)
            if not rest
            else table_of_run(parse(rest, description=__doc__ or ""), given.latents)
        )
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def table_of_sizes(latents: Latents) -> list[str]:
    """DiT's sizes for one image: class labels, and a predicted variance."""
    lines = [
        "{} x {} x {} latents, one image with a class label (DiT, table 1 and figure 2)".format(*latents)
    ]
    for size in ("nano", "S", "B", "L", "XL"):
        for patch in (2, 4, 8):
            if not (latents[1] % patch or latents[2] % patch):
                lines.append(f"DiT-{f'{size}/{patch}':7} {image_cost(size, patch, latents)}")
    return lines


def image_cost(
    size: Literal["nano", "S", "B", "L", "XL"], patch: Literal[1, 2, 4, 8], latents: Latents = (4, 32, 32)
) -> Cost:
    """DiT as published: one image, a class label, a predicted variance."""
    config = DiTConfig(size=size, patch=patch, layout="image", plan="self", conditioning="class_label")
    with torch.device("meta"):
        dit = VideoDiT(config, channels=latents[0], out_channels=2 * latents[0], text_dim=1, text_embed_dim=1)
        x, label = torch.empty(1, 1, *latents), torch.zeros(1, dtype=torch.long)
        return cost_of(dit, lambda: dit(x, torch.zeros(1), label))


def table_of_run(config: RunConfig, latents: Latents) -> list[str]:
    """The backbone alone, and with the strategies and an image, in which the reference's own pass is counted."""
    frames = config.data.frames
    root = build(config, latents)
    lines = [
        f"{config.backbone}, {frames} frames of {{}} x {{}} x {{}} latents, one video".format(*latents),
        f"{'backbone':40} {cost_of(root.backbone, lambda: root(*inputs(frames, latents)))}",
    ]
    if list(root.strategy.parameters()) or any(root.strategy.part(n).attached for n in root.strategy.names):
        image = reference(latents, root.strategy.reference_frames(root.strategy.names))
        both = cost_of(root.backbone, lambda: root(*inputs(frames, latents), image))
        own = sum(p.numel() for p in root.strategy.parameters())
        lines.append(f"{'with ' + config.strategy:40} {replace(both, parameters=both.parameters + own)}")
    return lines


def cost_of(module: nn.Module, forward: Callable[[], Any]) -> Cost:
    """Parameters of a module, and what `forward` costs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return Cost(sum(p.numel() for p in module.parameters()), counter.get_total_flops() // 2)


# ---- a run's network without its encoders ------------------------------------------------------------------


class GivenText(nn.Module):
    """In place of the text tower: its outputs' shapes, and its site."""

    def __init__(self) -> None:
        super().__init__()
        self.site = Site(name="text.prompt", port="prompt", role="words", dim=TEXT)

    def forward(self, prompt: Prompt, inject: Injection) -> Text:
        rows = len(prompt.ids)
        return Text(torch.empty(rows, TOKENS, TEXT), torch.empty(rows, TEXT))


def build(config: RunConfig, latents: Latents) -> Injected:
    """The run's backbone and strategies on the meta device."""
    with torch.device("meta"):
        backbone: VideoDiT | VideoUNet
        if config.backbone == "dit":
            backbone = VideoDiT(config.dit, channels=latents[0], text_dim=TEXT, text_embed_dim=TEXT)
        else:
            widths = {"in_channels": latents[0], "out_channels": latents[0], "text_dim": TEXT}
            backbone = VideoUNet(replace(config.unet, **widths))
        text: Any = GivenText()
        sites = Sites((text.site, *backbone.sites()), IMAGE, TEXT, latents[0], config.data.frames)
        strategies = create(find(config.strategy), config.options(), sites)
        return Injected(backbone, text, strategies, prompt())


def prompt() -> Prompt:
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    return Prompt(ids, ids)


def inputs(frames: int, latents: Latents) -> tuple[Tensor, Tensor, Prompt]:
    return torch.empty(1, frames, *latents, device="meta"), torch.zeros(1, device="meta"), prompt()


def reference(latents: Latents, copies: int) -> Reference:
    """An image prompt of the video's size."""
    with torch.device("meta"):
        return Reference(
            image=torch.empty(1, 3, 8 * latents[1], 8 * latents[2]),
            states=tuple(torch.empty(1, PATCHES, IMAGE) for _ in range(5)),
            embedding=torch.empty(1, TEXT),
            latent=torch.empty(1, 1, *latents),
            noisy=torch.empty(1, copies, *latents),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
