"""Options of the autoencoder. Standard library only: `--help` stays fast."""

from dataclasses import dataclass
from typing import Literal

from dit_booth.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder between pixels and latents."""

    kind: Literal["pixel", "kl", "tiny"] = "pixel"
    """`pixel`: lossless space-to-depth; `kl`: Stable Diffusion's AutoencoderKL; `tiny`: AutoencoderTiny."""

    path: str = ""
    """kl, tiny: a diffusers folder, or a hub name (`CompVis/stable-diffusion-v1-4`); safetensors only."""

    subfolder: str = ""
    """kl, tiny: the folder inside `path` that holds the autoencoder, e.g. `vae`."""

    patch: int = 1
    """pixel: space-to-depth factor; the latents have 3 x patch^2 channels."""

    posterior: Literal["sample", "mode"] = "sample"
    """kl: sample the posterior (as the original code), or take its mode (deterministic)."""

    chunk: int = 8
    """kl, tiny: frames per pass; bounds memory, changes no result."""

    def __post_init__(self) -> None:
        check_ranges(self, "autoencoder", patch="[1, 64]", chunk="[1, 100000]")
