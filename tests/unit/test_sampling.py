"""From image prompts to videos: what a video depends on, and what guidance costs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcatConfig
from dit_booth.strategies.token_bank import TokenBankConfig
from torch import Tensor

from dit_booth.components import Components, build
from dit_booth.config import DataConfig, RunConfig
from dit_booth.diffusion.guidance import GuidanceConfig
from dit_booth.diffusion.objective_config import ObjectiveConfig
from dit_booth.diffusion.objectives import make_objective
from dit_booth.diffusion.samplers import SamplerConfig
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.models.clip.encoders import NULL_PROMPT
from dit_booth.sampling.generate import generate
from dit_booth.testing import trial

torch.set_num_threads(1)
CAPTIONS, SUBJECTS = ["a dog runs", "a red cat", "the cup of tea"], ["dog", "cat", "cup"]
IMAGES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(3)) * 2 - 1
SIZE = (3, 12, 12)


@cache
def built(strategy: str, objective: Any = "flow") -> Components:
    config = RunConfig(
        strategy=strategy,
        weights="none",
        clip=ClipConfig(pretrained="none"),
        autoencoder=AutoencoderConfig(patch=3),
        data=DataConfig(size=12, frames=3),
        objective=ObjectiveConfig(kind=objective),
    )
    components = build(config)
    generator = torch.Generator().manual_seed(5)
    for p in components.model.parameters():  # the zero initialisation would hide everything
        if not p.any():
            p.data.normal_(std=0.1, generator=generator)
    return components


def components_of(
    strategy: str = "token_replacement+kv_concat",
    objective: str = "flow",
    scale: float = 3.0,
    channels: int | None = None,
    **sampler: Any,
) -> Components:
    components = built(strategy, objective)
    sampling = SamplerConfig(**{"steps": 3, **sampler})
    guidance = GuidanceConfig(scale=scale, channels=channels)
    return replace(components, config=replace(components.config, sampler=sampling, guidance=guidance))


def videos(components: Components, rows: list[int], seeds: list[int] | None = None, **options: Any) -> Tensor:
    config = components.config
    return generate(
        components,
        options.pop("images", IMAGES)[rows],
        [CAPTIONS[i] for i in rows],
        [SUBJECTS[i] for i in rows],
        [10 + i for i in rows] if seeds is None else seeds,
        size=options.pop("size", SIZE),
        guidance=options.pop("guidance", config.guidance),
        sampler=options.pop("sampler", config.sampler),
        **options,
    )


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [
        ("flow", {}),
        ("flow", {"kind": "heun"}),
        ("eps", {"kind": "ddim"}),
        ("eps", {"kind": "ddpm"}),
        ("eps", {"kind": "ddim", "eta": 1.0}),
    ],
)
def test_a_video_depends_on_its_own_row_and_seed_only(objective: str, sampler: dict[str, Any]) -> None:
    components = components_of(objective=objective, clip_x0=1.0, **sampler)
    together = videos(components, [0, 1, 2])
    # An eps network's rounding errors grow by 1 / alpha = 160 at the first step.
    tolerance = 1e-5 if objective == "flow" else 1e-3
    assert worst(videos(components, [2, 0]), together[[2, 0]]) < tolerance
    assert worst(videos(components, [1]), together[[1]]) < tolerance


def test_seeds_images_and_captions_matter() -> None:
    components = components_of()
    plain = videos(components, [0])
    assert torch.equal(videos(components, [0]), plain)
    assert worst(videos(components, [0], seeds=[11]), plain) > 1e-2
    assert worst(videos(components, [0], images=IMAGES.flip(0)), plain) > 1e-4
    config = components.config
    other = generate(
        components, IMAGES[:1], ["a dog sits"], ["dog"], [10],
        size=SIZE, guidance=config.guidance, sampler=config.sampler,
    )  # fmt: skip
    assert worst(other, plain) > 1e-5


def test_the_size_is_asked_for_and_pixels_are_in_range() -> None:
    out = videos(components_of(), [0, 1], size=(4, 6, 18))
    assert out.shape == (2, 4, 3, 6, 18)
    assert out.abs().max() <= 1
    assert not out.requires_grad


# ---- guidance ----------------------------------------------------------------------------------------------


def rows_of_calls(components: Components, **options: Any) -> tuple[list[tuple[int, int]], Tensor]:
    """(rows, frames) of every pass through the backbone, and the videos."""
    calls: list[tuple[int, int]] = []
    handle = components.model.backbone.register_forward_pre_hook(
        lambda m, args: calls.append(args[0].shape[:2])
    )
    try:
        return calls, videos(components, [0, 1], **options)
    finally:
        handle.remove()


def test_guidance_of_one_skips_the_unconditional_pass() -> None:
    with_reference = [(2, 1), (2, 3)]
    assert rows_of_calls(components_of(scale=1.0))[0] == with_reference * 3
    assert rows_of_calls(components_of(scale=2.0))[0] == [(4, 1), (4, 3)] * 3
    assert rows_of_calls(components_of(scale=1.0), use_image=False)[0] == [(2, 3)] * 3


def test_guidance_is_linear_in_the_scale_over_one_step() -> None:
    """One Euler step from noise: x0 = noise - velocity, so videos lie on a line in the scale."""
    size = {"steps": 1}
    one, two, four = (videos(components_of(scale=s, **size), [0]) for s in (1.0, 1.5, 2.0))
    inside = (four.abs() < 1) & (two.abs() < 1) & (one.abs() < 1)  # what the range did not clamp
    assert inside.float().mean() > 0.1
    assert worst((one + four)[inside] / 2, two[inside]) < 1e-5
    assert worst(one, four) > 1e-4


def test_the_unconditional_rows_have_the_null_prompt_and_the_zero_image() -> None:
    components = components_of()
    seen: list[tuple[Any, Any]] = []
    handle = components.model.register_forward_pre_hook(lambda m, args: seen.append((args[2], args[3])))
    videos(components, [0, 1])
    handle.remove()
    null = components.model.text.tokenize([NULL_PROMPT]).ids
    for prompt, reference in seen:
        assert torch.equal(prompt.ids[2:], null.expand(2, -1))
        assert not prompt.spans[2:].any() and prompt.spans[:2].any(dim=1).all()
        assert torch.equal(reference.image[:2], IMAGES[:2])
        assert not reference.image[2:].any()


def test_the_reference_is_noised_to_the_timestep_of_each_step_with_fresh_noise() -> None:
    components = components_of()
    seen: list[tuple[Tensor, Any]] = []
    handle = components.model.register_forward_pre_hook(lambda m, args: seen.append((args[1], args[3])))
    videos(components, [0, 1])
    handle.remove()
    noises = []
    for timestep, reference in seen:
        t = (timestep / 999).reshape(-1, 1, 1, 1, 1)
        noises.append((reference.noisy - (1 - t) * reference.latent) / t)
        assert worst(noises[-1][:2], noises[-1][2:]) < 1e-5, "both branches of a row share it"
    assert len(seen) == 3
    assert worst(noises[0], noises[1]) > 1 and worst(noises[0][0], noises[0][1]) > 1
    assert 0.8 < torch.cat(noises).std() < 1.2


# ---- the image ---------------------------------------------------------------------------------------------


def test_use_image_false_ignores_images() -> None:
    components = components_of()
    out = videos(components, [0, 1], use_image=False)
    assert torch.equal(videos(components, [0, 1], use_image=False, images=IMAGES.flip(0)), out)
    assert worst(out, videos(components, [0, 1])) > 1e-4


def test_without_active_strategies_no_reference_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    components = components_of()
    plain = videos(components_of("none"), [0])
    monkeypatch.setattr(components.model, "active", ())
    monkeypatch.setattr(Components, "reference", lambda *args: pytest.fail("encoded an image for nothing"))
    assert videos(components, [0]).shape == plain.shape


# ---- conditions that serve all steps ---------------------------------------------------------------------------------

CLEAN = KVConcatConfig(reference_noise="clean")


def components_with(strategy: str, **options: Any) -> Components:
    run = trial(strategy, options=options).perturb()
    config = replace(
        run.components.config,
        objective=ObjectiveConfig(kind="flow"),
        sampler=SamplerConfig(steps=4),
        guidance=GuidanceConfig(scale=3.0),
    )
    return replace(run.components, config=config, objective=make_objective(config.objective))


@pytest.mark.parametrize(
    ("strategy", "options", "calls"),
    [
        ("kv_concat", {"kv_concat": CLEAN}, 1),
        ("kv_concat", {}, 4),
        ("token_replacement", {}, 1),
        ("adaln", {}, 1),
        ("token_bank", {}, 1),
        ("token_bank", {"token_bank": TokenBankConfig(source="latent", reference_noise="matched")}, 4),
        ("decoupled_attention", {}, 1),
        ("token_replacement+elite_local", {}, 1),
        ("in_context", {}, 1),
        ("spatial_concat", {}, 1),
        ("token_replacement+kv_concat+query_projection", {"kv_concat": CLEAN}, 1),
    ],
)
def test_a_constant_condition_is_made_once_and_gives_the_same_videos(
    strategy: str, options: Any, calls: int
) -> None:
    components = components_with(strategy, **options)
    part = components.model.strategy.part(strategy.split("+")[-1] if calls == 1 else strategy)
    made = [0]
    part.register_forward_hook(lambda *_: made.__setitem__(0, made[0] + 1))
    reused = videos(components, [0, 1])
    assert made == [calls]
    each = videos(components, [0, 1], reuse=False)
    assert made == [calls + 4]
    assert torch.equal(reused, each)
    assert worst(reused, videos(components, [0, 1], images=IMAGES.flip(0))) > 1e-5


def test_a_clean_reference_passes_the_network_once_a_video_and_its_keys_are_projected_once() -> None:
    components, frames, keys = components_with("kv_concat", kv_concat=CLEAN), [], [0]
    components.model.backbone.register_forward_pre_hook(lambda m, args: frames.append(args[0].shape[1]))
    for tap in components.model.strategy.part("kv_concat").attached.values():
        tap.to_k_exemplar.register_forward_hook(lambda *_: keys.__setitem__(0, keys[0] + 1))
    reused = videos(components, [0, 1])
    assert frames == [1, 3, 3, 3, 3]
    assert keys == [2], "one for each site"
    each = videos(components, [0, 1], reuse=False)
    assert frames[5:] == [1, 3] * 4 and keys == [2 + 4 * 2]
    assert torch.equal(reused, each)


# ---- guidance by text and image apart ----------------------------------------------------------------------


def scaled(**guidance: Any) -> Components:
    components = components_with(
        "token_replacement+kv_concat", kv_concat=CLEAN
    )  # noised to t = 1 there would be no image
    config = replace(components.config, guidance=GuidanceConfig(**guidance), sampler=SamplerConfig(steps=1))
    return replace(components, config=config)


@pytest.mark.parametrize(
    ("guidance", "rows"),
    [
        ({"scale": 1.0}, [(2, 3)]),
        ({"scale": 3.0}, [(4, 3)]),
        ({"image": 2.0, "text": 2.0}, [(4, 3)]),
        ({"image": 2.0, "text": 3.0}, [(6, 3)]),
        ({"text": 3.0}, [(4, 3)]),
        ({"image": 3.0}, [(6, 3)]),
        ({"image": 1.0, "text": 1.0}, [(2, 3)]),
        ({"image": 2.0, "text": 3.0, "unconditional": "omit"}, [(4, 3), (2, 3)]),
        ({"text": 3.0, "unconditional": "omit"}, [(4, 3)]),
    ],
)
def test_a_guided_step_is_one_batch_of_the_branches_that_count(guidance: Any, rows: Any) -> None:
    calls, _ = rows_of_calls(scaled(**guidance))
    assert [call for call in calls if call[1] == 3] == rows


def test_three_branches_give_the_two_scale_guidance_of_instruct_pix2pix() -> None:
    """One Euler step: a video is its prediction. eps(0,0) + s_I (eps(0,I) - eps(0,0)) + s_T (eps(T,I) - eps(0,I))."""

    def latents(**guidance: Any) -> Tensor:
        components, seen = scaled(**guidance), []
        decode = components.autoencoder.decode
        components.autoencoder.decode = lambda x: seen.append(x) or decode(x)  # type: ignore[method-assign]
        videos(components, [0, 1])
        return seen[0]

    both = latents(scale=1.0)
    by_text = latents(text=2.0)  # 2 eps(T,I) - eps(0,I)
    joint = latents(scale=2.0)  # 2 eps(T,I) - eps(0,0)
    image, neither = 2 * both - by_text, 2 * both - joint
    expected = neither + 1.5 * (image - neither) + 4.0 * (both - image)
    assert worst(latents(image=1.5, text=4.0), expected) < 1e-4 * expected.abs().max().item()
    assert worst(latents(image=3.0), neither + 3 * (image - neither) + (both - image)) < 1e-4
    assert torch.equal(latents(image=2.0, text=2.0), joint), "equal scales are one joint guidance"
    assert min(worst(image, neither), worst(both, image)) > 1e-3
