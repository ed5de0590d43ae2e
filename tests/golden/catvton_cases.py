"""CatVTON: `spatial_concat` on the image U-Net's weights, its guidance and its sampling steps, against a file.

The original's latents have nine channels: the noisy picture (both halves), the mask, and the masked picture above the
condition. Our strategy puts all nine of the lower half below all nine of the upper one. Each output is checked by our
float32 and float64 runs against the stored tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import CaseResult, Info, Tensors, cast, labelled, outputs, tolerance, worst
from dit_booth.strategies.spatial_concat import SpatialConcat, SpatialConcatConfig
from einops import rearrange
from torch import Tensor

from dit_booth.attention import FramePlan
from dit_booth.diffusion import DiscreteSchedule, guide, scaled_linear_betas
from dit_booth.inject import Condition, Injection, Latents, Reference, Sites
from dit_booth.models.clip.encoders import Text
from dit_booth.models.unet.blocks import UNetInputs
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.models.upstream.stable_diffusion import from_diffusers
from dit_booth.models.weights import load_strictly
from dit_booth.strategy import Strategies

SCALE = 0.18215  # the latents are divided by it for the decoder
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every call of the network, what enters it, the final latents and the bare block."""
    stored, calls = outputs(tensors), len([name for name in outputs(tensors) if name.startswith("unet_in_")])
    for dtype in (torch.float32, torch.float64):
        ours = Ours(info, cast(tensors, dtype))
        with torch.no_grad():
            made = {**ours.sampled(calls), "unet_single_call": ours.called(0), "block_out": ours.block()}
        for name in sorted(set(made) & set(stored)):
            yield CaseResult(
                labelled(name, dtype), worst(made[name], stored[name]), tolerance(dtype, stored[name])
            )
    for k in range(calls):  # the steps at which it was called
        step = torch.tensor(ours.steps(calls)[k])
        yield CaseResult(f"unet_t_{k}", worst(step.float(), stored[f"unet_t_{k}"].float()))


class Ours:
    """The U-Net with the file's weights, under `spatial_concat`, in the dtype of the tensors."""

    def __init__(self, info: Info, tensors: Tensors) -> None:
        config, self.tensors = info["config"], tensors
        attends = tuple(kind.startswith("CrossAttn") for kind in config["down_block_types"])
        self.unet = VideoUNet(
            UNetConfig(
                in_channels=config["in_channels"],
                out_channels=config["out_channels"],
                channels=tuple(config["block_out_channels"]),
                layers_per_block=config["layers_per_block"],
                heads=config["attention_head_dim"],
                norm_groups=config["norm_num_groups"],
                text_dim=config["cross_attention_dim"],
                down_attention=attends,
            )
        )
        weights = {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
        load_strictly(self.unet, from_diffusers(weights, self.unet.state_dict()), "golden")
        self.dtype = tensors["inputs.init_noise"].dtype
        self.unet.to(self.dtype)
        sites = Sites((*self.unet.sites(),), image_dim=8, image_embed_dim=8, latent_channels=9, frames=1)
        self.strategy = SpatialConcat(SpatialConcatConfig(), sites)

    def bind(self, condition: Condition) -> Injection:
        return Strategies({"spatial_concat": self.strategy}).bind(
            ["spatial_concat"], {"spatial_concat": condition}
        )

    def predict(self, above: Tensor, below: Tensor, t: int) -> Tensor:
        """The prediction for both halves (b c 2h w), from nine channels of each (b c h w)."""
        inject = self.bind(Condition(shared=rearrange(below, "b c h w -> b 1 c h w")))
        x = rearrange(above, "b c h w -> b 1 c h w")
        nothing = torch.randn(
            len(x), 3, self.unet.config.text_dim, dtype=self.dtype
        )  # skipped: it may be anything
        upper = self.unet(x, torch.full((len(x),), t), Text(nothing, nothing[:, 0]), inject)
        assert inject.aux_prediction is not None
        return torch.cat([upper, inject.aux_prediction.prediction], dim=-2)[:, 0]

    def called(self, k: int) -> Tensor:
        """The network on the k-th call's own input."""
        above, below = self.tensors[f"outputs.unet_in_{k}"].chunk(2, dim=-2)
        return self.predict(above, below, int(self.tensors[f"outputs.unet_t_{k}"]))

    def conditions(self) -> tuple[Tensor, Tensor]:
        """Mask and picture channels (b 5 h w) above and below, rows [unconditional, conditional]."""
        given = self.tensors
        mask, picture = given["inputs.mask"], given["inputs.image"]
        above = torch.cat([mask, picture * (mask < 0.5)], dim=1).expand(2, -1, -1, -1)
        garment = rearrange(given["inputs.condition_image"], "b c h w -> b 1 c h w").expand(2, -1, -1, -1, -1)
        row = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)  # without an image, and with one
        reference = Reference(row.expand(2, 3, 4, 4), (), row, garment)
        latent = self.strategy(reference, {}).shared
        below = torch.cat([torch.zeros_like(mask).expand(2, -1, -1, -1), latent[:, 0]], dim=1)
        return above, below

    @staticmethod
    def steps(calls: int) -> list[int]:
        """DDIM's leading spacing with an offset of one (diffusers)."""
        return [(calls - 1 - k) * (1000 // calls) + 1 for k in range(calls)]

    def sampled(self, calls: int) -> dict[str, Tensor]:
        """All sampling steps from the file's noise: what enters the network, leaves it, and the final latents."""
        schedule = DiscreteSchedule(scaled_linear_betas(1000, 0.00085, 0.012))
        scale = self.tensors["inputs.guidance_scale"].item()
        (above, below), x = self.conditions(), self.tensors["inputs.init_noise"]
        made = {}
        for k, t in enumerate(self.steps(calls)):
            upper, lower = (
                torch.cat([half.expand(2, -1, -1, -1), rest], dim=1)
                for half, rest in zip(x.chunk(2, dim=-2), (above, below), strict=True)
            )
            put_below, cut_below = (self.strategy.attached[f"latents.{at}"] for at in ("entry", "exit"))
            image = rearrange(lower, "b c h w -> b 1 c h w")
            joined = put_below(Latents(rearrange(upper, "b c h w -> b 1 c h w")), image)
            made[f"unet_in_{k}"] = joined.x[:, 0]
            assert torch.equal(cut_below(joined, image).x[:, 0], upper)
            made[f"unet_out_{k}"] = self.predict(upper, lower, t)
            without, with_ = made[f"unet_out_{k}"].chunk(2)
            x = self.ddim(schedule, guide(with_, without, scale), x, t, t - 1000 // calls)
        made["final_latents_scaled"] = x.chunk(2, dim=-2)[0] / SCALE
        return made

    def ddim(self, schedule: DiscreteSchedule, eps: Tensor, x: Tensor, t: int, before: int) -> Tensor:
        """Song et al., eq. 12 with eta = 0; the last step ends at the first step's noise level (diffusers)."""
        level = torch.as_tensor(schedule.alphas_cumprod, dtype=torch.float64).to(self.dtype)
        now, then = level[t], level[max(before, 0)]
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        return then.sqrt() * x0 + (1 - then).sqrt() * eps

    def block(self) -> Tensor:
        """One transformer block whose text attention hands on its input: h + norm2(h)."""
        block = self.unet.get_submodule(BLOCK)
        x = rearrange(self.tensors["inputs.block_in"], "b n c -> b 1 n c")
        inject = self.bind(Condition(shared=torch.zeros(1)))
        text = torch.zeros(len(x), 1, self.unet.config.text_dim, dtype=self.dtype)
        step = UNetInputs(torch.zeros(1), text, FramePlan("self").frames(1), inject)
        return block(x, step)[:, 0]
