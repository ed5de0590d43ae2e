"""A procedural data set of moving shapes with known ground truth."""

from dit_booth.data.toyworld.dataset import Describe, Scene, Toyworld, ToyworldConfig
from dit_booth.data.toyworld.long import LongIdentity, as_identity, is_long
from dit_booth.data.toyworld.looks import Split
from dit_booth.data.toyworld.world import Identity, another_scene, caption, render_video

__all__ = [
    "Describe",
    "Identity",
    "LongIdentity",
    "Scene",
    "Split",
    "Toyworld",
    "ToyworldConfig",
    "another_scene",
    "as_identity",
    "caption",
    "is_long",
    "render_video",
]
