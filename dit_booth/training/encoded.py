"""Data that were encoded once: the autoencoder's moments of videos and image prompts, CLIP's image states, umT5's text.

A folder of safetensors files with an index. Training on it gives what training on the files gives, without the
encoders: moments are kept, not latents, so a posterior is sampled anew with the step's own noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from dit_booth.components import Components
from dit_booth.config import RunConfig
from dit_booth.config.data import CACHE_INDEX
from dit_booth.data.readers.triplets import Triplets
from dit_booth.files import remove_partials, write_text
from dit_booth.inject import Reference
from dit_booth.models.autoencoder.posterior import Draws, Posterior
from dit_booth.models.text.build import AnyTextEncoder
from dit_booth.models.text.umt5 import Umt5TextEncoder
from dit_booth.models.weights import write
from dit_booth.training.address import encoding_address

PER_SHARD = 64
"""Examples in a file."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Image prompts as the encoders see them.

    Attributes:
        image: `b 3 s s`, the pixels. moments: `b 1 c h w`, the autoencoder's. states: five of `b (1 n) d`, CLIP's.
        embedding: `b e`, CLIP's.
    """

    image: Tensor
    moments: Tensor
    states: tuple[Tensor, ...]
    embedding: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Seen:
        return Seen(
            image=function(self.image),
            moments=function(self.moments),
            states=tuple(map(function, self.states)),
            embedding=function(self.embedding),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        states = {f"states.{i}": state for i, state in enumerate(self.states)}
        return {"image": self.image, "moments": self.moments, "embedding": self.embedding, **states}

    @classmethod
    def cat(cls, rows: Sequence[Seen]) -> Seen:
        """Stack rows."""
        parts = [row.tensors() for row in rows]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return cls.load(joined.__getitem__, len(rows[0].states))

    @classmethod
    def load(cls, read: Callable[[str], Tensor], states: int) -> Seen:
        return cls(
            image=read("image"),
            moments=read("moments"),
            states=tuple(read(f"states.{i}") for i in range(states)),
            embedding=read("embedding"),
        )


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """A batch of encoded examples: `video` holds the moments, `b f c h w`; `zero` is the zero image, one row.

    `mask` is `b f h w`, in pixels, as of `Batch`. `further`: more image prompts, in order. `text` holds umT5's states
    of each caption, `n d`, then those of the null prompt; empty where the text encoder is CLIP's.
    """

    keys: list[str]
    captions: list[str]
    subjects: list[str]
    video: Tensor
    mask: Tensor
    seen: Seen
    zero: Seen
    posterior: Posterior
    text: tuple[Tensor, ...] = ()
    further: tuple[Seen, ...] = ()

    @property
    def images(self) -> Tensor:
        """All image prompts, `b r 3 s s`."""
        return torch.stack([seen.image for seen in (self.seen, *self.further)], dim=1)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> EncodedBatch:
        """Return the batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> EncodedBatch:
        """Return the batch in page-locked memory; torch's DataLoader calls this method by name."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> EncodedBatch:
        return replace(
            self,
            video=function(self.video),
            mask=function(self.mask),
            seen=self.seen.map(function),
            further=tuple(seen.map(function) for seen in self.further),
            zero=self.zero.map(function),
            text=tuple(map(function, self.text)),
        )

    def tell_text(self, text: AnyTextEncoder) -> None:
        """Make the states of the captions known to umT5, so that it is not loaded."""
        if isinstance(text, Umt5TextEncoder):
            text.keep([*self.captions, text.null_prompt], self.text)

    def reference(self, no_image: Tensor, dtype: torch.dtype, generator: Draws) -> Reference:
        """Return the image prompts as strategies see them; rows in `no_image` (b, bool) have zero images."""

        def choose(own: Tensor, zero: Tensor) -> Tensor:
            dropped = no_image.to(own.device).reshape(-1, *[1] * (own.ndim - 1))
            return torch.where(dropped, zero, own)

        def one(seen: Seen) -> Reference:
            zero = self.zero
            return Reference(
                image=choose(seen.image, zero.image),
                states=tuple(choose(a, b).to(dtype) for a, b in zip(seen.states, zero.states, strict=True)),
                embedding=choose(seen.embedding, zero.embedding).to(dtype),
                latent=self.posterior.draw(choose(seen.moments, zero.moments), generator).to(dtype),
            )

        return replace(one(self.seen), further=tuple(map(one, self.further)))


class EncodedData:
    """A folder of encoded data as a data set of single rows, which `collate` stacks.

    Raises:
        ValueError: there is no index, or it was made from other settings or files than `config`'s.
    """

    def __init__(self, config: RunConfig) -> None:
        self.folder = Path(config.data.cache)
        self.index = config.data.read_cache()
        if self.index["address"] != encoding_address(config):
            raise ValueError(
                f"data.cache is {config.data.cache!r}, which was encoded from other data, by other encoders or"
                " with other settings; encode anew: dit-booth data cache NEW_FOLDER --config ..."
            )
        self.posterior = Posterior(**self.index["posterior"])
        self.image_prompts = config.data.image_prompts
        self._shards: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.index["examples"])

    @property
    def buckets(self) -> Sequence[int]:
        """The number of each example's shape."""
        buckets: list[int] = self.index["buckets"]
        return buckets

    def __getitem__(self, index: int) -> EncodedBatch:
        return self.at(index, 0)

    def at(self, index: int, epoch: int) -> EncodedBatch:
        """Return example `index` with the image prompt of `epoch`, as a batch of one row."""
        key, caption, subject = self.index["examples"][index]
        variation = epoch % self.index["variations"]
        first, *further = (
            self._seen(index, f"{prompt_name(index, variation, place)}.")
            for place in range(self.image_prompts)
        )
        return EncodedBatch(
            keys=[key],
            captions=[caption],
            subjects=[subject],
            video=self._read(index, f"{index}.video")[None],
            mask=self._read(index, f"{index}.mask")[None],
            seen=first,
            further=tuple(further),
            zero=self._seen(0, "zero."),
            posterior=self.posterior,
            text=self._text(index),
        )

    def collate(self, rows: Sequence[EncodedBatch]) -> EncodedBatch:
        """Stack rows."""
        first, *further = zip(*((row.seen, *row.further) for row in rows), strict=True)
        return EncodedBatch(
            keys=[key for row in rows for key in row.keys],
            captions=[caption for row in rows for caption in row.captions],
            subjects=[subject for row in rows for subject in row.subjects],
            video=torch.cat([row.video for row in rows]),
            mask=torch.cat([row.mask for row in rows]),
            seen=Seen.cat(first),
            further=tuple(map(Seen.cat, further)),
            zero=rows[0].zero,
            posterior=self.posterior,
            text=(*(state for row in rows for state in row.text[:1]), *rows[0].text[1:]),
        )

    def _seen(self, index: int, prefix: str) -> Seen:
        return Seen.load(lambda name: self._read(index, prefix + name)[None], self.index["states"])

    def _text(self, index: int) -> tuple[Tensor, ...]:
        if not self.index["text"]:
            return ()
        return self._read(index, f"{index}.text"), self._read(0, "null.text")

    def _read(self, index: int, name: str) -> Tensor:
        shard = index // PER_SHARD
        if shard not in self._shards:
            file = shard_file(self.folder, shard)
            try:
                self._shards[shard] = safe_open(file, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file}: cannot be read ({error}); encode anew") from error
        tensor: Tensor = self._shards[shard].get_tensor(name)
        return tensor


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05}.safetensors"


@torch.no_grad()
def encode_data(components: Components, folder: Path) -> Iterator[str]:
    """Encode the training data of a run into a folder; iterate over lines that say what was done.

    Files that a stopped run left whole are kept. Rows are encoded in batches as large as training's, as another size
    may change the last bits. The index comes last.

    Raises:
        ValueError: the data are not on disk, or have no fixed number of variations.
    """
    config = components.config
    dataset = components.dataset("train")
    if not isinstance(dataset, Triplets):
        raise ValueError(f"data.kind is {config.data.kind}, which is made on the fly; encode data on disk")
    variations = config.data.variations or (0 if config.data.on_disk.augment else 1)
    if not variations:
        raise ValueError(
            "data.variations is 0: a new variation in every epoch; set it to the number to encode of each image prompt"
        )
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    address, rows = encoding_address(config), config.train.batch_size // config.train.accumulation
    shards = math.ceil(len(dataset) / PER_SHARD)
    for shard in tqdm(range(shards), desc="encode", unit="file"):
        members = range(shard * PER_SHARD, min((shard + 1) * PER_SHARD, len(dataset)))
        file = shard_file(folder, shard)
        if not is_whole(file, address):
            write(file, encode_shard(components, dataset, members, variations, rows), {"address": address})
    examples = [(item.row.key, item.row.caption, item.subject) for item in dataset.items]
    image = components.image_encoder
    index = {
        "address": address,
        "variations": variations,
        "states": len(image.layers),
        "posterior": asdict(components.autoencoder.posterior),
        "dims": [image.width, image.embed_dim, components.autoencoder.channels],
        "examples": examples,
        "text": isinstance(components.model.text, Umt5TextEncoder),
        "buckets": list(dataset.buckets),
    }
    write_text(folder / CACHE_INDEX, json.dumps(index) + "\n")
    size = sum(file.stat().st_size for file in folder.glob("shard-*.safetensors"))
    yield f"{len(dataset)} examples, {variations} variations of each image prompt: {size / 2**20:.1f} MiB"
    yield f"{folder}: --data.cache {folder} --data.variations {variations}"


def is_whole(file: Path, address: str) -> bool:
    """Return True if a file of encoded data is there, and from the same settings."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            return bool((opened.metadata() or {}).get("address") == address)
    except SafetensorError:
        return False


def encode_shard(
    components: Components, dataset: Triplets, members: range, variations: int, rows: int
) -> dict[str, Tensor]:
    """Return the tensors of a file: a video of each example, its mask, and all variations of its image prompts."""
    out: dict[str, Tensor] = {}
    for numbers in alike(members, lambda number: dataset.items[number].shape, rows):
        filled = numbers + numbers[-1:] * (rows - len(numbers))  # all batches are as large as training's
        examples = [dataset[number] for number in filled]
        out |= encode_videos(components, [example.video for example in examples], numbers)
        out |= {f"{number}.mask": example.mask for number, example in zip(numbers, examples, strict=False)}
        out |= encode_captions(components, {f"{n}.text": dataset.items[n].row.caption for n in numbers})
        for variation in range(variations):
            prompts = [dataset.images_at(number, variation) for number in filled]
            for place, column in enumerate(zip(*prompts, strict=True)):
                images = torch.stack(column)
                names = [prompt_name(number, variation, place) for number in numbers]
                out |= rows_of(see(components, images), names)
    if members.start == 0:
        out |= rows_of(see(components, torch.zeros_like(images)), ["zero"])
        out |= encode_captions(components, {"null.text": components.model.text.null_prompt})
    return {name: tensor.cpu().clone() for name, tensor in out.items()}


def alike(members: range, shape_of: Callable[[int], object], rows: int) -> Iterator[list[int]]:
    """Iterate over the members in batches of at most `rows`, each of one shape."""
    shapes = {number: shape_of(number) for number in members}
    for shape in dict.fromkeys(shapes.values()):
        numbers = [number for number in members if shapes[number] == shape]
        yield from (numbers[first : first + rows] for first in range(0, len(numbers), rows))


def prompt_name(number: int, variation: int, place: int) -> str:
    """Return what the names of an image prompt's tensors begin with; `place`: among those of the example."""
    return f"{number}.{variation}.{place}" if place else f"{number}.{variation}"


def rows_of(seen: Seen, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of the first rows of a batch, by their names."""
    return {
        f"{name}.{key}": tensor[i] for i, name in enumerate(names) for key, tensor in seen.tensors().items()
    }


def encode_videos(
    components: Components, videos: Sequence[Tensor], numbers: Sequence[int]
) -> dict[str, Tensor]:
    """Return the moments of videos (f 3 h w) by the examples' numbers."""
    moments = components.autoencoder.moments(torch.stack(list(videos)).to(components.device))
    return {f"{number}.video": moments[place] for place, number in enumerate(numbers)}


def encode_captions(components: Components, captions: Mapping[str, str]) -> dict[str, Tensor]:
    """Return umT5's states of captions (n d each) by their names; CLIP's are made in the training step."""
    text = components.model.text
    if not isinstance(text, Umt5TextEncoder):
        return {}
    return dict(zip(captions, text.encode_captions(list(captions.values())), strict=True))


def see(components: Components, images: Tensor) -> Seen:
    """Encode image prompts (b 3 s s)."""
    images = images.to(components.device)
    states = components.image_encoder(images)
    moments = components.autoencoder.moments(rearrange(images, "b c h w -> b 1 c h w"))
    return Seen(image=images, moments=moments, states=states.states, embedding=states.embedding)
