"""Writes the manifests: names and shapes in the official files at full size, from diffusers' and transformers' classes.

    .venv/bin/python tests/contracts/manifests/make.py

One line is a name and its shape. On the meta device: no weights are needed, nothing is downloaded.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import official  # noqa: E402


def main() -> None:
    with torch.device("meta"):
        image = official.image_unet(**official.SD14_UNET).state_dict()
        clip = official.clip_model(official.VIT_L14_TEXT, official.VIT_L14_VISION, 768).state_dict()
        manifests = {
            "sd14_unet": image,
            "videobooth_unet": {
                **official.video_state(image),
                **official.watermark_state((320, 640, 640), layers=2, groups=32),
            },
            "videobooth_mapper": {
                **official.mapper_state(1024, 1024, 768),
                **official.text_kv(image),
                **official.frame_kv(image),
            },
            "clip_vit_l14": clip,
        }
    for name, state in manifests.items():
        lines = [f"{key} {'x'.join(map(str, tensor.shape))}" for key, tensor in sorted(state.items())]
        text = "\n".join(lines) + "\n"
        (HERE / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        count = sum(tensor.numel() for tensor in state.values())
        sys.stdout.write(f"{name}: {len(lines)} tensors, {count:,} parameters\n")


if __name__ == "__main__":
    main()
