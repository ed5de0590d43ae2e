"""The toy world as a data set: every example is a pure function of `(seed, split, index)` and the kind of scene."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np

from dit_booth.data.example import Example
from dit_booth.data.toyworld.long import long_example, sample_long_identity
from dit_booth.data.toyworld.looks import Split, draw_looks
from dit_booth.data.toyworld.world import caption, render_prompt, render_video, sample_identity

Describe = Literal["none", "full", "mixed"]
Scene = Literal["short", "long"]


@dataclass(frozen=True, kw_only=True)
class ToyworldConfig:
    """The toy world's options.

    Attributes:
        frames: frames per video.
        size: side of the square video in pixels.
        image_size: side of the image prompt in pixels; None: that of the video.
        image_prompts: image prompts of an example; further ones are the first, turned by a right angle each.
        seed: seed of all examples.
        split: `train`, `dev` or `test`: disjoint combinations of shape, texture and colours (`looks.split_of`).
        length: number of examples; index `i` is the same example at every length.
        scene: `short`: one motion over the whole video; `long`: for 128 frames and more (`long.LongIdentity`).
        describe: looks of the subject in the caption: `none`, `full`, or `mixed` (colours and
            texture are each named with probability `describe_probability`).
        describe_probability: see `describe`.
    """

    frames: int = 8
    size: int = 32
    image_size: int | None = None
    image_prompts: int = 1
    seed: int = 0
    split: Split = "train"
    scene: Scene = "short"
    length: int = 1_000_000
    describe: Describe = "none"
    describe_probability: float = 0.5

    def __post_init__(self) -> None:
        image_size = self.size if self.image_size is None else self.image_size
        bounds = (("frames", self.frames, 1), ("size", self.size, 8), ("image_size", image_size, 8))
        counts = (("image_prompts", self.image_prompts, 1), ("length", self.length, 1))
        for name, value, low in (*bounds, ("seed", self.seed, 0), *counts):
            if value < low:
                raise ValueError(f"data.{name} is {value}; it must be at least {low}")
        words = (
            ("split", self.split, Split),
            ("toyworld.scene", self.scene, Scene),
            ("toyworld.describe", self.describe, Describe),
        )
        for name, word, choices in words:
            if word not in get_args(choices):
                raise ValueError(f"data.{name} is {word!r}; choose one of {', '.join(get_args(choices))}")
        if not 0 <= self.describe_probability <= 1:
            raise ValueError(
                f"data.toyworld.describe_probability is {self.describe_probability}; it must be in [0, 1]"
            )


class Toyworld:
    """The toy world as a data set of `Example`s."""

    def __init__(self, config: ToyworldConfig) -> None:
        self.config = config

    def __len__(self) -> int:
        return self.config.length

    def __getitem__(self, index: int) -> Example:
        """Example `index`, a pure function of `(seed, split, index)` and the sizes.

        Raises:
            IndexError: `index` is not in [0, length).
        """
        example = self._scene(index)
        turned = (example.image.rot90(turns, (-2, -1)) for turns in range(1, self.config.image_prompts))
        return replace(example, further=tuple(turned)) if self.config.image_prompts > 1 else example

    def _scene(self, index: int) -> Example:
        """Example `index` with one image prompt."""
        config = self.config
        if not 0 <= index < config.length:
            raise IndexError(f"index is {index}; the toy world holds 0 to {config.length - 1} (data.length)")
        place = (config.seed, get_args(Split).index(config.split), index)
        rng = np.random.default_rng(place if config.scene == "short" else (*place, 1))
        # Drawn first and always, so that the caption's options never change the scene.
        named = (
            rng.random(2) < {"none": 0.0, "full": 1.0, "mixed": config.describe_probability}[config.describe]
        )
        looks, image_size = draw_looks(rng, config.split, index), config.image_size or config.size
        key = f"{config.seed}/{config.split}/{index}"
        if config.scene == "long":
            long = sample_long_identity(rng, looks)
            shown = (bool(named[0]), bool(named[1]))
            return long_example(
                long,
                f"toyworld-long/{key}",
                shown,
                frames=config.frames,
                size=config.size,
                image_size=image_size,
            )
        identity = sample_identity(rng, looks)
        video, mask = render_video(identity, frames=config.frames, size=config.size)
        return Example(
            key=f"toyworld/{key}",
            video=video,
            caption=caption(identity, colours=bool(named[0]), texture=bool(named[1])),
            subject=identity.shape,
            image=render_prompt(identity, size=image_size),
            mask=mask,
            mask_frames=config.frames,
            identity=asdict(identity),
        )
