"""Several image prompts in the network: frames beside the video, banks, further channels, and a side branch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dit_booth.strategies.channel_concat import ChannelConcatConfig
from dit_booth.strategies.in_context import InContextConfig
from dit_booth.strategies.parts.frames import latents_of, side_by_side
from dit_booth.strategies.token_bank import TokenBankConfig
from dit_booth.strategies.vace import SideBranch, VACEConfig
from torch import Tensor, nn

from dit_booth.attention import Clip
from dit_booth.components import warn_of_unread_images
from dit_booth.inject import QKV, Injection, Latents, Reference, Residuals
from dit_booth.models.dit.model import DiTConfig
from dit_booth.testing import Trial, trial, worst

torch.set_num_threads(1)
BOTH = pytest.mark.parametrize("backbone", ["dit-factorised", "unet"])
JOINT = DiTConfig(depth=2, hidden=32, heads=2, layout="joint", plan="all", positions="rotary")


class Watch(Injection):
    """Keeps the payloads that leave every site."""

    def __init__(self, inner: Injection) -> None:
        super().__init__(inner.taps)
        self.after: dict[str, Any] = {}

    def __call__(self, site, payload):  # type: ignore[no-untyped-def]
        self.after[site.name] = super().__call__(site, payload)
        return self.after[site.name]


@torch.no_grad()
def watched(run: Trial, reference: Reference) -> Watch:
    names = run.model.strategy.names
    watch = Watch(run.model.strategy.bind(names, run.model.conditions(run.t, reference, names)))
    run.model.backbone(run.x, run.t, run.model.text(run.prompt, watch), watch)
    return watch


def absent(reference: Reference) -> Reference:
    """The reference with a second image that is the zero image, in the first row."""
    second = reference.further[0]
    image = second.image.clone()
    image[0] = 0
    return replace(reference, further=(replace(second, image=image), *reference.further[1:]))


# ---- in_context --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("place", ["before", "after"])
def test_every_image_is_a_frame_of_its_own(place: Any, backbone: str) -> None:
    run = trial("in_context", backbone, options={"in_context": InContextConfig(place=place)}, image_prompts=3)
    ours = absent(run.reference())
    entering: Latents = watched(run, ours).after["latents.entry"]
    assert entering.context == 3 and entering.context_after == (3 if place == "after" else 0)
    latents = torch.cat([each.latent for each in ours.all], dim=1)
    latents[0, 1] = 0
    assert torch.equal(entering.x, torch.cat([latents, run.x], dim=1)), "an absent image is a zero latent"
    with torch.no_grad():
        assert run(ours).shape == run.x.shape


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rotary", "sincos"])
def test_references_after_the_video_are_its_continuation(positions: Any) -> None:
    """Read by all and reading all, they are as the last frames of a longer video (Phantom's and SkyReels-V3's code)."""
    options = {"in_context": InContextConfig(place="after", one_way=False)}
    dit = replace(JOINT, positions=positions)
    run = trial("in_context", options=options, image_prompts=2, dit=dit)
    ours = run.reference()
    longer = torch.cat([run.x, *(each.latent for each in ours.all)], dim=1)
    whole = run.model.backbone(longer, run.t, run.model.text(run.prompt))
    assert worst(run(ours), whole[:, :-2]) < 1e-5 * whole.abs().max().item()
    before = trial(
        "in_context", options={"in_context": InContextConfig(one_way=False)}, image_prompts=2, dit=dit
    )
    assert worst(before(ours), whole[:, :-2]) > 1e-4, "the place matters"
    assert worst(run(replace(ours.further[0], noisy=ours.noisy, further=(ours,))), whole[:, :-2]) > 1e-4, (
        "and so does the order"
    )


def test_positions_of_references_beside_a_clip() -> None:
    clip = Clip((0, 4, 5))
    assert clip.positions(2) == (-2, -1, 0, 4, 5)
    assert clip.positions(2, after=2) == (6, 7, 0, 4, 5)
    assert clip.positions(3, after=2) == (-1, 6, 7, 0, 4, 5)
    assert Clip(range(3)).positions(2) == range(-2, 3), "one key of the caches of tables"
    with pytest.raises(ValueError, match=r"in_context\.place is 'end'; choose one of before, after"):
        InContextConfig(place="end")  # type: ignore[arg-type]


# ---- token_bank --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        (TokenBankConfig(tokens=4, depth=1), 12),
        (TokenBankConfig(tokens=4, depth=1, per_site=True), 12),
        (TokenBankConfig(tokens=4, depth=1, source="latent"), 4),
    ],
)
def test_a_bank_has_tokens_of_every_image(options: TokenBankConfig, tokens: int, backbone: str) -> None:
    run = trial("token_bank", backbone, options={"token_bank": options}, image_prompts=3)
    banks = [qkv.segments[1] for qkv in watched(run, run.reference()).after.values() if is_reader(qkv)]
    assert banks and all(bank.k.shape[1:3] == (1, tokens) for bank in banks)
    assert run.model.strategy.part("token_bank").reads_all_images == (tokens == 12)


def is_reader(payload: object) -> bool:
    return isinstance(payload, QKV) and len(payload.segments) == 2


def test_strategies_that_read_the_first_image_alone_are_named(caplog: pytest.LogCaptureFixture) -> None:
    strategies = trial("token_replacement+in_context", image_prompts=2).model.strategy
    warn_of_unread_images(1, strategies)
    assert not caplog.messages
    warn_of_unread_images(2, strategies)
    assert caplog.messages == ["data.image_prompts is 2; token_replacement read the first one alone"]


# ---- channel_concat ----------------------------------------------------------------------------------------


def test_pictures_lie_beside_each_other_as_large_as_their_cells() -> None:
    run = trial("channel_concat", image_prompts=4)
    pictures = latents_of(absent(run.reference()), mask=True)[:1]
    assert not pictures[0, 1].any(), "the second is absent"
    latents, c = run.reference().latent[:1, 0], run.x.shape[2]
    one = side_by_side(pictures[:, :1], 4, 8)  # a square in a wide video
    assert torch.equal(one[:, :c, :, 2:6], latents) and one[0, c].tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]] * 4
    assert not one[..., :2].any() and not one[..., 6:].any()
    two = side_by_side(pictures[:, :2], 4, 8)
    assert torch.equal(two[:, :c, :, :4], latents) and not two[..., 4:].any()
    four = side_by_side(pictures, 8, 8)
    assert torch.equal(four[:, :, 4:, :4], pictures[:, 2]) and torch.equal(four[:, :, 4:, 4:], pictures[:, 3])
    small = side_by_side(pictures[:, :3], 4, 4)  # cells one wide: each picture is one point
    assert torch.allclose(small[0, c, 1], torch.tensor([1.0, 0, 1, 0])) and not small[:, :, [0, 2, 3]].any()


@BOTH
@pytest.mark.parametrize(("at", "reached"), [("first", [0]), ("all", [0, 1, 2])])
def test_further_channels_of_the_frames_that_the_image_reaches(
    at: Any, reached: list[int], backbone: str
) -> None:
    options = {"channel_concat": ChannelConcatConfig(reference_at=at)}
    run = trial("in_context+lvdm+channel_concat", backbone, options=options, image_prompts=2).perturb()
    alone = trial("channel_concat", backbone, options=options, image_prompts=2).perturb()
    added: Tensor = watched(alone, alone.reference()).after["latents.entry"].added
    assert [i for i in range(3) if added[:, i].any()] == reached
    beside: Latents = watched(run, run.reference()).after["latents.entry"]
    assert beside.context == 2 and not beside.added[:, :2].any(), "frames outside the video have none"
    assert [i for i in range(3) if beside.added[:, 2 + i].any()] == reached


# ---- vace --------------------------------------------------------------------------------------------------


def branch_of(run: Trial) -> SideBranch:
    (branch,) = run.model.strategy.part("vace").attached.values()
    assert isinstance(branch, SideBranch)
    return branch


def passing(run: Trial) -> Trial:
    """Let the branch's outputs through, so that they can be seen."""
    for layer in branch_of(run).to_residual.values():
        nn.init.eye_(layer.weight)
    return run


@torch.no_grad()
@pytest.mark.parametrize("layout", ["factorised", "interleaved", "joint"])
def test_the_branch_starts_as_the_backbone_with_references_before_the_video(layout: Any) -> None:
    """What it finds in the video's frames is then what the backbone computes with these frames `in_context`."""
    dit = DiTConfig(depth=4, hidden=32, heads=2, layout=layout, plan="all")
    run = passing(trial("vace", image_prompts=2, dit=dit))
    payload: Residuals = watched(run, run.reference()).after[run.model.backbone.residual.name]
    assert list(payload.added) == [0, 1, 2, 3] if layout != "interleaved" else [1, 3]
    output = run.model.backbone.final_layer(payload.added[3], payload.run.keywords["c"], *run.x.shape[-2:])
    beside = trial("in_context", image_prompts=2, dit=dit)
    expected = beside(beside.reference())
    assert worst(output, expected) < 1e-5 * expected.abs().max().item()
    assert worst(output, run.plain()) > 1e-4


@torch.no_grad()
def test_the_branch_on_wan_starts_as_the_backbone_too() -> None:
    run = passing(trial("vace", "wan", image_prompts=2))
    backbone = run.model.backbone
    payload: Residuals = watched(run, run.reference()).after[backbone.residual.name]
    output = backbone.head(payload.added[1], payload.run.keywords["t_emb"], *run.x.shape[-2:])
    beside = trial("in_context", "wan", image_prompts=2)
    expected = beside(beside.reference())
    assert worst(output, expected) < 1e-5 * expected.abs().max().item()
    assert worst(output, run.plain()) > 1e-4


@torch.no_grad()
def test_the_branch_of_a_unet_adds_to_its_skips_and_its_middle() -> None:
    run = passing(trial("vace", "unet", image_prompts=2))
    payload: Residuals = watched(run, run.reference()).after[run.model.backbone.residual.name]
    assert [x.shape[1:] for x in payload.added.values()] == [
        (3, 16, 8), (3, 16, 8), (3, 4, 8), (3, 4, 16), (3, 4, 16),
    ]  # fmt: skip
    first = payload.added[0] - payload.x
    assert not first.any(), "the first skip is what enters"


def test_every_second_block_and_no_cache_of_past_frames() -> None:
    branch = branch_of(trial("vace", options={"vace": VACEConfig(every=2)}))
    assert list(branch.copies) == list(branch.to_residual) == ["0"]
    with pytest.raises(ValueError, match=r"vace\.every is 0"):
        VACEConfig(every=0)
    dit = DiTConfig(depth=2, hidden=32, heads=2, plan="window(2)", temporal_plan="window(2)")
    run = trial("vace", dit=dit)
    clip = Clip(range(3), cache=run.model.backbone.make_frame_cache())
    with pytest.raises(ValueError, match=r"set sample\.long\.cache to false"):
        run.model(run.x, run.t, run.prompt, run.reference(), clip=clip)
