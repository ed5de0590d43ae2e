"""Stand-In: kv_concat with low-rank changes in the reference's own pass, and a rotary place beyond the video's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dit_booth.strategies.kv_concat import KVConcatConfig
from torch import Tensor

from dit_booth.inject import QKV, Injection, Place
from dit_booth.models.dit.model import DiTConfig
from dit_booth.testing import Trial, trial, worst

torch.set_num_threads(1)
STAND_IN = KVConcatConfig(
    projections="low_rank",
    rank=2,
    train_frame_kv=False,
    update="direct",
    reference_at="all",
    reference_noise="clean",
)
ROTARY = DiTConfig(depth=2, hidden=32, heads=2, positions="rotary")


def stand_in(backbone: str = "dit-factorised", place: Place = "backbone", **settings: object) -> Trial:
    options = replace(STAND_IN, reference_place=place)
    return trial("kv_concat", backbone, options={"kv_concat": options}, **settings).perturb()


class Seen(Injection):
    """Keeps the payloads that leave a site."""

    def __init__(self, inner: Injection, site: str) -> None:
        super().__init__(inner.taps)
        self.site, self.payloads = site, list[QKV]()

    def __call__(self, site, payload):  # type: ignore[no-untyped-def]
        out = super().__call__(site, payload)
        if site.name == self.site:
            self.payloads.append(out)
        return out


def payload_at(run: Trial, site: str, inject: Injection) -> QKV:
    """Return what leaves a site of the video's pass."""
    seen = Seen(inject, site)
    run.model.backbone(run.x, run.t, run.model.text(run.prompt), seen)
    (payload,) = seen.payloads
    return payload


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet", "wan"])
@torch.no_grad()
def test_the_reference_alone_has_the_changes(backbone: str) -> None:
    run = stand_in(backbone)
    conditions = run.model.constant_conditions(run.reference())
    made, part = conditions["kv_concat"].at, run.model.strategy.part("kv_concat")
    sites = list(part.attached)
    assert len(part.attached_to_reference) == 3 * len(sites) - 1, "the last queries matter to nothing"
    assert not list(part.taps.parameters()), "no copy of a projection"
    control = trial("none", backbone)
    first, bind = sites[0], run.model.strategy.bind
    own = payload_at(control, first, control.model.strategy.bind(())).segments[0]
    video = payload_at(run, first, bind(("kv_concat",), conditions))
    assert torch.equal(video.segments[0].k, own.k) and torch.equal(video.segments[0].v, own.v)
    assert [segment.frames for segment in video.segments[1:]] == [((0,),) * 3]
    for name, tap in part.attached_to_reference.items():
        control.model.backbone.get_submodule(name).weight += tap.up.weight @ tap.down.weight
    hidden = control.model.hidden(run.reference().latent, torch.zeros(2), sites)
    for at in sites:
        for layer, ours in zip(("to_k", "to_v"), made[at], strict=True):
            expected = control.model.backbone.get_submodule(f"{at}.{layer}")(hidden[at])
            assert worst(ours, expected) < 1e-4 * max(1.0, expected.abs().max().item()), (at, layer)
    plain = trial("none", backbone).model
    moved = plain.hidden(run.reference().latent, torch.zeros(2), sites)[sites[-1]] - hidden[sites[-1]]
    assert moved.abs().max() > 1e-3, "the changes act in the reference's own attention, too"


@pytest.mark.parametrize(
    ("place", "frame", "offset"), [("backbone", 0, 0), ("before", -1, 0), ("beyond", -1, 1)]
)
@torch.no_grad()
def test_keys_of_the_reference_are_turned_by_their_place(place: Place, frame: int, offset: int) -> None:
    """Angles computed here, in float64: a third of the pairs each for row and column, the rest for the frame."""
    run = stand_in(place=place, dit=ROTARY)
    conditions = run.model.constant_conditions(run.reference())
    site = "blocks.1.attn1"
    image = payload_at(run, site, run.model.strategy.bind(("kv_concat",), conditions)).segments[-1]
    side, width = 2, 16  # 4 x 4 latents in patches of 2; heads of 16

    def angles(position: int, pairs: int) -> Tensor:
        return position * 10_000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)

    each = width // 6
    angle = torch.stack(
        [
            torch.cat(
                [angles(frame, width // 2 - 2 * each), *(angles(n + offset * side, each) for n in place_)]
            )
            for place_ in ((row, column) for row in range(side) for column in range(side))
        ]
    )[:, None]
    k = conditions["kv_concat"].at[site].k.double().unflatten(-1, (2, width))
    first, second = k.chunk(2, dim=-1)
    expected = torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1
    )
    assert worst(image.k[:, 0].double(), expected) < 1e-5


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"projections is low_rank; set kv_concat\.train_frame_kv to false"):
        KVConcatConfig(projections="low_rank")
    with pytest.raises(
        ValueError, match="reference_place is beyond, and the backbone has no rotary positions"
    ):
        stand_in(place="beyond")
