"""Examples, batches, and the stream that a training run reads."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_booth.data.example import Example, Loader, collate
from dit_booth.data.toyworld import Toyworld, ToyworldConfig

torch.set_num_threads(1)


def example(key: str = "k", *, size: int = 4, frames: int = 2) -> Example:
    return Example(
        key=key,
        video=torch.zeros(frames, 3, size, size),
        caption="a red star is spinning",
        subject="star",
        image=torch.ones(3, 6, 6),
        mask=torch.zeros(frames, size, size, dtype=torch.bool),
        mask_frames=1,
    )


class Numbers:
    """Example `i` holds nothing but `i`; in epoch `e` its video holds `e`."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        return example(str(index))

    def at(self, index: int, epoch: int) -> Example:
        return replace(example(str(index)), video=torch.full((2, 3, 4, 4), epoch / 100))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"video": torch.zeros(2, 1, 4, 4)}, ["k:", "video", "(2, 1, 4, 4)", "f 3 h w"]),
        ({"video": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, ["video", "uint8", "127.5"]),
        ({"video": torch.full((2, 3, 4, 4), 1.5)}, ["video", "1.5", "[-1, 1]"]),
        ({"video": torch.full((2, 3, 4, 4), float("nan"))}, ["video", "nan"]),
        ({"image": torch.zeros(3, 4, 6)}, ["image", "(3, 4, 6)", "square"]),
        ({"mask": torch.zeros(2, 4, 4)}, ["mask", "float32", "bool"]),
        ({"mask": torch.zeros(1, 4, 4, dtype=torch.bool)}, ["mask", "(1, 4, 4)", "(2, 4, 4)"]),
        ({"mask_frames": 3}, ["mask_frames", "3", "1 to 2"]),
        ({"mask": torch.ones(2, 4, 4, dtype=torch.bool)}, ["mask", "mask_frames=1"]),
    ],
)
def test_a_wrong_example_is_refused_with_the_field_and_the_fix(changes, words):
    with pytest.raises(ValueError) as caught:
        replace(example(), **changes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_batch_stacks_what_its_examples_hold():
    world = Toyworld(ToyworldConfig(size=16, frames=3))
    batch = collate([world[4], world[7]])
    assert len(batch) == 2
    assert batch.keys == [world[4].key, world[7].key]
    assert torch.equal(batch.video[1], world[7].video)
    assert torch.equal(batch.image[0], world[4].image)
    assert batch.mask_frames.tolist() == [3, 3]
    assert batch.identities[1] == world[7].identity
    moved = batch.to("cpu")
    assert torch.equal(moved.mask, batch.mask) and moved.captions == batch.captions


def test_examples_of_unlike_shape_make_no_batch():
    with pytest.raises(ValueError, match=r"video differs.*\(2, 3, 4, 4\).*\(2, 3, 8, 8\)"):
        collate([example("a"), example("b", size=8)])
    with pytest.raises(ValueError, match="empty"):
        collate([])


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 23),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_the_ranks_together_read_every_example_once_an_epoch(length, batch_size, world_size, seed):
    loaders = [
        Loader(Numbers(length), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    steps = 3 * length  # at least three epochs
    line = [pair for step in range(steps) for loader in loaders for pair in loader.indices(step)]
    assert len(set(line)) == len(line)
    for epoch in range(3):
        assert sorted(index for index, e in line if e == epoch) == list(range(length))


def test_the_order_changes_with_the_epoch_and_the_seed():
    def order(seed: int, epoch: int) -> list[int]:
        return [index for index, _ in Loader(Numbers(50), batch_size=50, seed=seed).indices(epoch)]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) == order(0, 0)


def videos(batches) -> list[Tensor]:
    return [batch.video for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_where_the_first_one_stopped(workers):
    world = Toyworld(ToyworldConfig(size=16, frames=2, length=11))
    whole = list(itertools.islice(Loader(world, batch_size=3, seed=5), 6))
    rest = list(itertools.islice(Loader(world, batch_size=3, seed=5, workers=workers).stream(2), 4))
    assert [batch.keys for batch in rest] == [batch.keys for batch in whole[2:]]
    assert all(torch.equal(a, b) for a, b in zip(videos(rest), videos(whole[2:]), strict=True))


def test_a_data_set_that_varies_gets_the_epoch():
    loader = Loader(Numbers(4), batch_size=4)
    assert [float(loader.batch(epoch).video.max()) for epoch in range(3)] == pytest.approx([0, 0.01, 0.02])


def test_a_broken_example_stops_the_stream_and_is_named():
    class Broken(Numbers):
        def at(self, index: int, epoch: int) -> Example:
            raise ValueError("clip-7 is truncated")

    with pytest.raises(ValueError, match=r"batch 3 of rank 0.*clip-7 is truncated"):
        Loader(Broken(9), batch_size=1).batch(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2.*0 to world_size - 1 = 1"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_loader_refuses_what_it_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(3), **{"batch_size": 1, **options})


def test_a_stream_needs_examples_and_a_start():
    with pytest.raises(ValueError, match="empty"):
        Loader(Numbers(0), batch_size=1)
    with pytest.raises(ValueError, match="start is -1"):
        Loader(Numbers(3), batch_size=1).stream(-1)
