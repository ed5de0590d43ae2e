"""Cross-frame attention: one exact joint softmax over a list of segments, on flash kernels, never concatenated."""

from dit_booth.attention.joint_softmax import Segment, attend
from dit_booth.attention.plans import FramePlan, Frames

__all__ = ["FramePlan", "Frames", "Segment", "attend"]
