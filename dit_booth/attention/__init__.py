"""Cross-frame attention: one exact joint softmax over a list of segments, on flash kernels, never concatenated."""

from dit_booth.attention.clip import Clip, FrameCache, FrameIndices, PrefixCache, Riflex
from dit_booth.attention.joint_softmax import Segment, attend
from dit_booth.attention.plans import FramePlan, Frames
from dit_booth.attention.window_fusion import WindowFusion, attend_in_windows

__all__ = [
    "Clip",
    "FrameCache",
    "FrameIndices",
    "FramePlan",
    "Frames",
    "PrefixCache",
    "Riflex",
    "Segment",
    "WindowFusion",
    "attend",
    "attend_in_windows",
]
