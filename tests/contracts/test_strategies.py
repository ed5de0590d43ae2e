"""What every registered strategy promises on both backbones, and what kv_concat computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_booth.attention import attend
from dit_booth.config import STAGES
from dit_booth.inject import QKV, Condition, Injection
from dit_booth.models.dit import DiTConfig
from dit_booth.models.weights import load_strictly, read, write
from dit_booth.strategy import registered
from dit_booth.training.stage import set_trainable, trainable_globs
from strategies.kv_concat import KVConcatConfig

BACKBONES = pytest.mark.parametrize("backbone", ["dit", "unet"])
EVERY = pytest.mark.parametrize("name", sorted(registered()))
Make = Callable[..., Any]


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def stages_of(name: str) -> list[str]:
    cls = registered()[name]
    return [stage for stage in STAGES if stage in {**cls.trains, **cls.trains_backbone}]


def loosen(run: Any) -> None:
    """Move every parameter of the strategies a little: a zero-initialised layer would stop gradients."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in run.root.strategy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


# ---- contracts ---------------------------------------------------------------------------------------------


@BACKBONES
@EVERY
def test_backbone_and_text_parameters_keep_their_names(name: str, backbone: str, make: Make) -> None:
    run, control = make(name, backbone).root, make("none", backbone).root
    for part in ("backbone", "text"):
        ours, theirs = (r.get_submodule(part).state_dict() for r in (run, control))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    own = {id(p) for p in run.strategy.parameters()}
    assert not own & {id(p) for p in (*run.backbone.parameters(), *run.text.parameters())}, "no shared owner"
    assert all(k.startswith(f"strategy.{name}.") for k in run.state_dict() if k.startswith("strategy."))


@BACKBONES
@EVERY
@torch.no_grad()
def test_identity_at_initialisation_is_as_declared(name: str, backbone: str, make: Make) -> None:
    run = make(name, backbone)
    plain = run.plain()
    assert plain.abs().max() > 1e-3
    with_image = run(run.reference())
    if registered()[name].identity_at_init:
        assert torch.equal(with_image, plain)
    else:
        assert worst(with_image, plain) > 1e-5


@BACKBONES
@EVERY
@torch.no_grad()
def test_without_an_image_a_new_strategy_changes_nothing(name: str, backbone: str, make: Make) -> None:
    run = make(name, backbone)
    assert torch.equal(run(None), run.plain())
    assert run.root(run.x, run.t, run.prompt, None).penalty == 0


@BACKBONES
@EVERY
def test_gradients_reach_what_a_stage_trains_and_nothing_else(name: str, backbone: str, make: Make) -> None:
    run = make(name, backbone)
    if not stages_of(name):
        assert not list(run.root.strategy.parameters()), f"{name} has parameters that no stage trains"
    trained = set()
    loosen(run)
    for stage in stages_of(name):
        chosen = set_trainable(run.root, trainable_globs(run.parts.config, run.root, stage, (name,)))
        run.root.zero_grad(set_to_none=True)
        prediction = run.root(run.x, run.t, run.prompt, run.reference())
        (prediction.output.square().sum() + prediction.penalty).backward()
        for key, p in run.root.named_parameters():
            if key in chosen:
                assert p.grad is not None and p.grad.abs().max() > 1e-9, f"{stage}: no gradient at {key}"
            else:
                assert p.grad is None, f"{stage}: {key} is frozen"
        trained |= {key for key in chosen if key.startswith("strategy.")}
    own = {f"strategy.{key}" for key, _ in run.root.strategy.named_parameters()}
    assert trained == own, "some stage trains every parameter"


@BACKBONES
@EVERY
@torch.no_grad()
def test_saved_and_loaded_it_computes_the_same(name: str, backbone: str, make: Make, tmp_path: Path) -> None:
    run, other = make(name, backbone), make(name, backbone, seed=1)
    loosen(run)
    expected = run(run.reference())
    file = tmp_path / "strategy.safetensors"
    write(file, run.root.strategy.state_dict())
    if run.root.strategy.state_dict():
        assert worst(other(other.reference()), expected) > 1e-6, "loading must be what makes them equal"
    load_strictly(other.root.strategy, read(file), "saved")
    assert torch.equal(other(other.reference()), expected)


@BACKBONES
@EVERY
@torch.no_grad()
def test_rows_of_a_batch_are_independent(name: str, backbone: str, make: Make) -> None:
    run = make(name, backbone)
    loosen(run)
    both, together = run.reference(), run(run.reference())
    for i in range(2):
        row = slice(i, i + 1)
        mine = replace(
            both,
            image=both.image[row],
            states=tuple(s[row] for s in both.states),
            embedding=both.embedding[row],
            latent=both.latent[row],
            noisy=both.noisy[row],
        )
        prompt = replace(run.prompt, ids=run.prompt.ids[row], spans=run.prompt.spans[row])
        alone = run.root(run.x[row], run.t[row], prompt, mine).output
        assert worst(alone, together[row]) < 1e-5 * max(1, together.abs().max().item())


@BACKBONES
@EVERY
def test_the_image_matters_after_one_step(name: str, backbone: str, make: Make) -> None:
    run = make(name, backbone)
    if stages := stages_of(name):
        globs = trainable_globs(run.parts.config, run.root, stages[0], (name,))
        optimizer = torch.optim.AdamW(set_trainable(run.root, globs).values(), lr=1e-2)
        target = torch.randn(run.x.shape, generator=torch.Generator().manual_seed(4))
        (run(run.reference(1)) - target).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        difference = worst(run(run.reference(1)), run(run.reference(2)))
    assert difference > 1e-4 if stages else difference == 0


@BACKBONES
@torch.no_grad()
def test_an_inactive_strategy_is_as_if_it_were_not_there(backbone: str, make: Make) -> None:
    both, one = make("token_replacement+kv_concat", backbone), make("kv_concat", backbone)
    loosen(both)
    load_strictly(
        one.root.strategy,
        {k: v for k, v in both.root.strategy.state_dict().items() if k.startswith("kv_concat.")},
        "x",
    )
    together = both(both.reference())
    both.root.active = ("kv_concat",)
    prediction = both.root(both.x, both.t, both.prompt, both.reference())
    assert torch.equal(prediction.output, one(one.reference()))
    assert prediction.penalty == 0, "token replacement's penalty"
    assert worst(together, prediction.output) > 1e-5


# ---- kv_concat ---------------------------------------------------------------------------------------------

OPTIONS = [
    KVConcatConfig(),
    KVConcatConfig(reference_at="all"),
    KVConcatConfig(reference_at="keyframes", keyframe_every=2),
    KVConcatConfig(train_frame_kv=False),
    KVConcatConfig(update="direct"),
    KVConcatConfig(update="direct", reference_at="keyframes", keyframe_every=2),
    KVConcatConfig(update="direct", reference_at="all", train_frame_kv=False),
]


def recorded(run: Any, t: Tensor) -> Any:
    """The reference as a strategy gets it inside a forward pass at timestep t."""
    return replace(run.reference(), record=lambda *args: run.root.record(t, *args))


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
def test_kv_concat_equals_a_dense_computation(options: KVConcatConfig, backbone: str, make: Make) -> None:
    run = make("kv_concat", backbone, options={"kv_concat": options})
    loosen(run)
    part = run.root.strategy.part("kv_concat")
    site = "blocks.2.attn1" if backbone == "dit" else "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert site in part.attached
    hidden = run.root.record(run.t, run.reference().noisy, False, list(part.attached))
    watch = Watch(run.root.strategy.bind({"kv_concat": Condition(hidden=hidden)}), site)
    run.root.backbone(run.x, run.t, run.root.text(run.prompt), watch)
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
def test_the_reference_runs_as_one_frame_with_null_text_and_no_image(backbone: str, make: Make) -> None:
    run = make("token_replacement+kv_concat", backbone)
    loosen(run)
    part, reference = run.root.strategy.part("kv_concat"), run.reference()
    calls: list[tuple[Tensor, Tensor]] = []
    handle = run.root.backbone.register_forward_pre_hook(lambda module, args: calls.append(args[:3]))
    run(reference)
    handle.remove()
    (latent, t, text), (x, *_) = calls
    assert latent is reference.noisy and latent.shape[1] == 1 and x is run.x
    assert torch.equal(t, run.t)
    null = run.root.text.tokenize(["None", "None"])
    assert torch.equal(text.tokens, run.root.text(null).tokens)
    hidden = run.root.record(run.t, reference.noisy, False, list(part.attached))
    assert set(hidden) == set(part.attached)
    assert all(h.shape[0] == 2 and h.ndim == 3 for h in hidden.values())


@BACKBONES
@pytest.mark.parametrize("noise", ["clean", "matched"])
@torch.no_grad()
def test_a_clean_reference_does_not_depend_on_the_time(noise: str, backbone: str, make: Make) -> None:
    run = make("kv_concat", backbone, options={"kv_concat": KVConcatConfig(reference_noise=noise)})
    part, made = run.root.strategy.part("kv_concat"), []
    for t in (run.t, run.t + 100):
        made.append(part(recorded(run, t)).hidden)
    last = list(part.attached)[-1]
    if noise == "clean":
        assert all(torch.equal(made[0][site], made[1][site]) for site in part.attached)
        direct = run.root.record(torch.zeros(2), run.reference().latent, False, [last])
        assert torch.equal(made[0][last], direct[last]), "the clean latent at timestep 0"
    else:
        assert worst(made[0][last], made[1][last]) > 1e-4


@BACKBONES
@torch.no_grad()
def test_frames_that_nothing_joins_to_the_image_do_not_change(backbone: str, make: Make) -> None:
    """With `direct` and one chosen site, exactly the named frames of that attention read the image."""
    glob = "blocks.4.attn1" if backbone == "dit" else "up_blocks.*"
    options = KVConcatConfig(update="direct", where=glob)
    part = make("kv_concat", backbone, options={"kv_concat": options}).root.strategy.part("kv_concat")
    assert part.attached and all(name.startswith(glob.rstrip("*")) for name in part.attached)
    run = make("kv_concat", backbone, options={"kv_concat": options})
    site = next(iter(part.attached))
    watch = Watch(
        run.root.strategy.bind({"kv_concat": run.root.strategy.part("kv_concat")(recorded(run, run.t))}), site
    )
    run.root.backbone(run.x, run.t, run.root.text(run.prompt), watch)
    assert [s.frames for s in watch.after.segments] == [((0,), (0,), (0, 1)), ((0,), (), ())]


@pytest.mark.parametrize("plan", ["self", "all", "window(2)", "sink(1)+window(2)"])
@torch.no_grad()
def test_kv_concat_works_with_other_plans(plan: str, make: Make) -> None:
    run = make("kv_concat", "dit", dit=DiTConfig(plan=plan))
    assert torch.equal(run(None), run.plain())
    assert worst(run(run.reference()), run.plain()) > 1e-5


def test_checkpointing_gives_equal_gradients_with_a_recorded_reference(make: Make) -> None:
    gradients = []
    for checkpointing in (False, True):
        run = make("token_replacement+kv_concat", "dit", dit=DiTConfig(checkpointing=checkpointing))
        loosen(run)
        prediction = run.root(run.x, run.t, run.prompt, run.reference())
        loss = prediction.output.square().mean() + prediction.penalty
        gradients.append(torch.autograd.grad(loss, list(run.root.strategy.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        assert worst(plain, recomputed) <= 1e-5 * plain.abs().max().item()


def test_options_are_checked(make: Make) -> None:
    with pytest.raises(ValueError, match=r"kv_concat\.keyframe_every is 0; use 1 or more"):
        KVConcatConfig(keyframe_every=0)
    with pytest.raises(
        ValueError, match=r"site glob 'blocks\.9\.attn1' matches none of the 5 sites.*nearest"
    ):
        make("kv_concat", "dit", options={"kv_concat": KVConcatConfig(where="blocks.9.attn1")})
