"""ELITE's local mapping on the backbones: what is added where, by which map, of which patches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_booth.strategies.elite import EliteLocalConfig, patch_mask, subject_mask
from dit_booth.strategies.token_replacement import TokenReplacementConfig
from torch import Tensor

from dit_booth.diffusion.objectives import foreground_mse
from dit_booth.inject import KV, QKV, Condition, Injection, PromptTokens, Reference
from dit_booth.models.clip.encoders import Prompt
from dit_booth.testing import Trial, promises, trial, worst

torch.set_num_threads(1)
TEXT = pytest.mark.parametrize("backbone", ["dit-cross_attention", "unet"])


class Watch(Injection):
    """Keeps the payloads that leave every site."""

    def __init__(self, inner: Injection) -> None:
        super().__init__(inner.taps)
        self.after: dict[str, Any] = {}

    def __call__(self, site, payload):  # type: ignore[no-untyped-def]
        self.after[site.name] = super().__call__(site, payload)
        return self.after[site.name]


def elite(backbone: str, names: str = "elite", words: int = 5, **options: Any) -> Trial:
    given = {
        "elite_local": EliteLocalConfig(**options),
        "token_replacement": TokenReplacementConfig(words=words),
    }
    chosen = given if names == "elite" else {names: given[names]}
    return trial(names, backbone, options=chosen).perturb()


def conditions(run: Trial, reference: Reference | None = None) -> dict[str, Condition]:
    return run.model.conditions(run.t, reference or run.reference(), run.model.strategy.names)


@torch.no_grad()
def watched(run: Trial) -> tuple[dict[str, QKV], PromptTokens]:
    """The text attentions of one step, and the prompt."""
    watch = Watch(run.model.strategy.bind(run.model.strategy.names, conditions(run)))
    run.model.backbone(run.x, run.t, run.model.text(run.prompt, watch), watch)
    found = {name: p for name, p in watch.after.items() if name.endswith(".attn2")}
    return found, watch.after["text.prompt"]


def softmax(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bfnkd,bgmkd->bfnkm", q.double(), k.double()) / math.sqrt(q.shape[-1])
    return scores.softmax(-1)


# ---- what is added -----------------------------------------------------------------------------------------


@TEXT
def test_patches_are_read_where_a_query_attends_to_the_subject(backbone: str) -> None:
    """A V + lambda (m / max m) A_local V_local, with the text keys that token replacement brings."""
    run = elite(backbone, scale=0.7)
    found, prompt = watched(run)
    assert found and set(found) == set(run.model.strategy.part("elite_local").attached)
    kvs = conditions(run)["elite_local"].at
    for name, qkv in found.items():
        kv = kvs[name]
        assert isinstance(kv, KV) and qkv.added is not None
        text = softmax(qkv.q, qkv.segments[0].k)
        subject = (prompt.spans > 0).double()
        attention = torch.einsum("bfnkm,bm->bfnk", text, subject)
        top = attention.amax((1, 2, 3), keepdim=True)
        keys, values = (qkv.heads(y[:, None]) for y in kv)
        read = torch.einsum("bfnkm,bgmkd->bfnkd", softmax(qkv.q, keys), values.double())
        expected = 0.7 * (attention / top)[..., None] * read
        assert worst(qkv.added.double(), expected) < 1e-5 and expected.abs().max() > 1e-3


@TEXT
@pytest.mark.parametrize("words", [1, 5])
def test_the_map_is_of_the_words_that_took_the_subjects_place(backbone: str, words: int) -> None:
    """Caption 1 names its subject once, caption 2 twice."""
    found, prompt = watched(elite(backbone, words=words))
    for qkv in found.values():
        assert qkv.subject is not None and torch.equal(qkv.subject, prompt.ids == -1)
        assert qkv.subject.sum(1).tolist() == [words, 2 * words]


@TEXT
def test_alone_it_reads_the_subjects_own_tokens(backbone: str) -> None:
    run = elite(backbone, "elite_local")
    found, _ = watched(run)
    assert all(torch.equal(qkv.subject, run.prompt.spans > 0) for qkv in found.values())


def test_without_text_attention_every_frame_reads_the_patches() -> None:
    run = elite("dit-factorised", "elite_local", scale=0.5)
    attached = run.model.strategy.part("elite_local").attached
    assert list(attached) == ["blocks.0.attn1", "blocks.1.attn1"]
    watch = Watch(run.model.strategy.bind(("elite_local",), conditions(run)))
    with torch.no_grad():
        run.model.backbone(run.x, run.t, run.model.text(run.prompt, watch), watch)
    for name, kv in conditions(run)["elite_local"].at.items():
        qkv = watch.after[name]
        assert isinstance(kv, KV) and qkv.subject is None
        k, v = (qkv.heads(y[:, None]) for y in kv)
        expected = 0.5 * torch.einsum("bfnkm,bgmkd->bfnkd", softmax(qkv.q, k), v.double())
        assert worst(qkv.added.double(), expected) < 1e-5


@TEXT
@torch.no_grad()
def test_the_scale_is_no_parameter_and_zero_is_no_patch(backbone: str) -> None:
    one, none = (elite(backbone, "elite_local", scale=s) for s in (1.0, 0.0))
    assert all(torch.equal(x, none.model.state_dict()[k]) for k, x in one.model.state_dict().items())
    assert torch.equal(none(none.reference()), none.plain())
    assert worst(one(one.reference()), one.plain()) > 1e-4


def test_the_released_map_depends_on_the_batch() -> None:
    promises.rows_are_independent(lambda: elite("unet"))
    with pytest.raises(AssertionError, match="changes by"):
        promises.rows_are_independent(lambda: elite("unet", compat="released"))


@torch.no_grad()
def test_a_prompt_without_subject_reads_no_patch() -> None:
    run = elite("unet", "elite_local")
    run.prompt = Prompt.without_subject(run.prompt.ids)
    out = run(run.reference())
    assert out.isfinite().all() and worst(out, run.plain()) < 1e-6


# ---- which patches -----------------------------------------------------------------------------------------


def on_white(reference: Reference) -> Reference:
    """Row 0's subject is in the upper left quarter; row 1 has no image."""
    image = torch.ones_like(reference.image)
    half = image.shape[-1] // 2
    image[0, :, :half, :half] = 0.2
    image[0, 0, 0, 0] = 1.0  # one white channel is a colour
    image[1] = 0.0
    return replace(reference, image=image)


def test_the_subject_is_what_is_not_white() -> None:
    reference = on_white(elite("unet").reference())
    mask = subject_mask(reference)
    half = mask.shape[-1] // 2
    assert mask[0, :, :half, :half].all() and mask[0].sum() == half * half and not mask[1].any()
    patches = patch_mask(mask.float(), 16)
    assert patches.shape == (2, 16, 1)
    assert patches[0, :, 0].reshape(4, 4).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


@TEXT
@torch.no_grad()
def test_keys_and_values_of_the_background_are_zero(backbone: str) -> None:
    """On the DiT, too, whose projections have biases: a row without an image adds nothing."""
    run = elite(backbone, "elite_local")
    kvs = conditions(run, on_white(run.reference()))["elite_local"].at
    for kv in kvs.values():
        assert isinstance(kv, KV)
        n = kv.k.shape[1]
        inside = patch_mask(subject_mask(on_white(run.reference())).float(), n).bool().expand_as(kv.k)
        for y in kv:
            assert not y[~inside].any() and y[inside].all()
    out = run(on_white(run.reference()))
    assert worst(out[1], run.plain()[1]) < 1e-6 and worst(out[0], run.plain()[0]) > 1e-4


def test_values_alone_are_regularised() -> None:
    run = elite("unet", "elite_local", l1_weight=2.0)
    condition = conditions(run)["elite_local"]
    means = [kv.v.abs().mean() for kv in condition.at.values() if isinstance(kv, KV)]
    assert condition.aux_loss is not None
    torch.testing.assert_close(condition.aux_loss, 2.0 * torch.stack(means).mean())


# ---- the loss ----------------------------------------------------------------------------------------------


def test_the_foreground_alone_is_in_the_loss() -> None:
    x, target = torch.zeros(2, 3, 4, 5, 6), torch.full((2, 3, 4, 5, 6), 2.0)
    mask = torch.zeros(2, 3, 1, 5, 6)
    mask[0, :, :, 2] = 1
    target[0, :, :, 1] = 100.0
    assert foreground_mse(x, target, mask).tolist() == [4 * 2.0**2, 0.0]
    with pytest.raises(ValueError, match=r"one mask \(b ... 1 h w\)"):
        foreground_mse(x, target, mask[:, :1])


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"elite_local.compat is 'elite': choose released"):
        EliteLocalConfig(compat="elite")  # type: ignore[arg-type]
    for field, config in {"words": TokenReplacementConfig, "l1_weight": EliteLocalConfig}.items():
        with pytest.raises(ValueError, match=field):
            config(**{field: -1})
