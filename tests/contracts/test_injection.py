"""The computation of each strategy: banks, decoupled attention, adaLN, spatial concat, in context."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_booth.strategies.adaln import AdaLNConfig
from dit_booth.strategies.decoupled_attention import DecoupledAttentionConfig
from dit_booth.strategies.in_context import InContextConfig
from dit_booth.strategies.parts.resampler import AveragePool
from dit_booth.strategies.spatial_concat import SpatialConcatConfig
from dit_booth.strategies.token_bank import TokenBankConfig
from torch import Tensor

from dit_booth.attention import attend
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.objectives import make_objective
from dit_booth.inject import QKV, Injection, Latents, Reference, no_injection
from dit_booth.models.dit.model import DiTConfig
from dit_booth.testing import BACKBONES, Trial, trial, worst
from dit_booth.training.inputs import Inputs

torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])


class Watch(Injection):
    """Keeps the payloads that enter and leave every site."""

    def __init__(self, inner: Injection) -> None:
        super().__init__(inner.taps)
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}

    def __call__(self, site, payload):  # type: ignore[no-untyped-def]
        self.before[site.name] = payload
        self.after[site.name] = super().__call__(site, payload)
        return self.after[site.name]


@torch.no_grad()
def watched(run: Trial, reference: Reference | None = None, x: Tensor | None = None) -> Watch:
    """One step with all payloads kept."""
    names = run.model.strategy.names
    conditions = run.model.conditions(run.t, reference or run.reference(), names)
    watch = Watch(run.model.strategy.bind(names, conditions))
    run.model.backbone(run.x if x is None else x, run.t, run.model.text(run.prompt, watch), watch)
    return watch


def attentions(watch: Watch, leaf: str = "attn1") -> dict[str, QKV]:
    return {name: payload for name, payload in watch.after.items() if name.endswith(f".{leaf}")}


def row(reference: Reference, **fields: Tensor) -> Reference:
    return replace(reference, **fields)


# ---- token_bank --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("tokens", [4, 16, 64])
@pytest.mark.parametrize("source", ["clip", "latent"])
def test_a_perceiver_makes_a_segment_of_its_tokens_that_all_frames_read(
    source: Any, tokens: int, backbone: str
) -> None:
    options = TokenBankConfig(source=source, tokens=tokens, depth=1)
    run = trial("token_bank", backbone, options={"token_bank": options}).perturb()
    watch = watched(run)
    for qkv in attentions(watch).values():
        frames, bank = qkv.segments
        assert bank.k.shape[1:3] == bank.v.shape[1:3] == (1, tokens)
        assert bank.frames == ((0,),) * 3
        assert frames.frames == ((0,), (0,), (0, 1)), "the plan is as it was"


@pytest.mark.parametrize(("pool", "tokens"), [(2, 4), (4, 1), (8, 1)])
def test_a_pooled_bank_averages_the_grid(pool: Any, tokens: int) -> None:
    """The tiny DiT's frames are 2 x 2 tokens at patch 2; at patch 1 they are 4 x 4."""
    dit = DiTConfig(depth=2, hidden=32, heads=2, patch=1)
    options = {"token_bank": TokenBankConfig(source="latent", kind="pool", pool=pool)}
    run = trial("token_bank", dit=dit, options=options)
    part = run.model.strategy.part("token_bank")
    hidden = run.model.hidden(run.reference().latent, torch.zeros(2), part.needs().sites)["blocks.1.attn1"]
    assert hidden.shape[1] == 16
    qkv = attentions(watched(run))["blocks.1.attn1"]
    assert qkv.segments[1].k.shape[2] == tokens
    side = math.isqrt(tokens)
    grid = hidden.reshape(2, side, 4 // side, side, 4 // side, -1).mean(dim=(2, 4)).flatten(1, 2)
    expected = part.attached["blocks.1.attn1"].project(grid)
    assert worst(qkv.heads(expected.v[:, None]), qkv.segments[1].v) < 1e-6


def test_windows_at_the_edge_of_a_pooled_bank_are_smaller() -> None:
    x = torch.arange(9.0).reshape(1, 9, 1)  # 3 x 3
    assert AveragePool(2)(x).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


@BOTH
def test_banks_are_shared_by_width_or_one_for_each_site(backbone: str) -> None:
    counts = {}
    for per_site in (False, True):
        options = {"token_bank": TokenBankConfig(depth=1, per_site=per_site)}
        run = trial("token_bank", backbone, options=options)
        calls = [0]
        for module in run.model.strategy.modules():
            if type(module).__name__ == "Perceiver":
                module.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        watched(run)
        sites = len(run.model.strategy.part("token_bank").attached)
        assert calls[0] == (sites if per_site else 1)
        counts[per_site] = sum(type(m).__name__ == "Perceiver" for m in run.model.strategy.modules())
    assert counts == {False: 1, True: sites}


# ---- decoupled_attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["dit-factorised", "dit-cross_attention", "unet"])
def test_the_images_softmax_is_added_to_the_texts_or_the_frames(backbone: str) -> None:
    run = trial("decoupled_attention", backbone, options=scaled(0.7)).perturb()
    watch = watched(run)
    leaf = "attn1" if backbone == "dit-factorised" else "attn2"
    found = attentions(watch, leaf)
    assert set(found) == set(run.model.strategy.part("decoupled_attention").attached)
    conditions = run.model.conditions(run.t, run.reference(), ("decoupled_attention",))["decoupled_attention"]
    for name, qkv in found.items():
        k, v = (qkv.heads(y[:, None]).double() for y in conditions.at[name])
        scores = torch.einsum("bfnkd,bgmkd->bfknm", qkv.q.double(), k) / math.sqrt(k.shape[-1])
        expected = 0.7 * torch.einsum("bfknm,bgmkd->bfnkd", scores.softmax(-1), v)
        assert qkv.added is not None
        assert worst(qkv.added.double(), expected) < 1e-5
        assert qkv.segments == watch.before[name].segments, "the text's own softmax is as it was"
        attention = run.model.backbone.get_submodule(name)
        joined = attend(qkv.q, qkv.segments) + qkv.added
        assert worst(attention.read(qkv, no_injection), attention.to_out(joined.flatten(-2))) < 1e-6


def scaled(scale: float) -> dict[str, Any]:
    return {"decoupled_attention": DecoupledAttentionConfig(scale=scale)}


@BOTH
@torch.no_grad()
def test_the_scale_is_no_parameter_and_zero_is_no_image(backbone: str) -> None:
    one, none = (trial("decoupled_attention", backbone, options=scaled(s)).perturb() for s in (1.0, 0.0))
    ours, theirs = one.model.state_dict(), none.model.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.equal(none(none.reference()), none.plain())
    assert worst(one(one.reference()), one.plain()) > 1e-4


# ---- adaln -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["embedding", "latent", "both"])
@pytest.mark.parametrize("backbone", ["dit-factorised", "dit-interleaved", "unet"])
def test_one_vector_shifts_every_blocks_modulation(backbone: str, source: Any) -> None:
    run = trial("adaln", backbone, options={"adaln": AdaLNConfig(source=source, width=8)}).perturb()
    watch, part = watched(run), run.model.strategy.part("adaln")
    sites = {s for s in watch.before if s.endswith(".modulation")} or {"time_embedding"}
    assert set(part.attached) == sites
    with torch.no_grad():
        vector = part(run.reference(), {}).shared
    assert vector.shape == (2, 8)
    for name in sites:
        expected = watch.before[name].vector + part.attached[name].linear(vector)
        assert torch.equal(watch.after[name].vector, expected)
    # what is pooled, and only that, matters
    ours, other = run.reference(), run.reference(1)
    for field, matters in (("embedding", source != "latent"), ("latent", source != "embedding")):
        with torch.no_grad():
            moved = part(row(ours, **{field: getattr(other, field)}), {}).shared
        assert (worst(moved, vector) > 1e-4) == matters


# ---- spatial_concat ----------------------------------------------------------------------------------------


@BOTH
def test_the_clean_reference_lies_below_every_frame(backbone: str) -> None:
    run = trial("spatial_concat", backbone)
    reference, watch = run.reference(), watched(run)
    x = watch.after["latents.entry"].x
    assert torch.equal(x[..., :4, :], run.x)
    assert torch.equal(x[..., 4:, :], reference.latent.expand(-1, 3, -1, -1, -1))
    whole, left = watch.before["latents.exit"].x, watch.after["latents.exit"]
    assert whole.shape[-2:] == (8, 4) and torch.equal(left.x, whole[..., :4, :])
    assert torch.equal(left.aux_prediction.prediction, whole[..., 4:, :])
    assert torch.equal(left.aux_prediction.latent, reference.latent.expand(-1, 3, -1, -1, -1))


def test_the_text_attention_is_skipped_or_not() -> None:
    for skip in (True, False):
        options = {"spatial_concat": SpatialConcatConfig(skip_text=skip)}
        run = trial("spatial_concat", "unet", options=options)
        assert all((qkv.segments == ()) == skip for qkv in attentions(watched(run), "attn2").values())
        with torch.no_grad():
            other = replace(run, prompt=run.model.text.tokenize(["None", "None"]))
            assert (worst(run(run.reference()), other(run.reference())) == 0) == skip


@BOTH
def test_rows_without_an_image_have_a_zero_reference(backbone: str) -> None:
    """Whatever the autoencoder makes of the zero image: CatVTON's unconditional rows hold zeros (golden)."""
    run = trial("spatial_concat", backbone)
    ours = run.reference()
    image = ours.image.clone()
    image[1] = 0
    x = watched(run, row(ours, image=image)).after["latents.entry"].x
    assert torch.equal(x[0, :, :, 4:], ours.latent[0].expand(3, -1, -1, -1))
    assert not x[1, :, :, 4:].any()


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_the_loss_is_over_both_halves(kind: Any) -> None:
    """The lower half holds the latent without noise: eps = 0 is its truth."""
    run, objective = trial("spatial_concat"), make_objective(ObjectiveConfig(kind=kind))
    x0, eps, t = torch.randn_like(run.x), torch.randn_like(run.x), objective.sample_t(2, torch.Generator())
    inputs = Inputs(run.x, run.t, run.prompt, run.reference(), x0, eps, t)
    prediction = run.model(run.x, run.t, run.prompt, inputs.reference)
    below = run.reference().latent.expand(-1, 3, -1, -1, -1)
    whole = objective.loss(
        torch.cat([prediction.output, prediction.aux_prediction.prediction], -2),
        torch.cat([x0, below], -2),
        torch.cat([eps, torch.zeros_like(below)], -2),
        t,
    ).mean()
    assert abs(inputs.loss(objective, prediction) - whole) < 1e-6 * whole
    alone = objective.loss(prediction.output, x0, eps, t).mean()
    assert torch.equal(inputs.loss(objective, prediction._replace(aux_prediction=None)), alone)
    assert abs(alone - whole) > 1e-3 * whole


@pytest.mark.parametrize("name", ["spatial_concat", "in_context"])
@torch.no_grad()
def test_a_square_image_prompt_fits_a_wide_video(name: str) -> None:
    run = trial(name)
    wide = torch.randn(2, 3, run.x.shape[2], 4, 8)
    assert run.model(wide, run.t, run.prompt, run.reference()).output.shape == wide.shape


# ---- in_context --------------------------------------------------------------------------------------------

FRAMES_BEFORE = {**{name: {} for name in BACKBONES}, "text in context": {"conditioning": "in_context"}}


def before(case: str, one_way: bool) -> Trial:
    options, more = {"in_context": InContextConfig(one_way=one_way)}, FRAMES_BEFORE[case]
    if more:
        return trial("in_context", options=options, dit=DiTConfig(depth=3, hidden=32, heads=2, **more))
    return trial("in_context", case, options=options)


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize("case", FRAMES_BEFORE)
def test_the_reference_reads_only_itself_and_every_frame_reads_it(case: str, one_way: bool) -> None:
    run = before(case, one_way)
    generator = torch.Generator().manual_seed(2)
    x = run.x.clone()
    x[:, 2] += torch.randn(x[:, 2].shape, generator=generator)  # another last frame
    ours, other, moved = watched(run), watched(run, x=x), watched(run, run.reference(1))
    last = [name for name in ours.before if name.endswith((".attn1", ".attn_temp"))][-1]
    entering = ours.after["latents.entry"]
    assert entering.x.shape[1] == 4 and torch.equal(entering.x[:, :1], run.reference().latent)
    of_reference, of_frames = halves(ours.before[last]), halves(moved.before[last])
    difference = worst(halves(other.before[last])[0], of_reference[0])
    assert difference == 0 if one_way else difference > 1e-5
    assert all(worst(a, b) > 1e-6 for a, b in zip(of_frames, of_reference, strict=True)), "all frames read it"
    whole, left = ours.before["latents.exit"].x, ours.after["latents.exit"].x
    assert torch.equal(left, whole[:, 1:]) and left.shape == run.x.shape


def halves(qkv: QKV) -> list[Tensor]:
    """The hidden states of the reference and of every frame, wherever a site has its frames."""
    axis = 1 if qkv.x.shape[1] == 4 else 2
    return list(qkv.x.unbind(axis))


@pytest.mark.parametrize("case", ["dit-factorised", "dit-joint", "unet"])
def test_a_frame_before_the_video_leaves_the_videos_positions_as_they_are(case: str) -> None:
    """Frames that do not read the reference are what they are without it: its time is before theirs."""
    run = before(case, True)

    class Blind(Watch):
        """Every frame reads what its plan says of the video alone."""

        def __call__(self, site, payload):  # type: ignore[no-untyped-def]
            if isinstance(payload, QKV) and payload.q.shape[1] == 4 and site.role != "text":
                own = payload.segments[0]
                seen = tuple(tuple(g for g in groups if g) or (0,) for groups in own.frames)
                payload = replace(payload, segments=(replace(own, frames=seen), *payload.segments[1:]))
            return super().__call__(site, payload)

    with torch.no_grad():
        conditions = run.model.conditions(run.t, run.reference(), ("in_context",))
        blind = Blind(run.model.strategy.bind(run.model.active, conditions))
        output = run.model.backbone(run.x, run.t, run.model.text(run.prompt), blind)
        assert worst(output, run.plain()) < 1e-5 * run.plain().abs().max().item()
        assert worst(run(run.reference()), run.plain()) > 1e-4


def test_latents_without_a_reference_pass_unchanged() -> None:
    for name in ("in_context", "spatial_concat"):
        run = trial(name)
        conditions = run.model.conditions(run.t, run.reference(), [name])
        inject, empty = run.model.strategy.bind([name], conditions), run.model.strategy.bind([name])
        payload = Latents(run.x)
        entry = next(s for s in run.model.backbone.sites() if s.name == "latents.entry")
        assert empty(entry, payload) is payload
        assert inject(entry, payload).x.shape != run.x.shape
