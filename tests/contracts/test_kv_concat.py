"""What kv_concat computes, with every option, on both backbones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcatConfig
from dit_booth.strategies.query_projection import QueryProjectionConfig
from torch import Tensor

from dit_booth.attention import attend
from dit_booth.inject import QKV, Injection, Noise
from dit_booth.models.dit.model import DiTConfig
from dit_booth.testing import Trial, trial, worst

BACKBONES = pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])

OPTIONS = [
    KVConcatConfig(),
    KVConcatConfig(reference_at="all"),
    KVConcatConfig(reference_at="keyframes", keyframe_every=2),
    KVConcatConfig(train_frame_kv=False),
    KVConcatConfig(update="direct"),
    KVConcatConfig(update="direct", reference_at="keyframes", keyframe_every=2),
    KVConcatConfig(update="direct", reference_at="all", train_frame_kv=False),
]


def bound(run: Trial) -> Injection:
    """Return the run's taps with the conditions that they get in its step."""
    names = run.model.strategy.names
    return run.model.strategy.bind(names, run.model.conditions(run.t, run.reference(), names))


class Watch(Injection):
    """Keeps the payload that enters a site and the one that leaves it."""

    def __init__(self, inner: Injection, site: str) -> None:
        super().__init__(inner.taps)
        self.site = site
        self.before: QKV
        self.after: QKV

    def __call__(self, site, payload):  # type: ignore[no-untyped-def]
        out = super().__call__(site, payload)
        if site.name == self.site:
            self.before, self.after = payload, out
        return out


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(b n k d) over (b m k d), in float64."""
    scores = torch.einsum("bnkd,bmkd->bknm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return torch.einsum("bknm,bmkd->bnkd", scores.softmax(-1), v.double())


def first_previous(qkv: QKV, k: Tensor, v: Tensor, image: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
    """Every frame over [frame 0; previous frame (; the image)] in one tensor; frame 1 and 0 read frame 0 once."""
    out = []
    for i in range(qkv.q.shape[1]):
        groups = sorted({0, max(i - 1, 0)})
        keys, values = [k[:, g] for g in groups], [v[:, g] for g in groups]
        if i in image:
            keys, values = [image[i][0], *keys], [image[i][1], *values]
        out.append(softmax(qkv.q[:, i], torch.cat(keys, 1), torch.cat(values, 1)))
    return torch.stack(out, 1)


@BACKBONES
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_kv_concat_equals_a_dense_computation(options: KVConcatConfig, backbone: str) -> None:
    run = trial("kv_concat", backbone, options={"kv_concat": options}).perturb()
    part = run.model.strategy.part("kv_concat")
    site = "blocks.1.attn1" if backbone != "unet" else "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert site in part.attached
    hidden = run.model.record(run.t, run.reference(), ["kv_concat"])["matched"]
    watch = Watch(bound(run), site)
    run.model.backbone(run.x, run.t, run.model.text(run.prompt), watch)
    ours = attend(watch.after.q, watch.after.segments)
    assert torch.equal(watch.after.q, watch.before.q), "queries are the backbone's"
    qkv, tap = watch.before, part.attached[site]
    k, v = qkv.segments[0].k, qkv.segments[0].v
    if options.train_frame_kv:
        k, v = qkv.heads(tap.to_k_new(qkv.x)), qkv.heads(tap.to_v_new(qkv.x))
    reference = hidden[site].unsqueeze(1)
    image = tuple(qkv.heads(p(reference))[:, 0] for p in (tap.to_k_exemplar, tap.to_v_exemplar))
    reached = {"first": {0}, "keyframes": {0, 2}, "all": {0, 1, 2}}[options.reference_at]
    if options.update == "direct":
        expected = first_previous(qkv, k, v, dict.fromkeys(reached, image))
    else:  # V_i' = Attn(Q_i, [K_I; K_i], [V_I; V_i]); then [first, previous] with the new values, keys unchanged
        v = v.double()
        for i in reached:
            v[:, i] = softmax(
                qkv.q[:, i], torch.cat([image[0], k[:, i]], 1), torch.cat([image[1], v[:, i].to(k)], 1)
            )
        expected = first_previous(qkv, k, v, {})
    assert worst(ours.double(), expected) < 1e-5
    assert worst(expected, first_previous(qkv, k, qkv.segments[0].v, {})) > 1e-3, "the image does something"


@BACKBONES
@torch.no_grad()
def test_the_reference_runs_as_one_frame_with_null_text_and_no_image(backbone: str) -> None:
    run = trial("token_replacement+kv_concat", backbone).perturb()
    part, reference = run.model.strategy.part("kv_concat"), run.reference()
    calls: list[tuple[Tensor, Tensor]] = []
    handle = run.model.backbone.register_forward_pre_hook(lambda module, args: calls.append(args[:3]))
    run(reference)
    handle.remove()
    (latent, t, text), (x, *_) = calls
    assert latent is reference.noisy and latent.shape[1] == 1 and x is run.x
    assert torch.equal(t, run.t)
    null = run.model.text.tokenize(["None", "None"])
    assert torch.equal(text.tokens, run.model.text(null).tokens)
    hidden = run.model.record(run.t, reference, run.model.active)
    assert set(hidden) == {"matched"} and set(hidden["matched"]) == set(part.attached)
    assert all(h.shape[0] == 2 and h.ndim == 3 for h in hidden["matched"].values())


@BACKBONES
@pytest.mark.parametrize("noise", ["clean", "matched"])
@torch.no_grad()
def test_a_clean_reference_does_not_depend_on_the_timestep(noise: Noise, backbone: str) -> None:
    run = trial("kv_concat", backbone, options={"kv_concat": KVConcatConfig(reference_noise=noise)})
    part, names, made = run.model.strategy.part("kv_concat"), ("kv_concat",), []
    assert part.needs().noise == noise and set(part.needs().sites) == set(part.attached)
    for t in (run.t, run.t + 100):
        made.append(run.model.conditions(t, run.reference(), names)["kv_concat"].at)
    last = list(part.attached)[-1]
    assert set(run.model.constant_conditions(run.reference())) == (set(names) if noise == "clean" else set())
    if noise == "clean":
        assert all(torch.equal(made[0][site].v, made[1][site].v) for site in part.attached)
        hidden = run.model.hidden(run.reference().latent, torch.zeros(2), [last])
        direct = part.attached[last].project(hidden[last])
        assert torch.equal(made[0][last].k, direct.k), "the clean latent at timestep 0"
    else:
        assert worst(made[0][last].k, made[1][last].k) > 1e-4


@BACKBONES
@torch.no_grad()
def test_frames_that_nothing_joins_to_the_image_do_not_change(backbone: str) -> None:
    """With `direct` and one chosen site, exactly the named frames of that attention read the image."""
    glob = "blocks.1.attn1" if backbone != "unet" else "up_blocks.*"
    options = KVConcatConfig(update="direct", where=glob)
    part = trial("kv_concat", backbone, options={"kv_concat": options}).model.strategy.part("kv_concat")
    assert part.attached and all(name.startswith(glob.rstrip("*")) for name in part.attached)
    run = trial("kv_concat", backbone, options={"kv_concat": options})
    site = next(iter(part.attached))
    watch = Watch(bound(run), site)
    run.model.backbone(run.x, run.t, run.model.text(run.prompt), watch)
    assert [s.frames for s in watch.after.segments] == [((0,), (0,), (0, 1)), ((0,), (), ())]


@pytest.mark.parametrize("plan", ["self", "all", "window(2)", "sink(1)+window(2)"])
@torch.no_grad()
def test_kv_concat_works_with_other_plans(plan: str) -> None:
    run = trial("kv_concat", dit=DiTConfig(plan=plan))
    assert torch.equal(run(None), run.plain())
    assert worst(run(run.reference()), run.plain()) > 1e-5


def test_checkpointing_gives_equal_gradients_with_a_recorded_reference() -> None:
    gradients = []
    for checkpointing in (False, True):
        run = trial("token_replacement+kv_concat", dit=DiTConfig(checkpointing=checkpointing)).perturb()
        prediction = run.model(run.x, run.t, run.prompt, run.reference())
        loss = prediction.output.square().mean() + prediction.aux_loss
        gradients.append(torch.autograd.grad(loss, list(run.model.strategy.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        assert worst(plain, recomputed) <= 1e-5 * plain.abs().max().item()


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"kv_concat\.keyframe_every is 0; use a whole number in \[1, "):
        KVConcatConfig(keyframe_every=0)
    with pytest.raises(
        ValueError, match=r"site glob 'blocks\.9\.attn1' matches none of the 2 sites.*nearest"
    ):
        trial("kv_concat", options={"kv_concat": KVConcatConfig(where="blocks.9.attn1")})


# ---- learned queries ---------------------------------------------------------------------------------------


def queried(mode: str, options: KVConcatConfig) -> tuple[Trial, Watch, str]:
    """The attention of one site under kv_concat and learned queries."""
    names, site = "kv_concat+query_projection", "blocks.1.attn1"
    chosen = {"kv_concat": options, "query_projection": QueryProjectionConfig(mode=mode, rank=3)}
    run = trial(names, options=chosen).perturb()
    watch = Watch(bound(run), site)
    run.model.backbone(run.x, run.t, run.model.text(run.prompt), watch)
    return run, watch, site


@pytest.mark.parametrize("mode", ["shared", "separate", "lora"])
@torch.no_grad()
def test_learned_queries_equal_a_dense_computation(mode: str) -> None:
    run, watch, site = queried(mode, KVConcatConfig(update="direct", reference_at="all"))
    qkv, after = watch.before, watch.after
    tap = run.model.strategy.part("query_projection").attached[site]
    new = qkv.q + qkv.heads(tap.up(tap.down(qkv.x))) if mode == "lora" else qkv.heads(tap.to_q_new(qkv.x))
    assert worst(new, qkv.q) > 1e-2
    of_frames = qkv.q if mode == "separate" else new
    frames, image = after.segments
    for i in range(qkv.q.shape[1]):
        groups = sorted({0, max(i - 1, 0)})
        keys, values = (torch.cat([y[:, g] for g in groups], 1) for y in (frames.k, frames.v))
        scores = [
            torch.einsum("bnkd,bmkd->bknm", q[:, i].double(), k.double()) / math.sqrt(q.shape[-1])
            for q, k in ((of_frames, keys), (new, image.k[:, 0]))
        ]
        p = torch.cat(scores, dim=-1).softmax(-1)  # one softmax over the frames' keys and the image's
        expected = torch.einsum("bknm,bmkd->bnkd", p, torch.cat([values, image.v[:, 0]], 1).double())
        assert worst(attend(after.q, after.segments)[:, i].double(), expected) < 1e-5


@pytest.mark.parametrize(("mode", "moved"), [("shared", True), ("separate", True), ("frozen", False)])
@torch.no_grad()
def test_the_value_update_asks_with_learned_queries(mode: str, moved: bool) -> None:
    """Equation 5 with Q_0 learned: in the sum's other order, too, queries act first."""
    _, watch, _ = queried(mode, KVConcatConfig(train_frame_kv=False))
    first, later = (
        worst(watch.after.segments[0].v[:, i], watch.before.segments[0].v[:, i])
        for i in (slice(0, 1), slice(1, 9))
    )
    assert first > 1e-2 and later == 0
    frozen = queried("frozen", KVConcatConfig(train_frame_kv=False))[1].after.segments[0].v
    assert (worst(watch.after.segments[0].v, frozen) > 1e-3) == moved


# ---- cost --------------------------------------------------------------------------------------------------


@BACKBONES
@pytest.mark.parametrize("train_frame_kv", [True, False])
@torch.no_grad()
def test_the_backbones_own_keys_are_projected_only_where_they_are_read(
    train_frame_kv: bool, backbone: str
) -> None:
    options = KVConcatConfig(train_frame_kv=train_frame_kv)
    run = trial("kv_concat", backbone, options={"kv_concat": options})
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    sites = run.model.strategy.part("kv_concat").attached
    for site in sites:
        for name in ("to_k", "to_v"):
            run.model.backbone.get_submodule(f"{site}.{name}").register_forward_hook(count)
    run(run.reference())
    assert calls == (0 if train_frame_kv else 2 * 2 * len(sites)), (
        "the reference's pass and the video's, k and v"
    )
