"""The toy world tells the truth: about its pixels, its words, and what it holds back."""

import itertools
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_booth.data.example import collate
from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.data.toyworld.looks import (
    COLOUR_CONTRAST,
    COLOUR_JITTER,
    COLOURS,
    draw_looks,
    looks_of_test,
    split_of,
)
from dit_booth.data.toyworld.shapes import SHAPES, TEXTURES
from dit_booth.data.toyworld.world import (
    BACKGROUND_CONTRAST,
    BACKGROUNDS,
    MOTIONS,
    Identity,
    caption,
    render_prompt,
    render_video,
    sample_identity,
)

torch.set_num_threads(1)

PLAIN = Identity(
    shape="star",
    texture="plain",
    colours=("red", "red"),
    rgb=((0.9, 0.2, 0.1), (0.9, 0.2, 0.1)),
    scale=1.0,
    direction=0.0,
    motion="right",
    background="snow",
    radius=0.3,
    angle=0.0,
    start=(0.3, 0.5),
    end=(0.7, 0.5),
    turn=0.0,
    ripples=((1.0, 0.5, 0.0),),
    prompt_angle=0.0,
    prompt_flip=False,
)


def centres(mask: torch.Tensor) -> np.ndarray:
    """Centre of mass of each frame, `f 2` as (x, y), in shares of the side."""
    side = mask.shape[-1]
    return np.array([frame.nonzero().float().mean(0).flip(0).numpy() / side for frame in mask])


@settings(max_examples=25, deadline=None)
@given(
    index=st.integers(0, 999_999), seed=st.integers(0, 99), split=st.sampled_from(["train", "dev", "test"])
)
def test_an_example_is_a_pure_function_of_seed_split_and_index(index, seed, split):
    config = ToyworldConfig(size=24, frames=3, seed=seed, split=split)
    a, b = Toyworld(config)[index], Toyworld(config)[index]
    assert torch.equal(a.video, b.video) and torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask)
    assert (a.caption, a.identity, a.key) == (b.caption, b.identity, b.key)
    other = Toyworld(replace(config, seed=seed + 1))[index]
    assert other.identity != a.identity


@pytest.mark.parametrize("options", [{"size": 48}, {"frames": 5}, {"describe": "full"}, {"image_size": 64}])
def test_the_scene_does_not_depend_on_how_it_is_shown(options):
    config = ToyworldConfig(size=24, frames=3)
    for index in range(5):
        assert Toyworld(config)[index].identity == Toyworld(replace(config, **options))[index].identity


def test_an_example_can_be_rendered_again_from_its_identity():
    made = Toyworld(ToyworldConfig(size=24, frames=3, image_size=40))[11]
    assert made.identity is not None
    video, mask = render_video(made.identity, frames=3, size=24)
    assert torch.equal(video, made.video) and torch.equal(mask, made.mask)
    assert torch.equal(render_prompt(made.identity, size=40), made.image)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_mask_is_where_the_subject_covers_the_background(shape):
    it = replace(PLAIN, shape=shape, motion="spinning", turn=3.0, end=PLAIN.start)
    video, mask = render_video(it, frames=4, size=48)
    pixels = rearrange(video, "f c h w -> f h w c")
    colour = torch.tensor(it.rgb[0]) * 2 - 1
    ground = torch.tensor(BACKGROUNDS["snow"][0]) * 2 - 1
    nearer = (pixels - colour).norm(dim=-1) < (pixels - ground).norm(dim=-1)
    assert (nearer != mask).float().mean() < 0.002
    exact = (pixels - colour).norm(dim=-1) < 1e-5
    assert (
        exact[mask].float().mean() > 0.5
    )  # beside the soft rim, the colour is the identity's to the last digit
    assert not exact[~mask].any()


@pytest.mark.parametrize("texture", [name for name in TEXTURES if name != "plain"])
def test_a_textured_subject_shows_both_its_colours_in_the_video_and_in_the_prompt(texture):
    it = replace(PLAIN, shape="circle", texture=texture, colours=("red", "blue"))
    it = replace(it, rgb=((0.9, 0.1, 0.1), (0.1, 0.2, 0.9)), motion="still")
    video, mask = render_video(it, frames=1, size=64)
    inside = rearrange(video, "f c h w -> f h w c")[mask]
    prompt = rearrange(render_prompt(it, size=64), "c h w -> (h w) c")
    for pixels, share in ((inside, 0.1), (prompt, 0.06)):
        for rgb in it.rgb:
            near = (pixels - (torch.tensor(rgb) * 2 - 1)).norm(dim=-1) < 0.35
            assert near.float().mean() > share


def test_shapes_and_textures_differ_visibly_at_32_pixels():
    masks = {name: render_video(replace(PLAIN, shape=name), frames=1, size=32)[1] for name in SHAPES}
    for a, b in itertools.combinations(SHAPES, 2):
        overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
        assert overlap < 0.87, (a, b)
    two = replace(PLAIN, shape="circle", rgb=((0.9, 0.1, 0.1), (0.1, 0.2, 0.9)))
    prompts = {name: render_prompt(replace(two, texture=name), size=32) for name in TEXTURES}
    for a, b in itertools.combinations(TEXTURES, 2):
        assert (prompts[a] - prompts[b]).abs().mean() > 0.1, (a, b)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_edges_are_smooth_and_areas_hold_at_every_size(shape):
    it = replace(PLAIN, shape=shape)
    areas = [float(render_video(it, frames=1, size=size)[1].float().mean()) for size in (24, 192)]
    assert areas[0] == pytest.approx(areas[1], rel=0.12)
    # A rim pixel is a blend: a hard edge would have none.
    video, _ = render_video(replace(it, ripples=()), frames=1, size=32)
    far = (video[0] - video[0, :, :1, :1]).norm(dim=0)
    assert ((far > 0.15) & (far < 0.8 * far.max())).sum() >= 8


def test_motions_do_what_their_captions_say():
    def run(motion: str, **changes) -> torch.Tensor:
        rng = np.random.default_rng(3)
        drawn = iter(lambda: sample_identity(rng, draw_looks(rng, "train", 0)), None)
        it = next(it for it in drawn if it.motion == motion)
        return render_video(replace(it, **changes), frames=8, size=64)[1]

    for motion, axis, sign in (("right", 0, 1), ("left", 0, -1), ("down", 1, 1), ("up", 1, -1)):
        steps = np.diff(centres(run(motion)), axis=0)
        assert (sign * steps[:, axis] > 0.02).all() and np.abs(steps[:, 1 - axis]).max() < 0.02
    growth = np.diff(run("growing").sum(dim=(1, 2)).numpy())
    assert (growth > 0).all()
    assert (np.diff(run("shrinking").sum(dim=(1, 2)).numpy()) < 0).all()
    assert not run("still").diff(dim=0).any()
    heights = centres(run("bouncing"))[:, 1]
    assert (np.diff(np.sign(np.diff(heights))) != 0).sum() >= 3
    spinning = run("spinning", shape="diamond")
    assert (spinning[1:] != spinning[:-1]).any(dim=(1, 2)).all()


def test_subjects_are_large_and_stay_in_the_frame():
    world = Toyworld(ToyworldConfig(size=32, image_size=8))
    areas = []
    for index in range(200):
        it = Identity(**world[index].identity)
        _, mask = render_video(it, frames=8, size=32)
        # The same scene, seen from twice as far: what the frame cuts off is in there.
        half = (0.25 + it.start[0] / 2, 0.25 + it.start[1] / 2), (0.25 + it.end[0] / 2, 0.25 + it.end[1] / 2)
        _, wide = render_video(
            replace(it, radius=it.radius / 2, start=half[0], end=half[1]), frames=8, size=64
        )
        assert (mask.sum(dim=(1, 2)) / wide.sum(dim=(1, 2))).min() > 0.85
        areas.append(float(mask.float().mean()))
    assert 0.1 < np.mean(areas) < 0.4 and min(areas) > 0.03


def test_colours_keep_their_names_and_their_distance():
    rng = np.random.default_rng(0)
    for _ in range(300):
        it = sample_identity(rng, draw_looks(rng, "train", 0))
        for name, rgb in zip(it.colours, it.rgb, strict=True):
            assert min(COLOURS, key=lambda other: math.dist(COLOURS[other], rgb)) == name
            assert max(abs(a - b) for a, b in zip(COLOURS[name], rgb, strict=True)) <= COLOUR_JITTER
            assert math.dist(BACKGROUNDS[it.background][0], COLOURS[name]) >= BACKGROUND_CONTRAST
        if it.texture == "plain":
            assert it.rgb[0] == it.rgb[1] and it.colours[0] == it.colours[1]
        else:
            assert math.dist(*(COLOURS[name] for name in it.colours)) >= COLOUR_CONTRAST


def test_every_pair_of_colours_has_a_background():
    for a, b in itertools.product(COLOURS, COLOURS):
        far = [min(math.dist(rgb, COLOURS[name]) for name in (a, b)) for rgb, _ in BACKGROUNDS.values()]
        assert max(far) >= BACKGROUND_CONTRAST, (a, b)


def test_the_prompt_is_the_subject_on_white_that_fills_its_square():
    for index in range(40):
        image = Toyworld(ToyworldConfig(image_size=48))[index].image
        ink = (image < 0.98).any(dim=0)
        rows, columns = ink.any(dim=1).nonzero(), ink.any(dim=0).nonzero()
        tall, wide = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
        assert max(tall, wide) >= 44
        assert abs(int(rows.min()) - (47 - int(rows.max()))) <= 4  # padded evenly
        assert abs(int(columns.min()) - (47 - int(columns.max()))) <= 4


def test_the_splits_share_no_looks():
    def looks(split, count):
        rng = np.random.default_rng(1)
        return {draw_looks(rng, split, index) for index in range(count)}

    drawn = {split: looks(split, count) for split, count in (("train", 3000), ("dev", 300), ("test", 300))}
    for split, own in drawn.items():
        assert all(split_of(look) == split for look in own)
    # What is new is the combination: each part of it is known from training.
    for part in range(3):
        assert {look[part] for look in drawn["dev"]} <= {look[part] for look in drawn["train"]}
    pairs = itertools.permutations(COLOURS, 2)
    share = np.mean([split_of((s, t, pair)) != "train" for pair in pairs for s in SHAPES for t in TEXTURES])
    assert share == pytest.approx(0.1, abs=0.01)


def test_of_a_test_subject_training_has_neither_order_of_the_colours():
    every = looks_of_test()
    assert len(set(every)) == len(every) == 41
    for shape, texture, (first, second) in every:
        assert {split_of((shape, texture, pair)) for pair in ((first, second), (second, first))} == {"test"}
        assert texture != "plain" or first == second
    # All combinations in turn, in both orders of their colours, each time in another scene.
    world = Toyworld(ToyworldConfig(split="test", size=8, frames=1))
    seen = [world[i].identity for i in range(4 * len(every))]
    names = [(it["shape"], it["texture"], frozenset(it["colours"])) for it in seen]
    assert names == 4 * [(shape, texture, frozenset(pair)) for shape, texture, pair in every]
    assert len({(it["shape"], it["texture"], it["colours"]) for it in seen}) > len(every)
    assert len({it["ripples"] for it in seen}) == len(seen)


def test_the_first_dev_prompts_are_those_that_settings_were_chosen_on():
    said = [
        "a diamond is spinning on snow", "a circle is moving right on sand", "a triangle is growing at night",
        "a ring is shrinking on stone", "a square is growing in the sky", "a circle is moving left on snow",
        "a square is growing on snow", "a square is shrinking on sand", "a crescent is moving right in the sky",
        "a crescent is moving left on sand", "a star is spinning on grass", "a flower is moving down on sand",
    ]  # fmt: skip
    world = Toyworld(ToyworldConfig(split="dev", size=8, frames=1))
    assert [world[i].caption for i in range(12)] == said
    assert world[0].key == "toyworld/0/dev/0"


def test_captions_tell_as_much_as_asked():
    for index in range(60):
        short = Toyworld(ToyworldConfig(size=8, describe="none"))[index]
        it = short.identity
        assert it is not None
        rest = f"{it['shape']} {MOTIONS[it['motion']]} {BACKGROUNDS[it['background']][1]}"
        assert short.caption.split(" ", 1) == [("an" if rest[0] in "aeiou" else "a"), rest]
        full = Toyworld(ToyworldConfig(size=8, describe="full"))[index].caption
        assert full.endswith(rest) and all(colour in full.split() for colour in it["colours"])
        assert it["texture"] == "plain" or it["texture"] in full.split()
        assert full.startswith("an ") == (full.split()[1][0] in "aeiou")


def test_mixed_captions_name_each_attribute_about_half_of_the_time():
    world = Toyworld(ToyworldConfig(size=8, frames=1, describe="mixed"))
    words = [(world[i].caption.split(), world[i].identity) for i in range(200)]
    coloured = np.mean([it["colours"][0] in said for said, it in words])
    textured = np.mean([it["texture"] in said for said, it in words if it["texture"] != "plain"])
    assert 0.4 < coloured < 0.6 and 0.38 < textured < 0.62


def test_a_plain_subject_without_its_colour_is_called_plain():
    assert caption(PLAIN, colours=True, texture=True) == "a red star is moving right on snow"
    assert caption(asdict(PLAIN), colours=False, texture=True) == "a plain star is moving right on snow"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "data.frames is 0"),
        ({"size": 4}, "data.size is 4.*at least 8"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"split": "heldout"}, "data.split is 'heldout'.*train, dev, test"),
        ({"describe": "some"}, "data.toyworld.describe is 'some'.*none, full, mixed"),
        ({"describe_probability": 1.5}, "data.toyworld.describe_probability is 1.5"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ToyworldConfig(**options)


def test_an_index_beyond_the_end_is_refused():
    with pytest.raises(IndexError, match="0 to 4"):
        Toyworld(ToyworldConfig(length=5))[5]


def test_further_image_prompts_are_the_first_one_turned() -> None:
    one, three = (Toyworld(ToyworldConfig(frames=1, size=8, image_prompts=n))[5] for n in (1, 3))
    assert not one.further and len(three.further) == 2
    assert torch.equal(three.image, one.image) and torch.equal(three.video, one.video)
    assert torch.equal(three.images[1], one.image.rot90(1, (-2, -1)))
    batch = collate([three, three])
    assert batch.images.shape == (2, 3, 3, 8, 8) and torch.equal(batch.images[1], three.images)
    with pytest.raises(ValueError, match=r"further differs in number within a batch: .*data\.image_prompts"):
        collate([one, three])
    with pytest.raises(ValueError, match=r"further has an image of shape \(3, 4, 4\)"):
        replace(three, further=(torch.zeros(3, 4, 4),))
