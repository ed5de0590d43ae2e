"""The image prompt: what is cut, what is white, and what training varies."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_booth.data.image_files import read_mask
from dit_booth.data.image_prompt import Augment, as_image_prompt, load_image_prompt, pixel_box, prepare
from dit_booth.data.toyworld import Toyworld, ToyworldConfig

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


# Images from users


def kinds(folder: Path) -> dict[str, object]:
    """The scene in every accepted form of three channels."""
    pixels, _ = scene()
    image = Image.fromarray(pixels)
    image.save(folder / "image.png")
    channels_first = torch.from_numpy(pixels).movedim(-1, 0)
    return {
        "string": str(folder / "image.png"),
        "path": folder / "image.png",
        "folder": folder,
        "pil": image,
        "array": pixels,
        "mirrored view": np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        "float array": pixels / 255,
        "half array": (pixels / 255).astype(np.float32),
        "tensor": channels_first,
        "float tensor": (channels_first / 127.5 - 1).requires_grad_(),
    }


def masks(folder: Path) -> dict[str, object]:
    _, mask = scene()
    Image.fromarray((mask * 255).astype(np.uint8)).save(folder / "subject.png")
    return {
        "string": str(folder / "subject.png"),
        "path": folder / "subject.png",
        "pil": Image.fromarray(mask),
        "array": mask,
        "numbers": mask.astype(np.int64) * 7,
        "float array": mask.astype(np.float32),
        "tensor": torch.from_numpy(mask),
        "float tensor": torch.from_numpy(mask).bfloat16(),
    }


def test_every_kind_of_image_and_mask_gives_the_data_sets_prompt(tmp_path: Path):
    pixels, mask = scene()
    whole, cut = prepare(pixels, size=48), prepare(pixels, size=48, mask=mask)
    for name, image in kinds(tmp_path).items():
        prompt = as_image_prompt(image, size=48)
        assert prompt.dtype == torch.float32 and prompt.shape == (3, 48, 48) and not prompt.requires_grad
        torch.testing.assert_close(prompt, whole, atol=2e-6, rtol=0, msg=name)
        if "float" in name or "half" in name:
            continue
        assert torch.equal(prompt, whole), name
        if name != "folder":
            for other, given_mask in masks(tmp_path).items():
                assert torch.equal(as_image_prompt(image, size=48, mask=given_mask), cut), (name, other)


def test_the_transparent_part_of_an_image_is_cut_away(tmp_path: Path):
    pixels, mask = scene()
    alpha = np.where(mask, np.uint8(255), np.uint8(0))
    image = np.concatenate([pixels, alpha[..., None]], axis=2)
    Image.fromarray(image).save(tmp_path / "image.png")
    expected = prepare(pixels, size=48, mask=mask)
    for given_image in (
        tmp_path / "image.png",
        Image.fromarray(image),
        image,
        torch.from_numpy(image).movedim(-1, 0),
    ):
        assert torch.equal(as_image_prompt(given_image, size=48), expected)
    torch.testing.assert_close(as_image_prompt(image / 255, size=48), expected, atol=2e-6, rtol=0)
    image[..., 3] = 255
    assert torch.equal(as_image_prompt(image, size=48), prepare(pixels, size=48))
    upper = mask & (np.arange(40)[:, None] < 20)
    image[..., 3] = alpha
    half = np.arange(40)[:, None] * np.ones((1, 60)) < 20
    assert torch.equal(as_image_prompt(image, size=48, mask=half), prepare(pixels, size=48, mask=upper))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "PA"])
def test_an_image_without_three_channels_is_shown_as_it_looks(mode: str):
    grey = Image.fromarray(scene()[0]).convert("L").point(lambda value: 255 * (value > 60)).convert(mode)
    pixels = np.array(grey.convert("RGB"))
    assert torch.equal(as_image_prompt(grey, size=32), prepare(pixels, size=32))
    assert torch.equal(as_image_prompt(pixels[..., 0], size=32), prepare(pixels, size=32))


def test_a_prompt_passes_through_unchanged():
    image = Toyworld(ToyworldConfig(size=32, frames=1))[0].image
    assert torch.equal(as_image_prompt(image, size=32), image)


def test_a_photograph_is_upright_and_its_mask_too(tmp_path: Path):
    pixels, mask = scene()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to show it
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.ascontiguousarray(np.rot90(pixels, -1))
    assert torch.equal(as_image_prompt(tmp_path / "a.png", size=48), prepare(upright, size=48))
    cut = prepare(upright, size=48, mask=np.ascontiguousarray(np.rot90(mask, -1)))
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(as_image_prompt(image, size=48, mask=np.rot90(mask, -1)), cut)


def test_a_folder_keeps_its_mask_and_takes_no_other(tmp_path: Path):
    folder = write_folder(tmp_path / "a")
    assert torch.equal(as_image_prompt(str(folder), size=32), load_image_prompt(folder, size=32))
    with pytest.raises(ValueError, match="mask is given with the folder"):
        as_image_prompt(folder, size=32, mask=scene()[1])


NAN = float("nan")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\).*\(h w 4\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\).*not empty"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"shape \(1, 4, 4, 3\)"),
        (np.zeros((4, 4, 3), np.int64), "int64.*uint8"),
        (np.zeros((4, 4), bool), "bool.*uint8"),
        (np.full((4, 4, 3), 200.0), r"spans \[200, 200\].*divide by 255"),
        (np.full((4, 4, 3), -0.5), r"spans \[-0.5, -0.5\].*\[0, 1\]"),
        (np.full((4, 4, 3), NAN), r"spans \[nan, nan\]"),
        (np.zeros((4, 4, 4), np.uint8), "image is transparent"),
        (torch.zeros(4, 4, 3), r"shape \(4, 4, 3\).*with floats"),
        (torch.zeros(1, 3, 4, 4), r"shape \(1, 3, 4, 4\).*one image of a batch"),
        (torch.zeros(4, 4), r"shape \(4, 4\).*\(3 h w\)"),
        (torch.zeros(3, 0, 4), "not empty"),
        (torch.zeros(4, 8, 8), "alpha as `mask`"),
        (torch.zeros(3, 4, 4, dtype=torch.int32), "torch.int32"),
        (torch.full((3, 4, 4), 2.0), r"spans \[2, 2\].*\[-1, 1\]"),
        (torch.full((3, 4, 4), NAN), r"spans \[nan, nan\]"),
        (Image.new("CMYK", (4, 4)), "mode CMYK.*RGB"),
        (Image.new("I", (4, 4)), "mode I .*RGB"),
        (Image.new("RGB", (0, 4)), r"size \(0, 4\).*not be empty"),
        ("none.png", "none.png: no such file"),
        (b"bytes", "image is a bytes"),
    ],
)
def test_an_image_that_cannot_be_one(image, message):
    with pytest.raises(ValueError, match=message):
        as_image_prompt(image, size=8)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((40, 60)), "mask is empty"),
        (np.zeros((40, 60), bool), "mask is empty"),
        (np.ones((60, 40)), r"mask has shape \(60, 40\).*\(40, 60\)"),
        (np.ones((40, 60, 1)), r"mask has shape \(40, 60, 1\)"),
        (torch.ones(1, 40, 60), r"mask has shape \(1, 40, 60\)"),
        (np.full((40, 60), NAN), "mask holds NaN"),
        (np.full((40, 60), "x"), "mask is <U1"),
        (Image.new("RGB", (60, 40)), "mask has mode RGB"),
        (Image.new("L", (50, 50), 255), r"mask has shape \(50, 50\)"),
        ("none.png", "none.png: no such file"),
        ([[1]], "mask is list"),
    ],
)
def test_a_mask_that_does_not_fit(mask, message):
    with pytest.raises(ValueError, match=message):
        as_image_prompt(scene()[0], size=8, mask=mask)


def test_what_else_an_image_prompt_refuses(tmp_path: Path):
    pixels, mask = scene()
    with pytest.raises(ValueError, match="size is 0"):
        as_image_prompt(pixels, size=0)
    transparent = np.concatenate([pixels, np.where(mask, 0, 255)[..., None].astype(np.uint8)], axis=2)
    with pytest.raises(ValueError, match="mask is empty where the image is opaque"):
        as_image_prompt(transparent, size=8, mask=mask)
    (tmp_path / "junk.png").write_bytes(b"junk")
    for changes in ({"image": tmp_path / "junk.png"}, {"mask": tmp_path / "junk.png"}):
        with pytest.raises(ValueError, match=r"junk.png: not a readable image"):
            as_image_prompt(**{"image": pixels, "mask": mask, "size": 8, **changes})
