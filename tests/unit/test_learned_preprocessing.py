"""Preprocessing agrees with the transforms of the original networks, on photographs."""

import numpy as np
import pytest
import skimage.data
import timm
import torch
from open_clip.transform import image_transform
from PIL import Image
from torchvision import transforms as T

from dit_booth.evaluation.learned.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    DINO,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LITE0,
    VBENCH_CLIP,
    VBENCH_DINO,
    Preprocessing,
    clip_preprocessing,
)

torch.set_num_threads(1)
BICUBIC = T.InterpolationMode.BICUBIC
PHOTOGRAPHS = {
    name: getattr(skimage.data, name)()[:, : 451 if name == "rocket" else None]
    for name in ("chelsea", "coffee", "rocket")
}


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.fixture(params=PHOTOGRAPHS)
def pixels(request) -> np.ndarray:
    return PHOTOGRAPHS[request.param]


def test_dino_is_its_own_evaluation(pixels):
    original = T.Compose(
        [
            T.Resize(256, BICUBIC),
            T.CenterCrop(224),
            T.ToTensor(),
            T.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    assert_same(DINO(tensor(pixels))[0], original(Image.fromarray(pixels)))


def test_clip_is_open_clips_transform(pixels):
    original = image_transform(224, is_train=False, mean=CLIP_MEAN, std=CLIP_STD)
    assert_same(clip_preprocessing(224)(tensor(pixels))[0], original(Image.fromarray(pixels)))
    squash = image_transform(64, is_train=False, mean=CLIP_MEAN, std=CLIP_STD, resize_mode="squash")
    assert_same(clip_preprocessing(64, squash=True)(tensor(pixels))[0], squash(Image.fromarray(pixels)))


def test_lite0_is_timms_transform_with_the_originals_statistics(pixels):
    settings = timm.data.resolve_data_config({}, model=timm.create_model("tf_efficientnet_lite0"))
    original = timm.data.create_transform(**settings)
    half = Preprocessing(resize=256, crop=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    prepared = half(tensor(pixels))[0]
    assert_same(prepared, original(Image.fromarray(pixels)))
    in_bytes = ((prepared + 1) * 127.5).double()
    assert torch.allclose(LITE0(tensor(pixels))[0].double(), (in_bytes - 127) / 128, atol=1e-5)


def test_vbench_resizes_tensors_without_antialiasing(pixels):
    raw = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()  # as its load_video returns them
    scale = T.Lambda(lambda x: x.div(255))
    dino = T.Compose([T.Resize(224, antialias=False), scale, T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    clip = T.Compose(
        [T.Resize(224, BICUBIC, antialias=False), T.CenterCrop(224), scale, T.Normalize(CLIP_MEAN, CLIP_STD)]
    )
    for ours, original in ((VBENCH_DINO, dino), (VBENCH_CLIP, clip)):
        prepared = ours(tensor(pixels))
        assert prepared.shape == original(raw).shape
        assert torch.allclose(prepared, original(raw), atol=1e-5)


def assert_same(ours: torch.Tensor, original: torch.Tensor) -> None:
    """At most one step of 8 bits apart, and almost nowhere."""
    assert ours.shape == original.shape
    steps = (ours - original).abs() * 0.5 * 255  # no standard deviation is above 0.5
    assert float(steps.max()) < 2.3  # one step of 1/255 where the standard deviation is 0.225
    assert float((steps > 0.1).float().mean()) < 1e-3
