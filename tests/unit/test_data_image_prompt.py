"""The image prompt: what is cut, what is white, and what training varies."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_booth.data.image_prompt import (
    Augment,
    load_image_prompt,
    pixel_box,
    prepare,
    read_mask,
)

torch.set_num_threads(1)

RED, BLUE = (200, 30, 40), (20, 40, 220)
PANDA = Path(__file__).parents[3] / "shared" / "data" / "image_prompts" / "panda"


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A red disc of radius 10 at (x 30, y 20) on blue, 40 high and 60 wide, and its mask."""
    y, x = np.mgrid[:40, :60]
    mask = (x - 30) ** 2 + (y - 20) ** 2 < 100
    return np.where(mask[..., None], np.uint8(RED), np.uint8(BLUE)), mask


def is_colour(image: torch.Tensor, rgb: tuple[int, int, int]) -> torch.Tensor:
    return (image - (torch.tensor(rgb) / 127.5 - 1).view(3, 1, 1)).abs().amax(dim=0) < 0.02


def write_folder(folder: Path, *, foreground: int = 255, mode: str = "L") -> Path:
    image, mask = scene()
    folder.mkdir(exist_ok=True)
    # PNG content under the usual name: the test compares exact colours.
    Image.fromarray(image).save(folder / "image.jpg", format="PNG")
    Image.fromarray((mask * foreground).astype(np.uint8)).convert(mode).save(folder / "mask_1.png")
    entries = [
        {"value": 0, "label": "background"},
        {"value": 1, "label": "disc", "logit": 0.8, "box": [20.4, 10.2, 40.7, 30.9]},
    ]
    (folder / "mask.json").write_text(json.dumps(entries))
    return folder


def test_the_subject_fills_a_white_square():
    image, mask = scene()
    prompt = prepare(image, size=64, mask=mask)
    assert prompt.shape == (3, 64, 64) and prompt.dtype == torch.float32
    assert is_colour(prompt, RED)[20:44, 20:44].all()
    assert (prompt[:, [0, 0, -1, -1], [0, -1, 0, -1]] > 0.98).all()  # the corners
    assert not is_colour(prompt, BLUE).any()
    assert is_colour(prompt, RED).float().mean() == pytest.approx(np.pi / 4, abs=0.08)


def test_without_a_mask_the_image_is_padded_to_a_square():
    image = np.full((20, 40, 3), RED, np.uint8)
    prompt = prepare(image, size=40)
    assert (prompt[:, :9] > 0.99).all() and (prompt[:, 31:] > 0.99).all()
    assert is_colour(prompt, RED)[12:28].all()


def test_the_given_box_cuts_and_the_mask_box_is_the_default():
    image, mask = scene()
    # The right half of the disc is 10 wide and 20 high: a half disc between white margins.
    half = prepare(image, size=40, mask=mask, box=(30, 10, 40, 30))
    assert (half[:, :, :9] > 0.95).all() and (half[:, :, 32:] > 0.95).all()
    assert is_colour(half, RED)[20, 13:26].all()
    assert pixel_box(None, mask, height=40, width=60) == (21, 11, 40, 30)
    assert pixel_box((-0.6, 0, 60.9, 40), mask, height=40, width=60) == (0, 0, 60, 40)
    assert pixel_box((3.8, 9.9, 41.2, 20.0), mask, height=40, width=60) == (3, 9, 42, 20)


@pytest.mark.parametrize(("foreground", "mode"), [(1, "L"), (255, "L"), (255, "1"), (7, "L"), (1, "P")])
def test_a_folder_is_read_whatever_the_foreground_value(tmp_path: Path, foreground, mode):
    prompt = load_image_prompt(write_folder(tmp_path / "a", foreground=foreground, mode=mode), size=32)
    image, mask = scene()
    assert torch.equal(prompt, prepare(image, size=32, mask=mask, box=(20.4, 10.2, 40.7, 30.9)))


def test_a_bare_image_is_taken_as_it_is(tmp_path: Path):
    image, _ = scene()
    Image.fromarray(image).save(tmp_path / "image.png")
    assert torch.equal(load_image_prompt(tmp_path / "image.png", size=32), prepare(image, size=32))
    assert torch.equal(load_image_prompt(tmp_path, size=32), prepare(image, size=32))


def test_the_best_entry_is_the_subject(tmp_path: Path):
    folder = write_folder(tmp_path / "a")
    entries = json.loads((folder / "mask.json").read_text())
    worse = {"value": 2, "label": "dust", "logit": 0.1, "box": [0, 0, 5, 5]}
    (folder / "mask.json").write_text(json.dumps([worse, *entries]))
    assert is_colour(load_image_prompt(folder, size=32), RED).any()


def test_a_mask_of_equal_proportions_is_resized(tmp_path: Path):
    _, mask = scene()
    small = Image.fromarray(mask).resize((30, 20))
    small.save(tmp_path / "mask.png")
    large = read_mask(tmp_path / "mask.png", height=40, width=60)
    assert large.shape == mask.shape and (large != mask).mean() < 0.03


def test_an_upright_image_is_read_from_a_turned_camera(tmp_path: Path):
    image = np.zeros((20, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif)
    prompt = load_image_prompt(tmp_path / "a.jpg", size=40)
    assert (prompt[:, :, 0] > 0.99).all() and (prompt[:, 0, 15:25] < -0.9).all()  # tall, with white beside it


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), degrees=st.floats(0, 45), trim=st.floats(0.01, 0.5), flip=st.booleans())
def test_variation_is_seeded_and_shows_only_subject_and_white(seed, degrees, trim, flip):
    image, mask = scene()
    augment = Augment(flip=flip, degrees=degrees, trim=trim)
    a, b = (
        prepare(image, size=32, mask=mask, augment=augment, rng=np.random.default_rng(seed)) for _ in range(2)
    )
    assert torch.equal(a, b)
    assert not is_colour(a, BLUE).any()
    # The red channel of every blend of red and white exceeds red's own; blue would pull it down.
    assert a[0].min() > RED[0] / 127.5 - 1 - 0.1


def rotated(degrees: float, seeds: int = 30) -> list[torch.Tensor]:
    image = np.full((40, 40, 3), RED, np.uint8)
    image[:, :20] = BLUE
    augment = Augment(flip=False, degrees=degrees, trim=0)
    return [
        prepare(image, size=40, augment=augment, rng=np.random.default_rng(seed)) for seed in range(seeds)
    ]


def test_rotation_keeps_to_its_bounds_and_fills_with_white():
    assert all(torch.equal(image, rotated(0, 1)[0]) for image in rotated(0, 3))
    for image in rotated(30):
        # Halfway up the right edge red stays red for every angle up to 30 degrees; the corners turn white.
        assert is_colour(image, RED)[20, 34] and is_colour(image, BLUE)[20, 5]
    corners = torch.stack([image[:, 0, 0] for image in rotated(30)])
    assert ((corners > 0.95).all(dim=1)).any()


def test_flip_happens_about_half_of_the_time():
    image = np.full((16, 16, 3), RED, np.uint8)
    image[:, :8] = BLUE
    augment = Augment(degrees=0, trim=0)
    flipped = [
        bool(is_colour(prepare(image, size=16, augment=augment, rng=np.random.default_rng(seed)), RED)[8, 2])
        for seed in range(200)
    ]
    assert 0.4 < np.mean(flipped) < 0.6


def test_trim_cuts_one_side_by_no_more_than_it_may():
    image = np.full((100, 100, 3), RED, np.uint8)
    augment = Augment(flip=False, degrees=0, trim=0.2)
    shares = []
    for seed in range(60):
        prompt = prepare(image, size=100, augment=augment, rng=np.random.default_rng(seed))
        shares.append(1 - float(is_colour(prompt, RED).float().mean()))  # what was cut is padded with white
    assert 0 < min(shares) < 0.05 and 0.15 < max(shares) <= 0.23


def test_variation_needs_its_random_numbers():
    image, _ = scene()
    with pytest.raises(ValueError, match="augment and rng belong together"):
        prepare(image, size=8, augment=Augment())
    with pytest.raises(ValueError, match=r"augment.trim is 2"):
        Augment(trim=2)
    with pytest.raises(ValueError, match=r"augment.degrees is 200"):
        Augment(degrees=200)


@pytest.mark.skipif(not PANDA.is_dir(), reason="the shared data is not on this machine")
def test_the_panda_is_cut_out():
    prompt = load_image_prompt(PANDA, size=64)
    white = (prompt > 0.97).all(dim=0)
    assert 0.3 < white.float().mean() < 0.7
    assert white[:, :2].float().mean() > 0.5 and not white[34, 40]
