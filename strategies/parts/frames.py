"""References as frames: the latents of all image prompts in the size of a video's frames."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def resized(frames: Tensor, like: Tensor) -> Tensor:
    """Return latents (b r c h w) in the size and dtype of the frames `like` (b f c h w)."""
    if frames.shape[-2:] != like.shape[-2:]:  # a square image prompt beside a wide video
        flat = rearrange(frames, "b r c h w -> (b r) c h w")
        flat = F.interpolate(flat, like.shape[-2:], mode="bilinear", antialias=True)
        frames = rearrange(flat, "(b r) c h w -> b r c h w", b=len(frames))
    return frames.to(like.dtype)
