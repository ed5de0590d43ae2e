"""Tiny files in the official formats: Stable Diffusion 1.x (diffusers), VideoBooth, ELITE, CLIP (transformers).

Names and shapes come from diffusers' and transformers' own classes, and, for what VideoBooth adds, from the rules that
its released code follows; nothing is taken from this project's models. With sizes of Stable Diffusion 1.4 and on the
meta device the same functions make the manifests of ``tests/contracts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 128,
}
TINY_WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "ffn_dim": 40,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
}
_WAN_HEADS = {"attention_head_dim": 128, "in_channels": 16, "out_channels": 16, "text_dim": 4096}
_WAN_14B = {**_WAN_HEADS, "num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
RELEASED_WAN: dict[str, dict[str, Any]] = {
    "wan_1.3b": {**_WAN_HEADS, "num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "wan_14b": _WAN_14B,
    "wan_14b_image": {**_WAN_14B, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
}
TINY_TEXT = {
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "bos_token_id": 2046,
    "eos_token_id": 2047,
}
TINY_VISION = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 4,
}
SD14_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}  # the rest is diffusers' default
VIT_L14_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
VIT_L14_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}


def randomised(module: nn.Module, seed: int = 0, size: float = 0.1) -> Any:
    """Nothing at zero or one: initial biases and norms would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module.eval()


def random_like(shapes: Mapping[str, Tensor], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in shapes.items()}


# ---- models ----


def wan(**more: Any) -> nn.Module:
    """diffusers' Wan, tiny by default."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**{**TINY_WAN, **more}).eval()


ORIGINAL_WAN = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
    ("condition_embedder.image_embedder.ff.net.0.proj.", "img_emb.proj.1."),
    ("condition_embedder.image_embedder.ff.net.2.", "img_emb.proj.3."),
    ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
    (".norm2.", ".norm3."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    (".to_out.0.", ".o."),
    (".add_k_proj.", ".k_img."),
    (".add_v_proj.", ".v_img."),
    (".norm_added_k.", ".norm_k_img."),
    ("proj_out.", "head.head."),
    (".scale_shift_table", ".modulation"),
)
"""Parts of diffusers' names of Wan, and the original's."""


def original_wan(state: Mapping[str, Tensor]) -> State:
    """Wan's tensors under the names of the original repository."""
    out: State = {}
    for name, tensor in state.items():
        old = "head.modulation" if name == "scale_shift_table" else name
        for theirs, original in ORIGINAL_WAN:
            old = old.replace(theirs, original)
        out[old] = tensor
    return out


def image_unet(**sizes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**(sizes or TINY_UNET))


def clip_model(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, width: int = 128
) -> Any:
    """transformers' CLIPModel, by default of our tiny CLIP's sizes."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(
        CLIPConfig(text_config=text or TINY_TEXT, vision_config=vision or TINY_VISION, projection_dim=width)
    )


# ---- what VideoBooth adds ----


def video_state(image: Mapping[str, Tensor]) -> State:
    """The inflated U-Net: attention over time beside each cross-frame attention, of its shapes, with a norm."""
    new = {
        name.replace(".attn1.", ".attn_temp.").replace(".norm1.", ".norm_temp."): tensor
        for name, tensor in image.items()
        if ".transformer_blocks." in name and (".attn1." in name or ".norm1." in name)
    }
    return {**image, **new}


def watermark_state(widths: tuple[int, int, int], layers: int, groups: int) -> State:
    """A small U-Net of diffusers' own blocks without attention, and a 1x1 convolution."""
    from diffusers.models.unets.unet_2d_blocks import DownBlock2D, UpBlock2D

    common = {"temb_channels": 4 * widths[0], "resnet_groups": groups}
    down = [
        DownBlock2D(widths[max(i - 1, 0)], width, num_layers=layers, add_downsample=i < 2, **common)
        for i, width in enumerate(widths)
    ]
    top = widths[::-1]
    up = [
        UpBlock2D(
            top[min(i + 1, 2)], top[max(i - 1, 0)], width, num_layers=layers + 1, add_upsample=i < 2, **common
        )
        for i, width in enumerate(top)
    ]
    module = nn.ModuleDict(
        {
            "watermark_down_blocks": nn.ModuleList(down),
            "watermark_up_blocks": nn.ModuleList(up),
            "watermark_zero_out": nn.Conv2d(widths[0], widths[0], 1),
        }
    )
    return module.state_dict()


def text_kv(image: Mapping[str, Tensor]) -> State:
    """Of the mapper's file: K and V of every text attention, under flattened names (ELITE's and the coarse stage's)."""
    return {
        f"{site.replace('.', '_')}_{letter}.weight": tensor
        for site, letter, tensor in _projections(image)
        if site.endswith("attn2")
    }


def frame_kv(image: Mapping[str, Tensor]) -> State:
    """Of the mapper's file: the fine stage's four projections of every cross-frame attention."""
    return {
        f"{site.replace('.', '_')}_{letter}_{kind}.weight": tensor
        for kind in ("exemplar", "new")
        for site, letter, tensor in _projections(image)
        if site.endswith("attn1")
    }


def taps_in_unet(image: Mapping[str, Tensor]) -> State:
    """The same projections in the U-Net's own tree."""
    kinds = {"attn1": ("exemplar", "new"), "attn2": ("global",)}
    return {
        f"{site}.{letter}_{kind}.weight": tensor
        for site, letter, tensor in _projections(image)
        for kind in kinds[site.rpartition(".")[2]]
    }


def _projections(image: Mapping[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    split = [(*name.removesuffix(".weight").rpartition(".")[::2], tensor) for name, tensor in image.items()]
    return [(site, leaf, tensor) for site, leaf, tensor in split if leaf in ("to_k", "to_v")]


def mapper_state(image_dim: int, width: int, text_dim: int) -> State:
    """Ten MLPs: for each of five layers one of the class token and one of the patches."""

    def mlp() -> nn.Module:
        hidden = [nn.Linear(image_dim, width), nn.LayerNorm(width), nn.LeakyReLU()]
        more = [nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(), nn.Linear(width, text_dim)]
        return nn.Sequential(*hidden, *more)

    names = [f"mapping_{kind}{i}" for i in range(5) for kind in ("", "patch_")]
    return nn.ModuleDict({name: mlp() for name in names}).state_dict()


# ---- files ----


def write_sd(folder: Path, *, safetensors: bool = True, seed: int = 0) -> Any:
    """A Stable Diffusion 1.x pipeline's folder with unet, vae and text_encoder; the U-Net."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = randomised(image_unet(), seed)
    unet.save_pretrained(folder / "unet", safe_serialization=safetensors)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **blocks
    )
    randomised(vae, seed + 1, 0.02).save_pretrained(folder / "vae")
    text = CLIPTextModel(CLIPTextConfig(**TINY_TEXT))
    write_transformers(folder / "text_encoder", randomised(text, seed + 2), "text_model.", safetensors)
    return unet


def write_transformers(folder: Path, model: Any, prefix: str, safetensors: bool = True) -> None:
    """As transformers 4 wrote it: every name under its model's prefix, and position_ids stored."""
    from safetensors.torch import save_file

    model.config.save_pretrained(folder)
    state = {f"{prefix}{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in [name for name in state if name.endswith("position_embedding.weight")]:
        ids = name.replace("position_embedding.weight", "position_ids")
        state[ids] = torch.arange(len(state[name])).unsqueeze(0)
    if safetensors:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")


def write_videobooth(folder: Path, *, seed: int = 0) -> tuple[Path, Path]:
    """``watermark_remove_module.pt`` (key ema_unet) and ``mapper.pt`` (keys model, ema), of one tiny model."""
    image = image_unet().state_dict()
    widths = TINY_UNET["block_out_channels"]
    watermark = watermark_state(
        (*widths, widths[-1]), TINY_UNET["layers_per_block"], TINY_UNET["norm_num_groups"]
    )
    unet = random_like({**video_state(image), **watermark}, seed)
    shapes = {**mapper_state(96, 96, 128), **text_kv(image), **frame_kv(image)}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"ema_unet": unet}, folder / "watermark_remove_module.pt")
    mapper = {"model": random_like(shapes, seed + 1), "ema": random_like(shapes, seed + 2)}
    torch.save(mapper, folder / "mapper.pt")
    return folder / "watermark_remove_module.pt", folder / "mapper.pt"


def write_elite(file: Path, *, seed: int = 0) -> State:
    """``global_mapper.pt``: a bare state dict, with K and V of ELITE's own text attentions."""
    state = random_like({**mapper_state(96, 96, 128), **text_kv(image_unet().state_dict())}, seed)
    torch.save(state, file)
    return state
