"""One training example, a batch of them, and the stream of batches that a training run reads.

The stream is a pure function: batch `i` of rank `r` of `w` depends on `(seed, i, r, w, batch size)` and the
data set alone. A run that resumes at step `i` therefore sees exactly the batches that an unbroken run would
have seen, with any number of workers, and on another number of ranks if all batches of a step have as many examples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from einops import pack
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dit_booth.data.order import BatchOrder, Place

IdentityDict = Mapping[str, Any]
"""Ground-truth parameters of a subject and its scene by name (see `toyworld.Identity`)."""


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A video, its caption and an image of the caption's subject.

    Attributes:
        key: stable name of the example, for messages and for pairing results, e.g. `toyworld/train/12`.
        video: `f 3 h w`, float32 in [-1, 1].
        caption: the text prompt.
        subject: the word (or words) of the caption that the image stands for; `Tokenizer` checks
            that the caption contains it.
        image: `3 s s`, float32 in [-1, 1]; the image prompt: the subject on white, cropped to its box.
        further: more image prompts, in order, of the shape of `image`; absent ones are zero (`data.image_prompts`).
        mask: `f h w` bool, true on the subject. Only the first `mask_frames` frames are annotated; the
            mask of the others is all false and means nothing.
        mask_frames: number of annotated leading frames of `mask`: 1 in VideoBooth's data, all in the toy
            world.
        identity: ground-truth parameters of the subject and the scene, if they are known.

    Raises:
        ValueError: a tensor has the wrong shape, type or range.
    """

    key: str
    video: Tensor
    caption: str
    subject: str
    image: Tensor
    mask: Tensor
    mask_frames: int
    identity: IdentityDict | None = None
    further: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        _check_picture(self.key, "video", self.video, axes="f 3 h w", channel_axis=1)
        _check_picture(self.key, "image", self.image, axes="3 s s", channel_axis=0)
        if self.image.shape[1] != self.image.shape[2]:
            raise ValueError(
                f"{self.key}: image has shape {tuple(self.image.shape)}; "
                "it must be square (3 s s): pad it with white"
            )
        for image in self.further:
            _check_picture(self.key, "further", image, axes="3 s s", channel_axis=0)
            if image.shape != self.image.shape:
                raise ValueError(
                    f"{self.key}: further has an image of shape {tuple(image.shape)}; "
                    f"resize it to that of image, {tuple(self.image.shape)}"
                )
        f, _, h, w = self.video.shape
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) != (f, h, w):
            raise ValueError(
                f"{self.key}: mask is {self.mask.dtype} of shape {tuple(self.mask.shape)}; "
                f"it must be torch.bool of the video's shape (f, h, w) = {(f, h, w)}"
            )
        if not 1 <= self.mask_frames <= f:
            raise ValueError(
                f"{self.key}: mask_frames is {self.mask_frames}; it must be from 1 to {f}, the frames"
            )
        if self.mask[self.mask_frames :].any():
            raise ValueError(
                f"{self.key}: mask is true in a frame at or after mask_frames={self.mask_frames}; "
                "clear it there, or count that frame as annotated"
            )

    @property
    def images(self) -> Tensor:
        """All image prompts, `r 3 s s`."""
        return pack([self.image, *self.further], "* c h w")[0]


def _check_picture(key: str, name: str, value: Tensor, *, axes: str, channel_axis: int) -> None:
    rank = len(axes.split())
    if value.ndim != rank or value.shape[channel_axis] != 3 or value.numel() == 0:
        raise ValueError(f"{key}: {name} has shape {tuple(value.shape)}; it must be ({axes}), not empty")
    if value.dtype != torch.float32:
        raise ValueError(
            f"{key}: {name} is {value.dtype}; it must be torch.float32 in [-1, 1]: scale x / 127.5 - 1"
        )
    low, high = (float(bound) for bound in torch.aminmax(value))
    # The comparison is written so that NaN fails it too.
    if not (low >= -1 and high <= 1):
        raise ValueError(
            f"{key}: {name} spans [{low:g}, {high:g}]; it must lie in [-1, 1]: scale x / 127.5 - 1"
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples stacked along a first axis `b`; see `Example` for the meaning of each field.

    `video` is `b f 3 h w`, `image` and each of `further` are `b 3 s s`, `mask` is `b f h w`, `mask_frames` is `b`
    (int64).
    """

    keys: list[str]
    video: Tensor
    captions: list[str]
    subjects: list[str]
    image: Tensor
    mask: Tensor
    mask_frames: Tensor
    identities: list[IdentityDict | None]
    further: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def images(self) -> Tensor:
        """All image prompts, `b r 3 s s`."""
        return torch.stack([self.image, *self.further], dim=1)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; torch's DataLoader calls this method by name."""
        return self._map_tensors(Tensor.pin_memory)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            video=function(self.video),
            image=function(self.image),
            further=tuple(map(function, self.further)),
            mask=function(self.mask),
            mask_frames=function(self.mask_frames),
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Stack examples into one `Batch`.

    Raises:
        ValueError: `examples` is empty, or shapes differ.
    """
    if not examples:
        raise ValueError("examples is empty; a batch needs at least one example")
    for name in ("video", "image"):
        shapes = {tuple(getattr(example, name).shape): example.key for example in examples}
        if len(shapes) > 1:
            raise ValueError(
                f"{name} differs in shape within a batch: {shapes}; use one data.size and data.frames, or data.buckets"
            )
    counts = {len(example.further): example.key for example in examples}
    if len(counts) > 1:
        raise ValueError(f"further differs in number within a batch: {counts}; use one data.image_prompts")
    return Batch(
        keys=[example.key for example in examples],
        video=pack([example.video for example in examples], "* f c h w")[0],
        captions=[example.caption for example in examples],
        subjects=[example.subject for example in examples],
        image=pack([example.image for example in examples], "* c h w")[0],
        mask=pack([example.mask for example in examples], "* f h w")[0],
        mask_frames=torch.tensor([example.mask_frames for example in examples]),
        identities=[example.identity for example in examples],
        further=tuple(
            pack(images, "* c h w")[0] for images in zip(*(e.further for e in examples), strict=True)
        ),
    )


class VideoDataset(Protocol):
    """A finite, indexable set of examples; equal indices give equal examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@runtime_checkable
class AugmentedDataset(Protocol):
    """A data set whose examples change from epoch to epoch (augmentation), purely by `(index, epoch)`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def at(self, index: int, epoch: int) -> Example: ...


@runtime_checkable
class BucketedDataset(Protocol):
    """A data set whose examples have several shapes: `buckets` numbers each example's."""

    @property
    def buckets(self) -> Sequence[int]: ...


def buckets_of(dataset: VideoDataset) -> NDArray[np.int64]:
    """Return the number of each example's shape."""
    if isinstance(dataset, BucketedDataset):
        return np.asarray(dataset.buckets, np.int64)
    return np.zeros(len(dataset), np.int64)


@runtime_checkable
class Collates(Protocol):
    """A data set whose rows are stacked by a function of its own."""

    def collate(self, rows: Sequence[Any], /) -> Any: ...


def stack(dataset: VideoDataset, rows: Sequence[Any]) -> Any:
    """Stack rows of a data set into a batch, by its own function if it has one, else by `collate`."""
    return dataset.collate(rows) if isinstance(dataset, Collates) else collate(rows)


class Loader:
    """An endless, seeded, resumable stream of batches.

    The batches of all ranks together are those of `BatchOrder`, whatever the number of ranks: rank `r` of `w` has
    part `r` of each, of `batch_size` examples, all of one shape. Nothing is dropped at an epoch's end.

    A broken example is an error here that names the batch: to swap in another would make the stream depend on
    more than its arguments. A data set that tolerates broken files leaves them out at construction.

    Args:
        dataset: the examples, read by `at(index, epoch)` if it exists, else by `[index]`.
        batch_size: examples per batch of this rank.
        seed: seed of the order of the examples.
        rank, world_size: index of this process, and number of processes.
        workers: worker processes; 0 reads in this process. The batches do not depend on it.
        pin_memory: return page-locked batches (with workers), so that copies to a GPU overlap computation.

    Raises:
        ValueError: an argument is out of range, or the data set is empty.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if len(dataset) < 1:
            raise ValueError("dataset is empty; the loader needs at least one example")
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("seed", seed, 0),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be from 0 to world_size - 1 = {world_size - 1}")
        if workers < 0:
            raise ValueError(f"workers is {workers}; give 0 to read in this process, or a positive number")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.pin_memory = pin_memory
        self._order = BatchOrder(buckets_of(dataset), batch_size * world_size, seed)

    def __iter__(self) -> Iterator[Batch]:
        return self.stream(0)

    def indices(self, number: int) -> list[Place]:
        """Return the `(index, epoch)` of each example of batch `number`."""
        if number < 0:
            raise ValueError(f"number is {number}; batches count from 0")
        first = self.rank * self.batch_size
        return self._order.batch(number)[first : first + self.batch_size]

    def positions(self, number: int) -> range:
        """Numbers of the examples of batch `number`, unique over the ranks and batches, as seeds of their draws.

        The union over the ranks does not depend on the number of ranks, at equal global batch size.
        """
        first = (number * self.world_size + self.rank) * self.batch_size
        return range(first, first + self.batch_size)

    def batch(self, number: int) -> Batch:
        """Batch `number` of this rank.

        Raises:
            ValueError: an example is broken; the message names it, and the batch.
        """
        pairs = self.indices(number)
        try:
            if isinstance(self.dataset, AugmentedDataset):
                return cast(Batch, stack(self.dataset, [self.dataset.at(*pair) for pair in pairs]))
            return cast(Batch, stack(self.dataset, [self.dataset[index] for index, _ in pairs]))
        except (ValueError, OSError) as error:
            raise ValueError(f"batch {number} of rank {self.rank} cannot be read: {error}") from error

    def stream(self, start: int = 0) -> Iterator[Batch]:
        """Batches `start`, `start + 1`, ... without end; resume a run with `stream(step)`."""
        if start < 0:
            raise ValueError(f"start is {start}; batches count from 0")
        if self.workers == 0:
            return map(self.batch, itertools.count(start))
        loader: DataLoader[Batch] = DataLoader(
            cast("Dataset[Batch]", _BatchesByNumber(self)),
            sampler=_CountFrom(start),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_identity,
            pin_memory=self.pin_memory,
        )
        return iter(loader)


class _BatchesByNumber:
    """A map-style data set of a loader's batches, for torch's worker processes."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, number: int) -> Batch:
        return self.loader.batch(number)


class _CountFrom(Sampler[int]):
    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _identity(batch: T) -> T:
    return batch
