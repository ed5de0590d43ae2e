"""Options of the autoencoder. Standard library only: `--help` stays fast."""

from dataclasses import dataclass
from typing import Literal

from dit_booth.errors import check_ranges

WAN_FRAMES = 4
"""Frames in a latent frame of Wan's autoencoders, of 2.1 and 2.2."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder between pixels and latents."""

    kind: Literal["pixel", "kl", "tiny", "wan"] = "pixel"
    """`pixel`: lossless space-to-depth; `kl`: Stable Diffusion's AutoencoderKL; `tiny`: AutoencoderTiny; `wan`: Wan's
    AutoencoderKLWan, which makes one latent frame of the first frame and one of each four that follow."""

    path: str = ""
    """kl, tiny, wan: a diffusers folder, or a hub name (`CompVis/stable-diffusion-v1-4`); safetensors only. wan: empty
    means the pipeline's folder in `weights`."""

    subfolder: str = ""
    """kl, tiny, wan: the folder inside `path` that holds the autoencoder, e.g. `vae`."""

    patch: int = 1
    """pixel: space-to-depth factor; the latents have 3 x patch^2 channels."""

    posterior: Literal["sample", "mode"] = "sample"
    """kl, wan: sample the posterior (as the original code), or take its mode (deterministic)."""

    chunk: int = 8
    """kl, tiny: frames per pass; bounds memory, changes no result."""

    tile: int = 0
    """wan: side in pixels of the tiles that larger videos are cut into, which overlap by a quarter (diffusers: 256):
    bounds memory; 0: no tiles."""

    def __post_init__(self) -> None:
        check_ranges(self, "autoencoder", patch="[1, 64]", chunk="[1, 100000]", tile="[0, 65536]")
        if self.tile and self.kind != "wan":
            raise ValueError(
                f"autoencoder.tile is {self.tile}, but autoencoder.kind is {self.kind}; set it to 0"
            )

    @property
    def frames_factor(self) -> int:
        """Frames in a latent frame, all but the first, which stands alone."""
        return WAN_FRAMES if self.kind == "wan" else 1

    def latent_frames(self, frames: int, field: str = "frames") -> int:
        """Return how many latent frames a video has. ValueError: it cannot be grouped, naming `field`."""
        factor = self.frames_factor
        count, rest = divmod(frames - 1, factor)
        if rest:
            near = (1 + count * factor, 1 + (count + 1) * factor)
            raise ValueError(
                f"{field} is {frames}; autoencoder.kind {self.kind} takes {factor}k + 1 frames:"
                f" use {near[0]} or {near[1]}"
            )
        return 1 + count

    def video_frames(self, latent_frames: int) -> int:
        """Return how many frames a video of so many latent frames has."""
        return 1 + (latent_frames - 1) * self.frames_factor if latent_frames else 0
