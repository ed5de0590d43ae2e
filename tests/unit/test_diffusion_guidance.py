"""Classifier-free guidance, over all channels or the first few."""

from __future__ import annotations

import pytest
import torch

from dit_booth.diffusion import GuidanceConfig, guide, randn


def test_guidance_covers_all_channels_unless_told_otherwise() -> None:
    generator = torch.Generator().manual_seed(1)
    cond, uncond = randn((2, 3, 4, 5, 5), generator), randn((2, 3, 4, 5, 5), generator)  # b f c h w
    full = guide(cond, uncond, 4.0)
    torch.testing.assert_close(full, uncond + 4 * (cond - uncond))
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 0.0), uncond)
    released = guide(cond, uncond, 4.0, channels=3)
    assert torch.equal(released[:, :, :3], full[:, :, :3])
    assert torch.equal(released[:, :, 3], cond[:, :, 3])
    assert torch.equal(guide(cond, uncond, 4.0, channels=slice(0, 3)), released)
    assert torch.equal(guide(cond, uncond, 4.0, channels=4), full)


def test_guidance_refuses_what_does_not_fit() -> None:
    x = torch.zeros(1, 2, 4, 3, 3)
    with pytest.raises(ValueError, match="equal shapes"):
        guide(x, x[:, :1], 4.0)
    with pytest.raises(ValueError, match="channels=5: the prediction has 4"):
        guide(x, x, 4.0, channels=5)
    with pytest.raises(ValueError, match="channels is 0"):
        GuidanceConfig(channels=0)
