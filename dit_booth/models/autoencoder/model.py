"""Autoencoders: frame by frame (lossless space-to-depth, AutoencoderKL, AutoencoderTiny), and Wan's, in groups."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn

from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.autoencoder.posterior import Draws, Posterior
from dit_booth.models.weights import load_strictly, read_folder

STEM = "diffusion_pytorch_model"
"""Name of diffusers' weights files, without the suffix."""


class Autoencoder(nn.Module, ABC):
    """Frozen autoencoder, always in eval mode. channels: of the latents; factor: pixels per latent along a side.

    A video has as many latent frames as frames, except by `WanAutoencoder` (`AutoencoderConfig.latent_frames`).
    """

    channels: int
    factor: int
    posterior: Posterior

    @abstractmethod
    def moments(self, video: Tensor) -> Tensor:
        """Encode a video (b f 3 h w, [-1, 1]) as what `posterior` makes latents of (b f c' h/factor w/factor).

        ValueError: wrong shape, or a side that `factor` does not divide.
        """

    def encode(self, video: Tensor, generator: Draws = None) -> Tensor:
        """Encode a video (b f 3 h w, [-1, 1]) as latents (b f c h/factor w/factor).

        `generator` (one, or one per row) samples the posterior (`kl` only). ValueError: see `moments`.
        """
        return self.posterior.draw(self.moments(video), generator).to(video.dtype)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (b f c h w) to a video (b f 3 h*factor w*factor), nominally in [-1, 1], not clamped."""

    def stream_decoder(self) -> "StreamDecoder":
        """Return what decodes one batch of videos part by part."""
        return StreamDecoder(self)

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stay in eval mode."""
        return super().train(False)

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}: expected (b, f, 3, h, w) in [-1, 1]")
        height, width = video.shape[-2:]
        if height % self.factor or width % self.factor:
            fit = tuple(max(1, side // self.factor) * self.factor for side in (height, width))
            raise ValueError(
                f"video size {height} x {width} is not divisible by the autoencoder's factor {self.factor}: "
                f"resize or crop it, e.g. to {fit[0]} x {fit[1]}"
            )

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] != self.channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: expected (b, f, {self.channels}, h, w)"
            )


class StreamDecoder:
    """Decodes videos some latent frames at a time, in order, to the frames that `Autoencoder.decode` makes at once.

    Between two parts its state, of bounded size, can be saved.
    """

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latents (b f c h w) to the next frames (b g 3 h*factor w*factor)."""
        return self.autoencoder.decode(latents)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on after the last part."""
        return {}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from a state, which may have other entries, too."""


class PixelAutoencoder(Autoencoder):
    """Space-to-depth by `patch`: lossless, without parameters; patch 1 is the identity."""

    def __init__(self, patch: int = 1) -> None:
        super().__init__()
        if patch < 1:
            raise ValueError(f"AutoencoderConfig.patch = {patch} must be at least 1")
        self.channels, self.factor, self.posterior = 3 * patch**2, patch, Posterior()
        self.eval()

    def moments(self, video: Tensor) -> Tensor:
        self._check_video(video)
        return rearrange(video, "b f c (h p) (w q) -> b f (c p q) h w", p=self.factor, q=self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        self._check_latents(latents)
        return rearrange(latents, "b f (c p q) h w -> b f c (h p) (w q)", p=self.factor, q=self.factor)


class DiffusersAutoencoder(Autoencoder):
    """diffusers' AutoencoderKL or AutoencoderTiny on single frames; latents = (z - shift) * scaling factor.

    The factors come from the autoencoder's own configuration (0.18215 for Stable Diffusion 1). At most
    `chunk` frames are processed at once; the posterior's noise is drawn once for the whole video, so `chunk`
    changes no result.
    """

    def __init__(self, vae: nn.Module, *, sample: bool, chunk: int) -> None:
        super().__init__()
        if chunk < 1:
            raise ValueError(f"AutoencoderConfig.chunk = {chunk} must be at least 1")
        self.vae: Any = vae.requires_grad_(False)
        config: Any = vae.config
        self.kl = hasattr(vae, "quant_conv")
        self.chunk = chunk
        self.channels = config.latent_channels
        widths = config.block_out_channels if self.kl else config.encoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        self.posterior = Posterior(kl=self.kl, sample=sample, scale=scale, shift=shift)
        self.eval()

    def moments(self, video: Tensor) -> Tensor:
        self._check_video(video)
        frames = rearrange(video, "b f c h w -> (b f) c h w")
        z = self._chunked(self._moments if self.kl else self._tiny_latents, frames)
        return rearrange(z, "(b f) c h w -> b f c h w", b=len(video))

    def decode(self, latents: Tensor) -> Tensor:
        self._check_latents(latents)
        z = self.posterior.undo_scale(rearrange(latents, "b f c h w -> (b f) c h w"))
        frames = self._chunked(lambda x: self.vae.decode(x).sample, z)
        return rearrange(frames, "(b f) c h w -> b f c h w", b=len(latents)).to(latents.dtype)

    def _moments(self, frames: Tensor) -> Tensor:
        moments: Tensor = self.vae.encode(frames).latent_dist.parameters
        return moments

    def _tiny_latents(self, frames: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(frames).latents
        return latents

    def _chunked(self, function: Callable[[Tensor], Tensor], frames: Tensor) -> Tensor:
        return torch.cat([function(part) for part in torch.split(frames.to(self.vae.dtype), self.chunk)])


class WanAutoencoder(Autoencoder):
    """diffusers' AutoencoderKLWan (Wan 2.1 and 2.2): 4k + 1 frames are k + 1 latent frames, the first of frame 0 alone.

    Latents are (z - mean) / std, by channel, as its configuration has them. Videos are encoded one after the other, in
    parts of four frames; with `tile`, larger ones also in overlapping tiles, whose seams are blended. What it decodes
    lies in [-1, 1].
    """

    def __init__(self, vae: Any, config: AutoencoderConfig) -> None:
        super().__init__()
        self.vae: Any = vae.requires_grad_(False)
        sizes: Any = vae.config
        self.config = config
        if sizes.scale_factor_temporal != config.frames_factor:
            raise ValueError(
                f"AutoencoderConfig.path: the autoencoder has {sizes.scale_factor_temporal} frames in a latent frame,"
                f" and kind = wan has {config.frames_factor}; give the folder of one of Wan's"
            )
        self.channels, self.factor = sizes.z_dim, sizes.scale_factor_spatial
        scale = tuple(1 / std for std in sizes.latents_std)
        sample = config.posterior == "sample"
        self.posterior = Posterior(kl=True, sample=sample, scale=scale, shift=tuple(sizes.latents_mean))
        self.vae.enable_slicing()
        if config.tile:
            if config.tile % (4 * self.factor):
                raise ValueError(
                    f"autoencoder.tile is {config.tile}; tiles overlap by a quarter: use a multiple of"
                    f" {4 * self.factor}"
                )
            stride = config.tile * 3 // 4
            self.vae.enable_tiling(config.tile, config.tile, stride, stride)
        self.eval()

    def moments(self, video: Tensor) -> Tensor:
        self._check_video(video)
        self.config.latent_frames(video.shape[1], "the video's number of frames")
        frames = rearrange(video, "b f c h w -> b c f h w").to(self.vae.dtype)
        found: Tensor = self.vae.encode(frames).latent_dist.parameters
        return rearrange(found, "b c f h w -> b f c h w")

    def decode(self, latents: Tensor) -> Tensor:
        self._check_latents(latents)
        z = rearrange(self.posterior.undo_scale(latents), "b f c h w -> b c f h w")
        video: Tensor = self.vae.decode(z.to(self.vae.dtype)).sample
        return rearrange(video, "b c f h w -> b f c h w").to(latents.dtype)

    def stream_decoder(self) -> StreamDecoder:
        """Return what decodes part by part; with `tile`, its one part is the whole video."""
        return StreamDecoder(self) if self.config.tile else WanStreamDecoder(self)


class WanStreamDecoder(StreamDecoder):
    """Decodes by Wan's causal convolutions, each of which goes on from its last two inputs.

    They are diffusers' own cache, which `AutoencoderKLWan.decode` drops at the end of a call.
    """

    REPEAT = "Rep"
    """diffusers' mark of a temporal upsampling that has seen the first latent frame alone."""

    def __init__(self, autoencoder: WanAutoencoder) -> None:
        super().__init__(autoencoder)
        self.wan, self.vae = autoencoder, autoencoder.vae
        self.caches: list[list[Tensor | str | None]] = []
        """Of each row: what each convolution holds."""

    def decode(self, latents: Tensor) -> Tensor:
        self.wan._check_latents(latents)
        z = rearrange(self.wan.posterior.undo_scale(latents), "b f c h w -> b c f h w")
        rows = self.vae.post_quant_conv(z.to(self.vae.dtype)).split(1)
        if not self.caches:
            self.caches = [[None] * self._convolutions for _ in rows]
        video = torch.cat([self._decode_row(*row) for row in zip(rows, self.caches, strict=True)])
        return rearrange(video.clamp(-1, 1), "b c f h w -> b f c h w").to(latents.dtype)

    def _decode_row(self, z: Tensor, cache: list[Tensor | str | None]) -> Tensor:
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        parts = []
        for frame in z.split(1, dim=2):
            first = cache[0] is None
            parts.append(self.vae.decoder(frame, feat_cache=cache, feat_idx=[0], first_chunk=first))
        patch, video = self.vae.config.patch_size, torch.cat(parts, dim=2)
        whole: Tensor = video if patch is None else unpatchify(video, patch)  # type: ignore[no-untyped-call]
        return whole

    @property
    def _convolutions(self) -> int:
        count: int = self.vae._cached_conv_counts["decoder"]
        return count

    def state(self) -> dict[str, Tensor]:
        by_convolution = list(zip(*self.caches, strict=True))
        marked = [i for i, rows in enumerate(by_convolution) if rows[0] == self.REPEAT]
        held = {i: [x for x in rows if isinstance(x, Tensor)] for i, rows in enumerate(by_convolution)}
        tensors = {f"decoder.{i}": torch.cat(rows) for i, rows in held.items() if rows}
        return {**tensors, "decoder.repeats": torch.tensor(marked)}

    def restore(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        names = {i: f"decoder.{i}" for i in range(self._convolutions)}
        held = {i: state[name].to(device).split(1) for i, name in names.items() if name in state}
        marks = dict.fromkeys(state["decoder.repeats"].tolist(), self.REPEAT)
        count = max(map(len, held.values()), default=0)
        self.caches = [[held[i][row] if i in held else marks.get(i) for i in names] for row in range(count)]


def build_autoencoder(config: AutoencoderConfig) -> Autoencoder:
    """Build the autoencoder of a run. ValueError: a missing path or wrong weights."""
    if config.kind == "pixel":
        if config.path or config.subfolder:
            raise ValueError(
                f"AutoencoderConfig.path = {config.path!r} (subfolder = {config.subfolder!r}) is for kind = "
                "kl, tiny or wan, but kind = pixel: set kind, or leave both empty"
            )
        return PixelAutoencoder(config.patch)
    if config.patch != 1:
        raise ValueError(
            f"AutoencoderConfig.patch = {config.patch} is for kind = pixel; with kind = {config.kind} the "
            "factor comes from the weights: leave patch at 1"
        )
    vae = _load(config)
    if config.kind == "wan":
        return WanAutoencoder(vae, config)
    return DiffusersAutoencoder(vae, sample=config.posterior == "sample", chunk=config.chunk)


def _load(config: AutoencoderConfig) -> nn.Module:
    """Load safetensors, or a local folder's .bin if it holds tensors alone; a folder needs no network."""
    where = f"AutoencoderConfig.path = {config.path!r}, subfolder = {config.subfolder!r}"
    source, local = _locate(config, where)

    import diffusers

    names = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny", "wan": "AutoencoderKLWan"}
    kind: Any = getattr(diffusers, names[config.kind])
    place = {"subfolder": config.subfolder or None, "local_files_only": local}
    loading = {"use_safetensors": True, "low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        saved = kind.load_config(source, **place).get("_class_name", kind.__name__)
        if saved != kind.__name__:
            raise ValueError(
                f"{where} holds {saved}, not {kind.__name__} (kind = {config.kind}): change kind or path"
            )
        folder = Path(source) / config.subfolder
        if local and (folder / f"{STEM}.bin").is_file() and not any(folder.glob(f"{STEM}*.safetensors*")):
            return _from_pickle(kind.from_config(kind.load_config(source, **place)), folder, where)
        vae: nn.Module
        vae, found = kind.from_pretrained(source, **place, **loading)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{where} could not be loaded: {error}; from the hub only safetensors weights are read (a .bin: "
            "from a folder), and a hub name needs the network or a filled cache"
        ) from error
    wrong = {name: keys for name, keys in found.items() if keys}
    if wrong:
        raise ValueError(
            f"{where}: the weights do not fit {kind.__name__}: {wrong}; use the folder it was saved to"
        )
    return vae


def _from_pickle(vae: Any, folder: Path, where: str) -> nn.Module:
    """Read the tensors of a .bin, strictly, without running code as diffusers' reader would.

    Stable Diffusion 1.x's attention names predate diffusers' classes, which map them when they load.
    """
    state = vae._fix_state_dict_keys_on_load(read_folder(folder, STEM))
    module: nn.Module = vae
    load_strictly(module, state, f"{where}: {folder}", fix="use the folder it was saved to")
    return module


def _locate(config: AutoencoderConfig, where: str) -> tuple[str, bool]:
    """Return the folder or hub name for diffusers, and whether it is a local folder."""
    if not config.path:
        raise ValueError(
            f"AutoencoderConfig.path is empty but kind = {config.kind}: give a local diffusers folder, a hub "
            "name such as CompVis/stable-diffusion-v1-4 (with subfolder vae), or use kind = pixel (kind = wan: or give"
            " the folder of a Wan pipeline as weights)"
        )
    folder = Path(config.path).expanduser()
    if folder.is_dir():
        if not (folder / config.subfolder / "config.json").is_file():
            raise ValueError(
                f"{where}: {folder / config.subfolder}/config.json does not exist; point to the folder that "
                "save_pretrained wrote, and set subfolder (vae in a Stable Diffusion pipeline)"
            )
        return str(folder), True
    if folder.is_absolute() or config.path.startswith(".") or config.path.count("/") != 1:
        raise ValueError(
            f"{where}: this folder does not exist; give an existing one, or a hub name owner/name"
        )
    return config.path, False
