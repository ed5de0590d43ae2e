"""Preprocessing of feature networks on tensors: resize, center crop, mean and standard deviation.

The originals read 8-bit files, and most resize them with PIL, which filters the width, rounds to 8 bits, then filters
the height. That is repeated here, so that sharp edges get PIL's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Rgb = tuple[float, float, float]

IMAGENET_MEAN: Rgb = (0.485, 0.456, 0.406)
IMAGENET_STD: Rgb = (0.229, 0.224, 0.225)
CLIP_MEAN: Rgb = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Rgb = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize the shorter side to `resize`, crop `crop` pixels at the center, normalize.

    Attributes:
        resize: length of the shorter side; `squash`: of both sides.
        crop: side of the square; None: the whole picture.
        mode: interpolation.
        antialias: True: as PIL resizes; False: as torchvision resizes float tensors, without antialiasing or rounding.
        mean, std: of colors in [0, 1].
    """

    resize: int
    crop: int | None
    mode: Literal["bicubic", "bilinear"] = "bicubic"
    antialias: bool = True
    squash: bool = False
    mean: Rgb = IMAGENET_MEAN
    std: Rgb = IMAGENET_STD

    def __call__(self, pictures: Tensor) -> Tensor:
        """Prepare pictures (n 3 h w, [-1, 1]) for a network: n 3 crop crop, float32."""
        values = _to_8_bits((pictures.float() + 1) / 2)
        size = self._size(*values.shape[-2:])
        if size != tuple(values.shape[-2:]):
            values = (
                self._resize_as_pil(values, size)
                if self.antialias
                else F.interpolate(values, size, mode=self.mode)
            )
        values = self._crop(values)
        mean, std = (rearrange(values.new_tensor(x), "c -> c 1 1") for x in (self.mean, self.std))
        return (values - mean) / std

    def _resize_as_pil(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        for stop in ((values.shape[-2], size[1]), size):
            values = _to_8_bits(F.interpolate(values, stop, mode=self.mode, antialias=True))
        return values

    def _size(self, height: int, width: int) -> tuple[int, int]:
        if self.squash:
            return self.resize, self.resize
        short = min(height, width)
        return self.resize * height // short, self.resize * width // short

    def _crop(self, values: Tensor) -> Tensor:
        if self.crop is None:
            return values
        top, left = (round((side - self.crop) / 2) for side in values.shape[-2:])
        return values[..., top : top + self.crop, left : left + self.crop]


def _to_8_bits(values: Tensor) -> Tensor:
    """Round values in [0, 1] to multiples of 1/255, as a file stores them; values beyond are clamped."""
    return (values.clamp(0, 1) * 255).round() / 255


def clip_preprocessing(
    size: int, *, mean: Rgb = CLIP_MEAN, std: Rgb = CLIP_STD, squash: bool = False
) -> Preprocessing:
    """Return CLIP's preprocessing (openai/CLIP, `_transform`): bicubic to `size`, center crop, CLIP's statistics."""
    return Preprocessing(resize=size, crop=size, squash=squash, mean=mean, std=std)


DINO = Preprocessing(resize=256, crop=224)
"""DINO and DINOv2 (their k-NN and linear evaluations): bicubic to 256, center crop 224."""
LITE0 = Preprocessing(resize=256, crop=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
"""EfficientNet-Lite0 (tensorflow/tpu, efficientnet/lite): crop 224/256 of the shorter side, bicubic, (x - 127) / 128.

The original crops, then resizes; resizing first differs at the border by rounding only.
"""
VBENCH_DINO = Preprocessing(resize=224, crop=None, mode="bilinear", antialias=False)
"""VBench's `dino_transform`: bilinear to 224 without antialiasing, no crop."""
VBENCH_CLIP = Preprocessing(resize=224, crop=224, antialias=False, mean=CLIP_MEAN, std=CLIP_STD)
"""VBench's `clip_transform`: bicubic to 224 without antialiasing, center crop."""
