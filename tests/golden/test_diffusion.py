"""The released guidance, by the golden predictions. Schedule, noising, steps and loops: `diffusion_cases`."""

from __future__ import annotations

import torch
from files import load

from dit_booth.diffusion import guide

torch.set_num_threads(1)


def test_guidance_equals_the_released_code_on_three_of_four_channels() -> None:
    _, unet = load("videobooth_unet_l1")
    cond, uncond = unet["outputs.e_cond"], unet["outputs.e_uncond"]  # b c f h w
    ours = guide(cond, uncond, float(unet["inputs.e_cfg_scale"]), channels=3, axis=1)
    assert torch.equal(ours, unet["outputs.e_cfg"][:1])
    everywhere = guide(cond, uncond, float(unet["inputs.e_cfg_scale"]), axis=1)
    assert torch.equal(everywhere[:, :3], ours[:, :3])
    assert (everywhere[:, 3] - ours[:, 3]).abs().max() > 1
