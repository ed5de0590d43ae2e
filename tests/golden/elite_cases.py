"""ELITE: both mappings, the subject's mask, text attention with local keys and values, and the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from cases import CaseResult, Info, Tensors, cast, flat, labelled, outputs, tolerance, worst
from dit_booth.strategies.elite import EliteLocal, EliteLocalConfig, patch_mask, values_l1
from dit_booth.strategies.parts.mapper import LocalMapper, Mapper
from dit_booth.strategies.token_replacement import TextKV, TokenReplacementConfig
from einops import rearrange
from torch import Tensor

from dit_booth.diffusion.objectives import foreground_mse, per_sample_mse
from dit_booth.inject import Condition, Dims, Injection, Reference, Role, Sites, no_injection
from dit_booth.models.layers import Attention


@torch.no_grad()
def cases(info: Info, tensors: Tensors) -> Iterator[CaseResult]:
    """Every output, in float32 and float64; ``attn2_f`` by the default and, sample by sample, by the released rule."""
    for name in sorted(n for n in outputs(tensors) if n in OUTPUTS):
        stored = tensors[f"outputs.{name}"]
        for dtype in (torch.float32, torch.float64):
            made = OUTPUTS[name](Elite(info, cast(tensors, dtype)))
            yield CaseResult(labelled(name, dtype), worst(made, stored), allowed(dtype, stored))
            if name == "attn2_f_each_sample_alone":
                alone = Elite(info, cast(tensors, dtype)).each_alone()
                label = f"{name} compat=released{'' if dtype == torch.float32 else ' float64'}"
                yield CaseResult(label, worst(alone, stored), allowed(dtype, stored))


def allowed(dtype: torch.dtype, stored: Tensor) -> float:
    """As of all files; relative to a loss, whose regulariser is of order 1e-4."""
    return tolerance(dtype, stored) if stored.ndim else flat(dtype, stored) * stored.abs().item()


class Elite:
    """The file's modules and inputs. Image prompts are made of its masks: white where a mask is zero."""

    def __init__(self, info: Info, tensors: Tensors, rows: slice = slice(None)) -> None:
        self.info, self.tensors, self.config, self.rows = info, tensors, info["config"], rows
        count = sum(key.startswith("inputs.embs_") for key in tensors)
        self.states = tuple(self[f"embs_{j}"] for j in range(count))
        self.seg = self["pixel_values_seg"]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[f"inputs.{name}"][self.rows]

    def weights(self, prefix: str) -> dict[str, Tensor]:
        start = f"weights.{prefix}."
        return {k.removeprefix(start): x for k, x in self.tensors.items() if k.startswith(start)}

    def mapper(self, kind: type[Mapper], name: str) -> Tensor:
        weights = self.weights(name)
        (width, image_dim), text_dim = weights["mapping_0.0.weight"].shape, len(weights["mapping_0.6.weight"])
        built = kind(image_dim, width, text_dim, states=len(self.states)).to(self.seg.dtype)
        built.load_state_dict(weights)
        mapped: Tensor = built(self.states)
        return mapped

    @property
    def mask(self) -> Tensor:
        return patch_mask(self.seg[:, :1], self.states[0].shape[1] - 1)

    # ---- attention -------------------------------------------------------------------------------------------------

    def attention(self, name: str, role: Role) -> Attention:
        weights = self.weights(name)
        width, source = weights["to_k.weight"].shape
        attention = Attention(name, role, width, self.config["heads"], source).to(self.seg.dtype)
        own = {k: weights[k.replace("to_out.", "to_out.0.")] for k in attention.state_dict()}
        attention.load_state_dict(own)
        return attention

    def self_attention(self) -> Tensor:
        x = rearrange(self["hidden_states"], "b n c -> b 1 n c")
        return self.attention("attn1", "cross_frame")(x, x, ((0,),), no_injection)[:, 0]

    def text_attention(self, image: Tensor | None, text: str = "context_tensor", **options: object) -> Tensor:
        """With the keys and values of both stages; `image` (b 3 h w) is the image prompt, None: no local mapping."""
        attention = self.attention("attn2", "text")
        weights = self.weights("attn2")
        words = TextKV(attention.site).to(self.seg.dtype)
        words.load_state_dict({k: weights[k] for k in words.state_dict()})
        local = self.local(attention, **options)
        condition = Condition() if image is None else local(self.reference(image), {})
        taps = {"attn2": [(words, None), (local.attached["attn2"], condition.image_at("attn2"))]}
        source = rearrange(self[text], "b l c -> b 1 l c")
        places = torch.arange(source.shape[2]) == rearrange(self["local_index"], "b -> b 1")
        x = rearrange(self["hidden_states"], "b n c -> b 1 n c")
        return attention(x, source, ((0,),), Injection(taps, subject=places))[:, 0]

    def local(self, attention: Attention, **options: object) -> EliteLocal:
        """The strategy on that attention alone, with the file's weights."""
        mapper, weights = self.weights("mapper_local"), self.weights("attn2")
        width, image_dim = mapper["mapping_0.0.weight"].shape
        sites = Sites((attention.site,), *Dims(image_dim, image_dim, 4, 1))
        made = EliteLocal(EliteLocalConfig(width=width, **options), sites).to(self.seg.dtype)  # type: ignore[arg-type]
        own = {f"taps.attn2.{k}": w for k, w in weights.items() if "_local." in k}
        made.load_state_dict({**{f"mapper.{k}": w for k, w in mapper.items()}, **own})
        return made

    def reference(self, image: Tensor) -> Reference:
        return Reference(image, self.states, self.states[0][:, 0], image[:, None])

    @property
    def prompt(self) -> Tensor:
        """An image prompt of which the subject is what the mask's first channel says."""
        subject = torch.full_like(self.seg, 0.25)
        return torch.where(self.seg[:, :1] > 0, subject, torch.ones_like(subject))

    def each_alone(self) -> Tensor:
        """Each sample by itself, by the released rule: then the sample is the batch."""
        rows = [slice(i, i + 1) for i in range(len(self.seg))]
        alone = [Elite(self.info, self.tensors, row) for row in rows]
        scale = self.config["LAMBDA"]
        return torch.cat([e.text_attention(e.prompt, scale=scale, compat="released") for e in alone])

    # ---- losses ----------------------------------------------------------------------------------------------------

    def value_local(self) -> Tensor:
        """The patches' values, as the strategy gives them to its tap: (b heads) n d."""
        condition = self.local(self.attention("attn2", "text"))(self.reference(self.prompt), {})
        v = condition.at["attn2"].v  # type: ignore[attr-defined]
        return rearrange(v, "b n (k d) -> (b k) n d", k=self.config["heads"])

    def local_mle(self) -> Tensor:
        return foreground_mse(self["noise_pred"], self["noise"], self["mask_values"]).mean()

    def local_reg(self) -> Tensor:
        values = [self.value_local(), self.tensors["inputs.value_local_second_layer"]]
        return EliteLocalConfig().l1_weight * values_l1(values)

    def global_mle(self) -> Tensor:
        return per_sample_mse(self["noise_pred"], self["noise"]).mean()

    def global_reg(self) -> Tensor:
        words = self.mapper(Mapper, "mapper_global")
        return TokenReplacementConfig().l1_weight * words.abs().mean()


def at_lambda(compat: str) -> Callable[[Elite], Tensor]:
    return lambda e: e.text_attention(e.prompt, scale=e.config["LAMBDA"], compat=compat)


def of_image(value: float) -> Callable[[Elite], Tensor]:
    """With an image prompt of one value: 1 is white, so all of it is masked."""
    return lambda e: e.text_attention(
        torch.full_like(e.seg, value), scale=e.config["LAMBDA"], compat="released"
    )


OUTPUTS: dict[str, Callable[[Elite], Tensor]] = {
    "global_mapper_five_tokens": lambda e: e.mapper(Mapper, "mapper_global"),
    "local_mapper_unmasked": lambda e: e.mapper(LocalMapper, "mapper_local"),
    "mask": lambda e: e.mask,
    "local_masked": lambda e: e.mapper(LocalMapper, "mapper_local") * e.mask,
    "attn2_a_global_only": lambda e: e.text_attention(None),
    "attn2_a_uncond": lambda e: e.text_attention(None, text="context_uncond"),
    "attn2_b_local_no_lambda": lambda e: e.text_attention(e.prompt, compat="released"),
    "attn2_c_local_lambda": at_lambda("released"),
    "attn2_d_local_all_masked": of_image(1.0),
    "attn2_e_local_unmasked": of_image(0.25),
    "attn2_f_each_sample_alone": at_lambda(""),
    "attn1_self": Elite.self_attention,
    "value_local": Elite.value_local,
    "local_loss_mle": Elite.local_mle,
    "local_loss_reg": Elite.local_reg,
    "local_loss": lambda e: e.local_mle() + e.local_reg(),
    "global_loss_mle": Elite.global_mle,
    "global_loss_reg": Elite.global_reg,
    "global_loss": lambda e: e.global_mle() + e.global_reg(),
}
