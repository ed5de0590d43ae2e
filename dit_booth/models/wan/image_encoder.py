"""The image encoder of Wan's image-to-video weights: CLIP's vision tower (transformers), one layer before the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dit_booth.models.weights import Shards, read_json

ENCODER, PROCESSOR = "image_encoder", "image_processor"
"""Folders of a pipeline that hold the encoder, and how images are prepared for it."""

PROJECTION = "visual_projection.weight"
"""Of a vision tower that was saved with its projection, which no state goes through."""


class WanImageEncoder(nn.Module):
    """Images (b 3 h w, [-1, 1]) -> states (b m e), as diffusers' WanImageToVideoPipeline feeds them; frozen."""

    def __init__(self, folder: str, width: int) -> None:
        """folder: has `ENCODER` and `PROCESSOR`. width: of the states. ValueError: they are missing, or do not fit."""
        super().__init__()
        path = find_image_encoder(folder, width)
        from transformers import CLIPImageProcessor, CLIPVisionModel

        vision: Any = CLIPVisionModel
        options = {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
        try:
            self.processor = CLIPImageProcessor.from_pretrained(str(path / PROCESSOR), local_files_only=True)
            encoder, found = vision.from_pretrained(str(path / ENCODER), output_loading_info=True, **options)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{path / ENCODER} could not be loaded: {error}; copy the folder again"
            ) from error
        found["unexpected_keys"] = set(found["unexpected_keys"]) - {PROJECTION}
        wrong = {name: sorted(map(str, keys))[:8] for name, keys in found.items() if keys}
        if wrong:
            raise ValueError(
                f"{path / ENCODER}: the weights do not fit CLIPVisionModel: {wrong}; copy them again"
            )
        self.encoder: nn.Module = encoder.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> WanImageEncoder:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Encode images; the processor resizes, crops and scales them, from whole steps of 1/255 as pictures have."""
        pixels = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        given = self.processor(images=list(pixels), return_tensors="pt").pixel_values
        states: Tensor = self.encoder(given.to(images.device), output_hidden_states=True).hidden_states[-2]
        return states


def find_image_encoder(folder: str, width: int) -> Path:
    """Return the folder of an image encoder. ValueError: there is none, it is another model, or a shard is missing."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "image-to-video weights need the package transformers: pip install 'dit-booth[wan]'"
        ) from error
    path = Path(folder).expanduser()
    for name in (f"{ENCODER}/config.json", f"{PROCESSOR}/preprocessor_config.json"):
        if not folder or not (path / name).is_file():
            raise ValueError(
                f"wan.image_dim is {width}: the weights read states of an image encoder, but wan.image_encoder is"
                f" {folder!r}, which has no {name}; give the folder of the image-to-video pipeline"
            )
    found = read_json(path / ENCODER / "config.json")
    kind, size = found.get("model_type"), found.get("hidden_size")
    if kind != "clip_vision_model" or size != width:
        raise ValueError(
            f"{path / ENCODER} holds {kind} of width {size}, not a clip_vision_model of width {width} (wan.image_dim);"
            " give the folder of the pipeline that the weights belong to"
        )
    Shards.find(path / ENCODER, "model")
    return path
