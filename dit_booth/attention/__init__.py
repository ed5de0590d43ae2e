"""Cross-frame attention: one exact joint softmax over a list of segments, on flash kernels, never concatenated."""

from dit_booth.attention.clip import Clip, FrameCache, FrameIndices
from dit_booth.attention.joint_softmax import Segment, attend
from dit_booth.attention.plans import FramePlan, Frames

__all__ = ["Clip", "FrameCache", "FrameIndices", "FramePlan", "Frames", "Segment", "attend"]
