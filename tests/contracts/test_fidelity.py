"""The switches that reproduce the released VideoBooth (docs/fidelity.md), through the public path of a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcatConfig
from dit_booth.strategies.token_replacement import TokenReplacementConfig
from torch import Tensor

from dit_booth.config import StageConfig
from dit_booth.data.example import collate
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.inject import PromptTokens
from dit_booth.models.clip.tokenizer import bpe
from dit_booth.sampling.generate import generate
from dit_booth.testing import Trial, trial, worst
from dit_booth.training.inputs import generator_of, make_inputs

BACKBONES = pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])


def watched(run: Trial) -> list[tuple[Tensor, Tensor]]:
    """(x, t) of every pass through the backbone from now on."""
    calls: list[tuple[Tensor, Tensor]] = []
    run.model.backbone.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    return calls


def sampled(run: Trial, captions: Sequence[str] = ("a dog runs", "the red cat"), **guidance: Any) -> Tensor:
    """Two videos, of a dog and a cat, with two steps, the first of them from noise."""
    sampler = SamplerConfig(kind="ddim", steps=2)
    images = run.reference().image
    return generate(
        run.components,
        images,
        captions,
        ["dog", "cat"],
        [1, 2],
        size=(3, *images.shape[-2:]),
        guidance=GuidanceConfig(**guidance),
        sampler=sampler,
    )


# ---- reference_frames: the copies of the reference, each with noise of its own -------------------------------------


@BACKBONES
@pytest.mark.parametrize("copies", [1, 3])
def test_training_noises_every_copy_anew(copies: int, backbone: str) -> None:
    run = trial("kv_concat", backbone, options={"kv_concat": KVConcatConfig(reference_frames=copies)})
    data = run.components.config.data.build()
    batch, stage = collate([data[i] for i in range(2)]), StageConfig()
    made = make_inputs(run.components, batch, stage, generator_of(0), torch.float32, with_image=True)
    reference, objective = made.reference, run.components.objective
    assert reference.latent.shape[1] == 1 and reference.noisy.shape[1] == copies
    clean = reference.latent.expand_as(reference.noisy)
    signal = objective.noise(clean, made.t, torch.zeros_like(clean))
    level = objective.noise(torch.zeros_like(clean), made.t, torch.ones_like(clean))
    eps = (reference.noisy - signal) / level
    assert 0.8 < eps.std() < 1.2
    for r in range(1, copies):
        assert worst(eps[:, 0], eps[:, r]) > 1


@BACKBONES
def test_sampling_runs_the_copies_as_a_video(backbone: str) -> None:
    run = trial("kv_concat", backbone, options={"kv_concat": KVConcatConfig(reference_frames=3)})
    calls = watched(run)
    sampled(run)
    (noisy, _), (x, _) = calls[:2]
    assert noisy.shape == x.shape and noisy.shape[:2] == (4, 3), "two videos, both branches of guidance"
    assert worst(noisy[:, 0], noisy[:, 1]) > 1 and worst(noisy[:, 1], noisy[:, 2]) > 1


@BACKBONES
@torch.no_grad()
def test_the_first_copy_is_read_and_the_others_reach_it(backbone: str) -> None:
    run = trial("kv_concat", backbone)
    reference, sites = run.reference(), list(run.model.strategy.part("kv_concat").attached)
    others = torch.randn(2, 2, *reference.noisy.shape[2:], generator=torch.Generator().manual_seed(7))
    copies = torch.cat([reference.noisy, others], dim=1)
    one = run.model.hidden(reference.noisy, run.t, sites)
    three = run.model.hidden(copies, run.t, sites)
    assert all(three[site].shape == one[site].shape for site in sites)
    assert any(worst(three[site], one[site]) > 1e-3 for site in sites)
    swapped = run.model.hidden(copies[:, [1, 0, 2]], run.t, sites)
    assert all(worst(swapped[site], three[site]) > 1e-3 for site in sites)
    run.perturb()
    assert worst(run(replace(reference, noisy=copies)), run(reference)) > 1e-5


@torch.no_grad()
def test_copies_with_equal_noise_are_one_frame() -> None:
    """On the U-Net, which does not know its frames' places."""
    run = trial("kv_concat", "unet").perturb()
    reference = run.reference()
    copies = replace(reference, noisy=reference.noisy.expand(-1, 3, -1, -1, -1))
    assert worst(run(copies), run(reference)) < 1e-5


def test_copies_are_made_for_active_strategies_only() -> None:
    options = {"kv_concat": KVConcatConfig(reference_frames=3)}
    run = trial("token_replacement+kv_concat", "dit-factorised", options=options)
    reference = run.components.reference(run.reference().image, torch.float32)
    assert reference.noisy is None and run.components.copies(reference).shape[1] == 3
    run.model.active = ("token_replacement",)
    assert run.components.copies(reference).shape[1] == 1


def test_the_number_of_copies_is_checked() -> None:
    with pytest.raises(ValueError, match=r"kv_concat\.reference_frames is 0; use a whole number in \[1, "):
        KVConcatConfig(reference_frames=0)
    with pytest.raises(ValueError, match="reference_frames is 4 with reference_noise=clean"):
        KVConcatConfig(reference_frames=4, reference_noise="clean")


# ---- guidance.unconditional: what the unconditional branch sees ----------------------------------------------------


@BACKBONES
@torch.no_grad()
def test_the_unconditional_branch_may_go_without_an_image(backbone: str) -> None:
    """``omit`` runs it in a pass of its own, without a reference (golden: ``e_uncond``)."""
    run = trial("token_replacement+kv_concat", backbone).perturb()
    calls = watched(run)
    omitted = sampled(run, scale=2.0, unconditional="omit")
    assert [tuple(x.shape[:2]) for x, _ in calls] == [(2, 1), (2, 3), (2, 3)] * 2
    assert torch.equal(calls[1][0], calls[2][0]), "the same x in both branches"
    assert worst(omitted, sampled(run, scale=2.0)) > 1e-1
    plain = trial("none", backbone)
    assert worst(sampled(plain, scale=2.0, unconditional="omit"), sampled(plain, scale=2.0)) < 5e-3, (
        "rounding, which the first step multiplies by 160"
    )


@torch.no_grad()
def test_omitting_is_the_prediction_without_a_reference() -> None:
    run = trial("kv_concat", "unet").perturb()
    seen: list[tuple[Any, ...]] = []
    handle = run.model.register_forward_hook(lambda module, args, out: seen.append((*args[:4], out.output)))
    sampled(run, scale=3.0, unconditional="omit")
    handle.remove()
    (_, _, _, with_image, _), (x, t, null, without, unconditional) = seen[:2]
    assert with_image is not None and without is None
    assert torch.equal(null.ids, run.model.text.tokenize(["None", "None"]).ids)
    assert torch.equal(run.model(x, t, null, None).output, unconditional)


def test_the_unconditional_branch_has_two_names() -> None:
    with pytest.raises(ValueError, match="unconditional='none': choose zero_image or omit"):
        GuidanceConfig(unconditional="none")  # type: ignore[arg-type]


# ---- all of them together ------------------------------------------------------------------------------------------


@dataclass
class OneStep:
    """What the released sampler's switches make of the step from noise, and the passes that it took: (x, t) each."""

    latents: Tensor  # after it: b f c h w
    calls: list[tuple[Tensor, Tensor]]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [tuple(x.shape[:2]) for x, _ in self.calls]


def one_step(*, compat: str = "videobooth", copies: int = 3, **guidance: Any) -> OneStep:
    """With the four switches of docs/fidelity.md, or other values; the first row's subject stands twice, near."""
    options = {
        "kv_concat": KVConcatConfig(reference_frames=copies),
        "token_replacement": TokenReplacementConfig(compat=compat),  # type: ignore[arg-type]
    }
    run = trial("token_replacement+kv_concat", "unet", options=options).perturb()
    calls, switches = watched(run), {"scale": 2.0, "channels": 3, "unconditional": "omit"}
    sampled(run, ["the dog and dog runs", "the red cat"], **{**switches, **guidance})
    after, _ = calls[-1]  # of the second step, which begins with the first one's latents
    return OneStep(after[:2], calls[: len(calls) // 2])


@pytest.fixture(scope="module")
def remembered() -> dict[str, OneStep]:
    return {}


@pytest.fixture
def released(remembered: dict[str, OneStep]) -> OneStep:
    """All four together."""
    if not remembered:
        remembered["released"] = one_step()
    return remembered["released"]


EFFECT, ROUNDING = 1e-1, 5e-3  # the first step multiplies a prediction by 160


def test_all_switches_together_take_the_released_passes(released: OneStep) -> None:
    """Three copies of the reference as a video, then each branch of guidance on its own, on the same x."""
    assert released.latents.isfinite().all()
    assert released.shapes == [(2, 3)] * 3
    (copies, _), (x, _), (again, _) = released.calls
    assert worst(copies[:, 0], copies[:, 1]) > 1 and worst(copies[:, 1], copies[:, 2]) > 1
    assert torch.equal(x, again)


def test_of_all_switches_compat_rewrites_the_caption_with_two_subjects(released: OneStep) -> None:
    other = one_step(compat="")
    assert other.shapes == released.shapes
    assert worst(other.latents[0], released.latents[0]) > EFFECT
    assert worst(other.latents[1], released.latents[1]) < ROUNDING, "its subject stands once"


def test_of_all_switches_reference_frames_brings_the_copies(released: OneStep) -> None:
    other = one_step(copies=1)
    assert other.shapes == [(2, 1), (2, 3), (2, 3)]
    assert worst(other.calls[0][0][:, 0], released.calls[0][0][:, 0]) < 1e-6, "the copy that is read"
    assert worst(other.latents, released.latents) > EFFECT


def test_of_all_switches_channels_leaves_the_others_conditional(released: OneStep) -> None:
    other, conditional = one_step(channels=None), one_step(scale=1.0)
    assert worst(other.latents[:, :, :3], released.latents[:, :, :3]) < ROUNDING
    assert worst(other.latents[:, :, 3:], released.latents[:, :, 3:]) > EFFECT
    assert worst(conditional.latents[:, :, :3], released.latents[:, :, :3]) > EFFECT
    assert worst(conditional.latents[:, :, 3:], released.latents[:, :, 3:]) < ROUNDING


def test_of_all_switches_unconditional_omits_the_zero_image(released: OneStep) -> None:
    other = one_step(unconditional="zero_image")
    assert other.shapes == [(4, 3), (4, 3)]
    assert worst(other.latents[:, :, :3], released.latents[:, :, :3]) > EFFECT
    assert worst(other.latents[:, :, 3:], released.latents[:, :, 3:]) < ROUNDING, "conditional in both"


# ---- token_replacement.compat --------------------------------------------------------------------------------------

FOUND = {  # caption -> what the text transformer reads for "polar bear"; *: one of the image's five words
    "a polar bear walks": {"": "a * * * * * walks", "videobooth": "a * * * * * walks"},
    # The first token alone takes the token after it along, and the later place overwrites the shifted tail.
    "a polar night, then far away in the snow a polar bear walks": {
        "": "a polar night , then far away in the snow a * * * * * walks",
        "videobooth": "a * * * * * , then far away in * * * * * walks",
    },
    "polar bear and polar foxes": {"": "* * * * * and polar foxes", "videobooth": "* * * * * * * *"},
    "polar bear on a polar": {"": "* * * * * on a polar", "videobooth": "* * * * * * * * *"},
    # No such subject: refused by default.
    "two polar bears": {"videobooth": "two * * * * *"},
    "polar": {"videobooth": "* * * * *"},
}


def finding(compat: str, backbone: str = "dit-factorised") -> Trial:
    options = {"token_replacement": TokenReplacementConfig(compat=compat)}  # type: ignore[arg-type]
    return trial("token_replacement+kv_concat", backbone, options=options)


def read_by_the_text_transformer(run: Trial, caption: str, subject: str) -> str:
    """The words behind the begin token and before the end token, in a pass of the whole network."""
    seen: list[PromptTokens] = []
    tap = run.model.strategy.part("token_replacement").attached["text.prompt"]
    handle = tap.register_forward_hook(lambda module, args, out: seen.append(out))
    run.model(run.x, run.t, run.components.tokenize([caption] * 2, [subject] * 2), run.reference())
    handle.remove()
    ours = run.model.text.tokenizer
    words = {ours.fold(t): bpe().decode([t]).strip() for t in bpe().encode(caption)} | {-1: "*"}
    first, *ids = next(out.ids[0].tolist() for out in seen if (out.ids == -1).any())
    assert first == ours.begin
    return " ".join(words[token] for token in ids[: ids.index(ours.end)])


@pytest.mark.parametrize("compat", ["", "videobooth"])
@torch.no_grad()
def test_compat_finds_the_subject_by_its_first_token_alone(compat: str) -> None:
    run = finding(compat)
    for caption, found in FOUND.items():
        if compat in found:
            assert read_by_the_text_transformer(run, caption, "polar bear") == found[compat], caption
        else:
            with pytest.raises(ValueError, match=f"subject 'polar bear' is not in caption '{caption}'"):
                run.components.tokenize([caption], ["polar bear"])


@pytest.mark.parametrize("compat", ["", "videobooth"])
def test_training_and_sampling_ask_a_caption_for_as_much_of_its_subject(compat: str) -> None:
    """The prompts of both hold what the strategy finds, and neither takes a caption that has nothing of it."""
    run = finding(compat, "unet")
    data = run.components.config.data.build()
    batch = collate([data[i] for i in range(2)])

    def made(caption: str, subject: str) -> list[Any]:
        rows = replace(batch, captions=[caption] * 2, subjects=[subject] * 2)
        trained = make_inputs(
            run.components, rows, StageConfig(), generator_of(0), torch.float32, with_image=True
        )
        seen: list[Any] = []
        handle = run.model.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
        images = run.reference().image
        generate(
            run.components, images, [caption] * 2, [subject] * 2, [1, 2],
            size=(3, *images.shape[-2:]), guidance=GuidanceConfig(), sampler=SamplerConfig(kind="ddim", steps=1),
        )  # fmt: skip
        handle.remove()
        return [trained.prompt, seen[0].each(lambda y: y[:2])]

    if compat:
        for prompt in made("two polar bears", "polar bear"):
            assert (prompt.ids[:, 2:3] == prompt.subjects[:, :1]).all() and not prompt.spans.any()
        with pytest.raises(ValueError, match="not even the first token 'polar' of subject 'polar bear'"):
            made("a cold night", "polar bear")
    else:
        with pytest.raises(ValueError, match="subject 'polar bear' is not in caption 'two polar bears'"):
            made("two polar bears", "polar bear")
    for prompt in made("a polar bear walks", "polar bear"):
        assert prompt.spans[:, :5].tolist() == [[0, 0, 1, 1, 0]] * 2


def test_a_strategy_that_takes_no_part_asks_for_nothing() -> None:
    """What a stage trains on depends on its active strategies alone: its address has the options of no other."""
    run = finding("videobooth")
    assert run.components.first_token_suffices
    run.model.active = ("kv_concat",)
    assert not run.components.first_token_suffices


# ---- the rest of the document --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_dropped_row_is_penalised_as_the_zero_image_and_for_nothing_else() -> None:
    """The mapper reads the zero image; the text itself has no regulariser."""
    run = trial("token_replacement", "dit-factorised")
    data, part = run.components.config.data.build(), run.model.strategy.part("token_replacement")
    batch = collate([data[i] for i in range(2)])
    for drop, image in ((0.0, batch.image), (1.0, torch.zeros_like(batch.image))):
        made = make_inputs(
            run.components, batch, StageConfig(drop=drop), generator_of(0), torch.float32, with_image=True
        )
        aux_loss = run.model(made.x_t, made.timestep, made.prompt, made.reference).aux_loss
        words = part.mapper(run.components.image_encoder(image).states)
        assert torch.allclose(aux_loss, 0.01 * words.abs().mean(), rtol=1e-6, atol=0)


def test_every_row_of_the_document_has_tests_that_there_are() -> None:
    root = Path(__file__).parents[2]
    text, below = (root / "docs" / "fidelity.md").read_text().split("## What is tested")
    rows, tested = (re.findall(r"^\| ([^|\s].*?) \| (.*) \|$", part, re.MULTILINE) for part in (text, below))
    names = {row: re.findall(r"`(test_\w+)`", tests) for row, tests in tested}
    assert len(rows) == 16 and {row for row, _ in rows} <= set(names) and all(names[row] for row, _ in rows)
    there = {
        name
        for file in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE)
    }
    assert {name for tests in names.values() for name in tests} <= there
