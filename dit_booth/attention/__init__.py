"""Cross-frame attention: one exact joint softmax over a list of segments, on flash kernels, never concatenated."""

from dit_booth.attention.plans import FramePlan, Frames
from dit_booth.attention.segments import Segment, attend

__all__ = ["FramePlan", "Frames", "Segment", "attend"]
