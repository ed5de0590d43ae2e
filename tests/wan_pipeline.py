"""A tiny Wan 2.1 pipeline with random weights, by diffusers' and transformers' own classes, and its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import official
import torch

WORDS = ["a", "red", "polar", "bear", "dog", "runs", "on", "the", "grass", "box", "number", "None"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'&"
TEXT = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.1}
VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 2],
    "num_res_blocks": 1,
    "latents_mean": [-0.2, 0.1, 0.0, 0.3],
    "latents_std": [0.5, 1.5, 2.0, 0.8],
}
VISION = {
    "hidden_size": 20,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE_TO_VIDEO = {"image_dim": 20, "added_kv_proj_dim": 32, "in_channels": 12}
"""Of the network: the encoder's width, and 4 channels of a mask and 4 of latents behind the video's 4."""


def tokenizer() -> Any:
    """A tokenizer of umT5's class and pieces: whole words, else letters, of which the first has the word's mark."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"▁{word}", -2.0) for word in WORDS]
    letters = [(piece, -8.0) for letter in LETTERS for piece in (letter, f"▁{letter}")]
    return T5Tokenizer(vocab=[*special, ("▁", -9.0), *words, *letters], extra_ids=0)


def text_encoder() -> Any:
    """umT5's encoder, of two layers."""
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(1)
    return UMT5EncoderModel(UMT5Config(vocab_size=128, **TEXT)).eval()


def autoencoder(**options: Any) -> Any:
    """Wan's autoencoder: 4 frames and 8 x 8 pixels to a latent."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(2)
    return AutoencoderKLWan(**{**VAE, **options}).eval()


def image_encoder() -> Any:
    """CLIP's vision tower, of three layers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(3)
    return CLIPVisionModel(CLIPVisionConfig(**VISION)).eval()


def pipeline(scheduler: str = "UniPCMultistepScheduler", shift: float = 3.0, *, image: bool = False) -> Any:
    """diffusers' pipeline of the tiny parts, text to video, or image to video."""
    import diffusers
    from transformers import CLIPImageProcessor

    options = {
        "UniPCMultistepScheduler": {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": shift,
        },
        "FlowMatchEulerDiscreteScheduler": {"shift": shift},
    }
    parts = {
        "tokenizer": tokenizer(),
        "text_encoder": text_encoder(),
        "vae": autoencoder(),
        "scheduler": getattr(diffusers, scheduler)(**options[scheduler]),
        "transformer": official.randomised(official.wan(**(IMAGE_TO_VIDEO if image else {}))).eval(),
    }
    if not image:
        return diffusers.WanPipeline(**parts)
    side = VISION["image_size"]
    parts["image_processor"] = CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)
    return diffusers.WanImageToVideoPipeline(**parts, image_encoder=image_encoder())


def write(folder: Path, **options: Any) -> Any:
    """Save a pipeline, and return it."""
    made = pipeline(**options)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made
