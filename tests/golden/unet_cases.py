"""VideoBooth's U-Net: `dit_booth`'s, through `Injected` and its two strategies, and the naive one, against a file.

Each output is checked: our float32 and float64 runs against the stored tensor and, unless the file stores float64, our
float64 run against `dense.DenseUNet` ("dense float64"), which no rounding of the file blurs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from cases import FLOAT64, CaseResult, Info, Tensors, cast, flat, labelled, outputs, tolerance, worst
from dense import DenseUNet
from dit_booth.strategies.kv_concat import KVConcat, KVConcatConfig
from dit_booth.strategies.token_replacement import TokenReplacement, TokenReplacementConfig
from einops import rearrange
from torch import Tensor, nn

from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.inject import Injection, Reference, Site, Sites
from dit_booth.models.clip.encoders import Prompt, Text
from dit_booth.models.injected import Injected
from dit_booth.models.unet.model import UNetConfig, VideoUNet
from dit_booth.models.upstream.stable_diffusion import FIXED_SETTINGS, find_unsupported
from dit_booth.strategy import Strategies, Strategy

INJECTED = ("to_k_new", "to_v_new", "to_k_exemplar", "to_v_exemplar", "to_k_global", "to_v_global")
STAGES = {"plain": (), "coarse": ("token_replacement",), "fine": ("token_replacement", "kv_concat")}
RELEASED_GUIDED = 3  # channels that the released code guides
FIXED = {k: v for k, v in FIXED_SETTINGS.items() if k != "mid_block_type"} | {"upcast_attention": False}
"""Of the original's configuration: what this U-Net is, and an absent entry means (its mid block has one kind)."""

Conditioning = tuple[Tensor, Tensor, Tensor]
"""The reference's latents (b r c h w), times (b,) and text (b l d)."""


class Network(Protocol):
    """Ours and the naive one: x (b f c h w) at t (b,), text (b l d) -> prediction."""

    def __call__(
        self, x: Tensor, t: Tensor, text: Tensor, stage: str = ..., reference: Conditioning | None = ...
    ) -> Tensor: ...

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """As the released code does: of `RELEASED_GUIDED` channels."""
        ...


def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output that is a prediction or a guided one; guidance, which multiplies errors, gets no more tolerance."""
    weights = {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
    dense, dtypes = dense_of(info, weights), (torch.float32, torch.float64)
    ours = {dtype: (Ours(info, weights).to(dtype), cast(tensors, dtype)) for dtype in dtypes}
    for name in sorted(filter(known, outputs(tensors))):
        stored = rearrange(tensors[f"outputs.{name}"], "b c f h w -> b f c h w")
        limit = flat if name in GUIDED else tolerance
        for dtype in dtypes:
            made = produce(name, *ours[dtype])
            yield CaseResult(labelled(name, dtype), worst(made, stored), limit(dtype, stored))
        if stored.dtype != torch.float64:
            exact = produce(name, dense, ours[torch.float64][1])
            yield CaseResult(f"{name} dense float64", worst(made, exact), FLOAT64)


# ---- the cases, from names to inputs -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How a case is run: the stage, and which of the file's inputs the reference is made of."""

    stage: str
    latent: str = ""
    time: str = "exemplar_timestep"
    text: str = "exemplar_encoder_hidden_states"
    copies: bool = False  # one frame is enough unless every copy has noise of its own


RECIPES = {
    "a_plain": Recipe("plain"),
    "b_coarse": Recipe("coarse"),
    "c_fine_no_exemplar": Recipe("fine"),
    "c_fine_same_noise": Recipe("fine", "same_noise"),
    "c_fine_other_exemplar_timestep": Recipe("fine", "same_noise", time="exemplar_timestep_other"),
    "c_fine_exemplar_text_none": Recipe(
        "fine", "same_noise", text="encoder_hidden_states"
    ),  # it reads the video's
    "d_fine_own_noise": Recipe("fine", "own_noise", copies=True),
}
GUIDED = ("e_cond", "e_uncond", "e_cfg", "e_cfg_stage1")


def parse(name: str) -> tuple[str, int | None, str]:
    """``a_plain_f1_b2`` -> its recipe, the frames that it takes, and the suffix of its inputs (``_b2``)."""
    base, frames, batch = re.fullmatch(r"(.*?)(?:_f(\d+))?(_b\d+)?", name).groups()  # type: ignore[union-attr]
    return base, int(frames) if frames else None, batch or ""


def known(name: str) -> bool:
    return name in GUIDED or parse(name)[0] in RECIPES


@torch.no_grad()
def produce(name: str, network: Network, tensors: Tensors) -> Tensor:
    """The output `name` (b f c h w) by `network`."""
    if name in GUIDED:
        return guided(name, network, tensors)
    base, frames, batch = parse(name)
    recipe = RECIPES[base]
    x, text = video(tensors, f"sample{batch}")[:, :frames], tensors[f"inputs.encoder_hidden_states{batch}"]
    t = tensors[f"inputs.timestep{batch}"]
    return network(x, t, text, recipe.stage, conditioning(recipe, tensors, batch, frames))


def conditioning(recipe: Recipe, tensors: Tensors, batch: str, frames: int | None) -> Conditioning | None:
    if not recipe.latent:
        return None
    latent = video(tensors, f"exemplar_latent_{recipe.latent}{batch}")[:, : frames if recipe.copies else 1]
    return latent, tensors[f"inputs.{recipe.time}{batch}"], tensors[f"inputs.{recipe.text}{batch}"]


def guided(name: str, network: Network, tensors: Tensors) -> Tensor:
    """The released guidance: one half of the rows, [conditional, unconditional] texts, the image for the first."""
    rows = len(tensors["inputs.e_timestep"])
    batch = next(
        parse(key)[2]
        for key in sorted(tensors)
        if key.startswith("inputs.sample") and len(tensors[key]) == rows
    )
    half = slice(rows // 2)
    x, t = video(tensors, f"sample{batch}")[half], tensors["inputs.e_timestep"][half]
    cond, uncond = tensors[f"inputs.encoder_hidden_states{batch}"].chunk(2)
    stage, reference = "coarse", None
    if name != "e_cfg_stage1":
        image = conditioning(RECIPES["d_fine_own_noise"], tensors, batch, None)
        stage, reference = "fine", tuple(part[half] for part in image)  # type: ignore[union-attr]
    if name == "e_cond":
        return network(x, t, cond, stage, reference)
    without = network(x, t, uncond, stage)
    if name == "e_uncond":
        return without
    scale = float(tensors["inputs.e_cfg_scale"])
    first = network.guide(network(x, t, cond, stage, reference), without, scale)
    # The second half is the first one, its other channels the unconditional prediction; no sampler reads it.
    second = torch.cat([first[:, :, :RELEASED_GUIDED], without[:, :, RELEASED_GUIDED:]], dim=2)
    return torch.cat([first, second])


def video(tensors: Tensors, key: str) -> Tensor:
    return rearrange(tensors[f"inputs.{key}"], "b c f h w -> b f c h w")


# ---- ours ----------------------------------------------------------------------------------------------------------


class GivenText(nn.Module):
    """In place of the text encoder, whose output the files hold: token ids 0 mean the reference's text."""

    video: Tensor
    reference: Tensor

    def forward(self, prompt: Prompt, inject: Injection) -> Text:
        tokens = self.video if prompt.ids.any() else self.reference
        return Text(tokens, tokens[:, -1])


class Ours:
    """`Injected` with the original's weights: backbone and strategies, every parameter with one owner."""

    def __init__(self, info: Info, weights: Mapping[str, Tensor]) -> None:
        own = {name: x for name, x in weights.items() if name.split(".")[-2] not in INJECTED}
        unet = VideoUNet(config_of(info["config"], own))
        unet.load_state_dict(own)  # strict: the parameter names are upstream's, all of them
        strategies = strategies_of({k: x for k, x in weights.items() if k not in own}, unet.sites())
        null = Prompt.without_subject(torch.zeros(1, 1, dtype=torch.long))
        self.model: Any = Injected(unet, GivenText(), strategies, null)  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Ours:
        self.model.to(dtype)
        return self

    def __call__(
        self, x: Tensor, t: Tensor, text: Tensor, stage: str = "plain", reference: Conditioning | None = None
    ) -> Tensor:
        root = self.model
        root.active, root.text.video = STAGES[stage], text
        ids = torch.ones(len(x), 1, dtype=torch.long)
        prompt = Prompt.without_subject(ids)
        if reference is None:
            return root(x, t, prompt).output
        noisy, reference_t, root.text.reference = reference
        image = reference_of(noisy)
        if torch.equal(t, reference_t):
            return root(x, t, prompt, image).output
        # Only the golden files noise the reference to another time than the video's.
        sites = [site for name in root.active for site in root.strategy.needs[name].sites]
        hidden = {"matched": root.hidden(noisy, reference_t, sites)}
        inject = root.strategy.bind(root.active, root.strategy(image, hidden, root.active))
        return root.backbone(x, t, root.text(prompt, inject), inject)

    def guide(self, cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        """By the options that docs/fidelity.md names."""
        guidance = GuidanceConfig(scale=scale, channels=RELEASED_GUIDED, unconditional="omit")
        return guidance.combine([cond if branch.image else uncond for branch in guidance.branches()])


def strategies_of(weights: Mapping[str, Tensor], sites: Sequence[Site]) -> Strategies:
    """VideoBooth's strategies, as far as the original's `weights` (upstream's names) have their parameters."""
    words = Site(name="text.prompt", port="prompt", role="words", dim=8)
    every = Sites((words, *sites), image_dim=8, image_embed_dim=8, latent_channels=4, frames=4)
    parts: dict[str, Strategy] = {}
    if any("_global." in name for name in weights):
        parts["token_replacement"] = TokenReplacement(TokenReplacementConfig(), every)
    if any("_exemplar." in name for name in weights):
        parts["kv_concat"] = KVConcat(KVConcatConfig(), every)
    left = dict(weights)
    for part in parts.values():
        part.taps.load_state_dict({name: left.pop(name) for name in part.taps.state_dict()})
    assert not left, f"no strategy owns {sorted(left)[:4]}"
    return Strategies(parts)


def reference_of(noisy: Tensor) -> Reference:
    """Return a reference of noised latents alone: the files hold the text with the image's words already in it."""
    seen = tuple(noisy.new_zeros(len(noisy), 2, 8) for _ in range(5))
    return Reference(noisy.new_ones(len(noisy), 3, 1, 1), seen, seen[0][:, 0], noisy[:, :1], noisy)


def config_of(upstream: Mapping[str, Any], weights: Mapping[str, Tensor]) -> UNetConfig:
    """Heads, groups and what attn1 reads are in the json only; what shows in the weights is read there.

    ValueError: the original is something that this U-Net is not.
    """
    if others := find_unsupported(upstream, FIXED):
        raise ValueError("; ".join(others))
    levels = range(len(upstream["block_out_channels"]))
    attends = tuple(any(k.startswith(f"down_blocks.{i}.attentions.") for k in weights) for i in levels)
    return UNetConfig(
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=weights["conv_out.weight"].shape[0],
        channels=tuple(upstream["block_out_channels"]),
        layers_per_block=len({k.split(".")[3] for k in weights if k.startswith("down_blocks.0.resnets.")}),
        heads=heads_of(upstream),
        norm_groups=upstream.get("norm_num_groups", 32),
        text_dim=weights["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        down_attention=attends,
        plan=plan_of(upstream),
        linear_projection=weights["mid_block.attentions.0.proj_in.weight"].ndim == 2,
        watermark=any(k.startswith("watermark_") for k in weights),
    )


def heads_of(upstream: Mapping[str, Any]) -> int:
    """Stable Diffusion calls the number of heads attention_head_dim; one per level (2.x) is not ours."""
    heads = upstream.get("attention_head_dim", 8)
    each = {heads} if isinstance(heads, int) else set(heads)
    if len(each) != 1:
        raise ValueError(f"attention_head_dim is {heads}; this U-Net has one number of heads for all levels")
    return each.pop()


def plan_of(upstream: Mapping[str, Any]) -> str:
    """Without `use_first_frame`, whose default is false upstream, attn1 is plain attention within each frame."""
    return "first+previous" if upstream.get("use_first_frame", False) else "self"


def dense_of(info: Info, weights: Mapping[str, Tensor]) -> DenseUNet:
    config = info["config"]
    return DenseUNet(weights, heads_of(config), config.get("norm_num_groups", 32), plan_of(config))
