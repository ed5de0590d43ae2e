"""A procedural data set of moving shapes with known ground truth."""

from dit_booth.data.toyworld.looks import Split
from dit_booth.data.toyworld.world import (
    Describe,
    Identity,
    Toyworld,
    ToyworldConfig,
    another_scene,
    caption,
    render_video,
)

__all__ = [
    "Describe",
    "Identity",
    "Split",
    "Toyworld",
    "ToyworldConfig",
    "another_scene",
    "caption",
    "render_video",
]
