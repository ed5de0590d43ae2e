"""Golden-format files of any size, their outputs computed naively in float64 (`dense.py`): what other files would hold.

Outputs are stored in float64, so that `check.py` asks the float64 runs for 1e-9.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attention_cases import RECIPES, Original
from dense import mapper as dense_mapper
from safetensors.torch import save_file
from torch import Tensor
from unet_cases import dense_of, produce

from dit_booth.models.unet.model import UNetConfig, VideoUNet

File = tuple[dict[str, Any], dict[str, Tensor]]
UNET_OUTPUTS = (
    "a_plain",
    "a_plain_f1",
    "b_coarse",
    "c_fine_same_noise",
    "c_fine_no_exemplar",
    "c_fine_other_exemplar_timestep",
    "c_fine_exemplar_text_none",
    "d_fine_own_noise",
    "e_cond",
    "e_uncond",
    "e_cfg",
    "e_cfg_stage1",
)


def write(folder: Path, name: str, file: File) -> Path:
    info, tensors = file
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(info))
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


class Random:
    """Seeded numbers."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def parameter(self, name: str, shape: Sequence[int]) -> Tensor:
        """Of an order that keeps outputs at order one; nothing is zero."""
        if len(shape) == 1:
            return 0.1 * self.normal(*shape) + ("norm" in name.split(".")[-2] and name.endswith("weight"))
        return self.normal(*shape) / torch.tensor(shape[1:]).prod().sqrt()


def unet_file(
    config: UNetConfig,
    *,
    frames: int = 3,
    batch: int = 2,
    size: tuple[int, int] = (5, 7),
    tokens: int = 5,
    outputs: Sequence[str] = UNET_OUTPUTS,
    seed: int = 0,
) -> File:
    """A ``videobooth_unet`` file: every case for one video, and with ``_b{batch}`` for several."""
    random, batch_of = Random(seed), {"": 1, f"_b{batch}": batch}
    shapes = {name: p.shape for name, p in VideoUNet(config).state_dict().items()}
    copies = {"attn1": ("_new", "_exemplar"), "attn2": ("_global",)}
    for name in [n for n in shapes if n.split(".")[-2] in ("to_k", "to_v")]:
        for suffix in copies.get(name.split(".")[-3], ()):
            shapes[name.replace(".weight", f"{suffix}.weight")] = shapes[name]
    tensors = {f"weights.{name}": random.parameter(name, shape) for name, shape in shapes.items()}
    video = (config.in_channels, frames, *size)
    for suffix, b in batch_of.items():
        tensors[f"inputs.sample{suffix}"] = random.normal(b, *video)
        own, clean = random.normal(b, *video), random.normal(b, config.in_channels, 1, *size)
        tensors[f"inputs.exemplar_latent_own_noise{suffix}"] = clean + 0.5 * own
        tensors[f"inputs.exemplar_latent_same_noise{suffix}"] = (clean + 0.5 * own[:, :, :1]).expand_as(own)
        for text in ("encoder_hidden_states", "exemplar_encoder_hidden_states"):
            tensors[f"inputs.{text}{suffix}"] = random.normal(b, tokens, config.text_dim)
        t = torch.randint(1000, (b,), generator=random.generator)
        tensors[f"inputs.timestep{suffix}"] = tensors[f"inputs.exemplar_timestep{suffix}"] = t
        tensors[f"inputs.exemplar_timestep_other{suffix}"] = (t + 300) % 1000
    tensors["inputs.e_timestep"] = tensors[f"inputs.timestep_b{batch}"][:1].repeat(batch)
    tensors["inputs.e_cfg_scale"] = torch.tensor(2.5)
    info = {
        "config": {
            "block_out_channels": list(config.channels),
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_groups,
            "attention_head_dim": config.heads,
            "cross_attention_dim": config.text_dim,
            "use_linear_projection": config.linear_projection,
            "use_first_frame": config.plan == "first+previous",
        }
    }
    dense = dense_of(
        info, {k.removeprefix("weights."): x for k, x in tensors.items() if k.startswith("weights.")}
    )
    given = {k: x.double() if x.is_floating_point() else x for k, x in tensors.items()}
    for name in [n + s for n in outputs for s in batch_of if not (n.startswith("e_") and s)]:
        tensors[f"outputs.{name}"] = produce(name, dense, given).transpose(1, 2)  # b c f h w
    return info, tensors


def attention_file(
    *,
    heads: int = 2,
    dim: int = 16,
    text_dim: int = 12,
    frames: int = 3,
    batch: int = 3,
    tokens: int = 7,
    seed: int = 0,
) -> File:
    """A ``videobooth_attention`` file."""
    random = Random(seed)
    tensors = {}
    modules = {"self": ("", "_new", "_exemplar"), "cross": ("", "_global"), "temporal": ("",)}
    for module, suffixes in modules.items():
        source = text_dim if module == "cross" else dim
        for name in [f"{p}{suffix}" for suffix in suffixes for p in ("to_k", "to_v")]:
            tensors[f"weights.{module}.{name}.weight"] = random.normal(dim, source) / source**0.5
        for name in ("to_q", "to_out.0"):
            tensors[f"weights.{module}.{name}.weight"] = random.normal(dim, dim) / dim**0.5
        tensors[f"weights.{module}.to_out.0.bias"] = random.normal(dim)
    rows = batch * frames
    tensors["inputs.hidden_states"] = random.normal(rows, tokens, dim)
    tensors["inputs.exemplar_latent"] = random.normal(rows, tokens, dim)
    tensors["inputs.encoder_hidden_states"] = random.normal(rows, 5, text_dim)
    info = {"config": {"query_dim": dim, "heads": heads, "video_length": frames, "batch": batch}}
    given = {k: x.double() for k, x in tensors.items()}
    given["outputs.fine_f1"] = given["inputs.hidden_states"][:2]  # two videos of one frame
    for name in ("fine", "none", "fine_f1", "cross", "temporal"):
        assert name.removesuffix("_f1") in RECIPES
        tensors[f"outputs.{name}"] = Original(info, given, name).dense()
    return info, tensors


def mapper_file(
    *,
    image_dim: int = 12,
    width: int = 10,
    text_dim: int = 6,
    length: int = 23,
    prompts: int = 40,
    seed: int = 0,
) -> File:
    """A ``videobooth_mapper`` file with random prompts of few tokens: subjects and their parts recur."""
    random = Random(seed)
    tensors, vocabulary, words = {}, 7, 5
    for j in range(5):
        for name in (f"mapping_{j}", f"mapping_patch_{j}"):
            for layer, shape in {
                "0": (width, image_dim),
                "3": (width, width),
                "6": (text_dim, width),
            }.items():
                tensors[f"weights.mapper.{name}.{layer}.weight"] = random.parameter("mlp.0.weight", shape)
                tensors[f"weights.mapper.{name}.{layer}.bias"] = random.normal(shape[0])
            for norm in ("1", "4"):
                tensors[f"weights.mapper.{name}.{norm}.weight"] = 1 + 0.1 * random.normal(width)
                tensors[f"weights.mapper.{name}.{norm}.bias"] = random.normal(width)
        tensors[f"inputs.mapper_emb_{j}"] = random.normal(2, 10, image_dim)
    weights = {k.removeprefix("weights.mapper."): x for k, x in tensors.items() if k.startswith("weights.")}
    tensors["outputs.mapper"] = dense_mapper(weights, [tensors[f"inputs.mapper_emb_{j}"] for j in range(5)])
    table = tensors["inputs.table"] = random.normal(vocabulary + 1, text_dim)
    embeddings = tensors["inputs.inj_embedding"] = random.normal(1, words, text_dim)
    for k in range(prompts):
        ids = torch.randint(vocabulary, (1, length), generator=random.generator)
        ids[:, length - 8 :] = vocabulary  # the end token, and padding with it
        subject = torch.randint(vocabulary, (1 + k % 7,), generator=random.generator)
        if k % 2:
            ids[0, 3 : 3 + len(subject)] = subject
        tensors[f"inputs.p{k}.ids"], tensors[f"inputs.p{k}.inj_index_0"] = ids, subject
        tensors[f"outputs.p{k}.embeds"] = released_replacement(table[ids[0]], ids[0], subject, embeddings[0])[
            None
        ]
    return {"mapper": {"input_dim": image_dim, "width": width, "output_dim": text_dim, "layers": 5}}, tensors


def released_replacement(prompt: Tensor, ids: Tensor, subject: Tensor, words: Tensor) -> Tensor:
    """The released rule on the embeddings themselves (l d): one write for every place of the subject's first token."""
    out, n, count = prompt.clone(), len(subject), len(words)
    for start in (ids == subject[0]).nonzero().flatten().tolist():
        tail = prompt[start + n :]
        if n > count:  # the prompt would get shorter: its last tokens once more
            tail = torch.cat([tail, prompt[count - n :]])
        out[start : start + count] = words[: len(out) - start]
        out[start + count :] = tail[: max(len(out) - start - count, 0)]
    return out


def diffusion_file(respacings: Sequence[str] = ("20", "ddim25", "7_9"), seed: int = 0) -> File:
    """A ``diffusion`` file: tables and one noising for each respacing, by the definitions."""
    random, tensors = Random(seed), {}
    tensors["inputs.x0"], tensors["inputs.noise"] = random.normal(3, 2, 1, 3, 5), random.normal(3, 2, 1, 3, 5)
    alphas_cumprod = [1.0]
    for k in range(1000):
        alphas_cumprod.append(alphas_cumprod[-1] * (1 - (1e-4 + (0.02 - 1e-4) * k / 999)))
    for name in respacings:
        visited = visited_steps(name)
        kept = [alphas_cumprod[k + 1] for k in visited]
        t = tensors[f"inputs.{name}.t"] = torch.randint(len(visited), (3,), generator=random.generator)
        tensors[f"outputs.{name}.timestep_map"] = torch.tensor(visited)
        tensors[f"outputs.{name}.alphas_cumprod"] = torch.tensor(kept, dtype=torch.float64)
        betas = [1 - now / before for now, before in zip(kept, [1.0, *kept], strict=False)]
        tensors[f"outputs.{name}.betas"] = torch.tensor(betas, dtype=torch.float64)
        level = tensors[f"outputs.{name}.alphas_cumprod"][t].reshape(-1, 1, 1, 1, 1)
        x0, noise = tensors["inputs.x0"].double(), tensors["inputs.noise"].double()
        tensors[f"outputs.{name}.q_sample"] = level.sqrt() * x0 + (1 - level).sqrt() * noise
    return {"source": "made by the tests"}, tensors


def visited_steps(name: str) -> list[int]:
    """The training steps of ``20``, ``ddim25`` or ``7_9``: even within each of equal sections, or a constant stride."""
    if name.startswith("ddim"):
        return list(range(0, 1000, 1000 // int(name.removeprefix("ddim"))))
    counts = [int(part) for part in name.split("_")]
    size = 1000 // len(counts)
    steps = [[round(j * (size - 1) / (count - 1)) for j in range(count)] for count in counts]
    return [section * size + step for section, within in enumerate(steps) for step in within]
