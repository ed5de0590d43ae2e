"""Buckets: the shape of each video, batches of one shape, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_booth.components import Components, build
from dit_booth.config import DataConfig, RunConfig, StageConfig, TrainConfig, TripletsOptions
from dit_booth.config.data import DataKind
from dit_booth.data.example import Batch, Loader
from dit_booth.data.order import BatchOrder
from dit_booth.data.readers.triplets import Triplets, TripletsConfig
from dit_booth.data.shapes import Shape, choose_shape, parse_shape
from dit_booth.data.video import write_video
from dit_booth.models.clip.config import ClipConfig
from dit_booth.training.encoded import EncodedData, alike, encode_data
from dit_booth.training.stage_cost import count_flops

torch.set_num_threads(1)
SHAPES = ("16x16x4", "16x32x4", "32x16x4", "16x32x2")
CLIPS = [
    ("wide", 8, 12, 24),
    ("tall", 8, 24, 12),
    ("square", 8, 16, 16),
    ("short", 3, 12, 24),
    ("wide2", 7, 10, 24),
]
"""Name, frames, height and width of the videos; stride 2, so 4 frames need 7 of them, and 2 need 3."""


def numbers(counts: Sequence[int]) -> np.ndarray:
    """Return the buckets of examples, in a mixed order."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda counts: sum(counts) > 0),
    size=st.integers(1, 7),
    seed=st.integers(0, 5),
)
def test_batches_are_of_one_bucket_and_every_epoch_is_read_once(counts, size, seed):
    buckets = numbers(counts)
    order = BatchOrder(buckets, size, seed)
    batches = [order.batch(number) for number in range(4 * (len(buckets) // size + len(counts)))]
    assert all(len(batch) == size and len({buckets[index] for index, _ in batch}) == 1 for batch in batches)
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    lag = 1 + size // min(count for count in counts if count)  # epochs that a batch may span
    whole = len(rows) // len(buckets) - lag
    assert all(sum(e == epoch for _, e in rows) == len(buckets) for epoch in range(whole))
    middle = len(batches) // 2
    assert BatchOrder(buckets, size, seed).batch(middle) == batches[middle]  # as a run that resumes there


def test_one_bucket_is_the_sequence_of_all_epochs():
    order = BatchOrder(np.zeros(7, np.int64), 3, 5)
    rows = [row for number in range(14) for row in order.batch(number)]
    epochs = [np.random.default_rng((5, epoch)).permutation(7) for epoch in range(6)]
    assert rows == [(int(index), epoch) for epoch, drawn in enumerate(epochs) for index in drawn]


def test_buckets_are_mixed_and_their_order_changes_with_the_epoch():
    order = BatchOrder(numbers([40, 40]), 4, 0)
    first, second = ([order.find(number)[0] for number in range(at, at + 20)] for at in (0, 20))
    assert sum(first) == sum(second) == 10 and first != second
    assert 0 < sum(first[:10]) < 10


@pytest.mark.parametrize(
    ("frames", "height", "width", "wanted"),
    [(100, 480, 854, 1), (100, 854, 480, 2), (100, 500, 480, 0), (5, 480, 854, 3), (2, 480, 854, None)],
)
def test_a_video_gets_the_nearest_ratio_of_the_lengths_that_it_has(frames, height, width, wanted):
    shapes = [parse_shape(text, 4) for text in SHAPES]
    found = choose_shape(shapes, frames=frames, height=height, width=width, stride=2)
    assert found == (None if wanted is None else shapes[wanted])


def test_shapes_are_read_and_refused():
    assert parse_shape("16x32", 8) == Shape(8, 16, 32) and str(parse_shape("16x32x4", 8)) == "16x32x4"
    for text in ("16", "16x32x4x1", "ax16"):
        with pytest.raises(ValueError, match=r"data\.buckets has .* HEIGHTxWIDTH"):
            parse_shape(text, 8)
    root = TripletsOptions(root="data")

    def refused(words: str, *buckets: str, kind: DataKind = "triplets") -> None:
        with pytest.raises(ValueError, match=words):
            DataConfig(kind=kind, frames=4, buckets=buckets, triplets=root)

    refused("toyworld has one size", "16x16x4", kind="toyworld")
    refused("each shape once", "16x16", "16x16x4")
    refused("sides from 8", "4x16x4")
    refused("longest of data.buckets has 2; make them equal", "16x16x2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("buckets")
    for number, (name, frames, height, width) in enumerate(CLIPS):
        video = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_video(root / f"{name}.mp4", video, fps=8)
        (root / f"{name}.txt").write_text(f"a box called {name}\nbox\n")
    return root


@pytest.fixture(scope="module")
def config(root: Path) -> RunConfig:
    triplets = TripletsOptions(root=str(root), format="folder", stride=2)
    data = DataConfig(kind="triplets", frames=4, size=16, buckets=SHAPES, variations=1, triplets=triplets)
    clip, train = ClipConfig(pretrained="none"), TrainConfig(batch_size=2)
    return RunConfig(strategy="none", weights="none", data=data, clip=clip, train=train, schedule=("base",))


def test_the_reader_gives_each_video_its_shape(config: RunConfig) -> None:
    data = config.data.build()
    shapes = {data[i].key: (data[i].video.shape[0], *data[i].video.shape[2:]) for i in range(len(data))}
    assert shapes == {
        "wide": (4, 16, 32), "wide2": (4, 16, 32), "tall": (4, 32, 16), "square": (4, 16, 16), "short": (2, 16, 32)
    }  # fmt: skip
    assert all(data[i].image.shape == (3, 16, 16) for i in range(len(data)))
    sampled = config.data.build("dev")
    assert len(sampled) == 4 and {tuple(sampled[i].video.shape) for i in range(4)} == {(4, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"short\.mp4.*needs 5 frames.*has 3"):
        three = replace(config.data, buckets=("16x16x4", "16x16x3"))
        three.build()


def test_a_picture_needs_a_shape_of_one_frame(root: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (20, 20), "red").save(tmp_path / "still.png")
    (tmp_path / "wide.mp4").write_bytes((root / "wide.mp4").read_bytes())
    lines = ['{"file_name": "still.png", "text": "a box"}', '{"file_name": "wide.mp4", "text": "a box"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    options = {"root": str(tmp_path), "format": "metadata", "frames": 4, "stride": 2, "size": 16}
    two = (Shape(4, 16, 32), Shape(2, 16, 16))
    with pytest.raises(ValueError, match=r"still\.png: is a picture.*16x32x1"):
        Triplets(TripletsConfig(**options, buckets=two))
    data = Triplets(TripletsConfig(**options, buckets=(*two, Shape(1, 16, 16))))
    assert [tuple(data[i].video.shape) for i in (0, 1)] == [(1, 3, 16, 16), (4, 3, 16, 32)]


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_has_one_shape_on_any_number_of_ranks_and_resumes(config: RunConfig, world: int) -> None:
    data = config.data.build()
    alone = Loader(data, batch_size=2, seed=1)
    ranks = [
        Loader(data, batch_size=2 // world, seed=1, rank=rank, world_size=world) for rank in range(world)
    ]
    streams = [ranks[rank].stream(3) for rank in range(world)]
    for number in range(3, 7):
        parts: list[Batch] = [next(stream) for stream in streams]
        assert len({part.video.shape[1:] for part in parts}) == 1
        assert [key for part in parts for key in part.keys] == alone.batch(number).keys


@pytest.fixture(scope="module")
def components(config: RunConfig) -> Components:
    return build(config)


def test_encoded_videos_of_several_shapes_are_those_of_the_files(
    components: Components, tmp_path: Path
) -> None:
    config = components.config
    list(encode_data(components, tmp_path))
    encoded = EncodedData(replace(config, data=replace(config.data, cache=str(tmp_path))))
    files = config.data.build()
    loaders = [Loader(data, batch_size=2, seed=1) for data in (encoded, files)]
    shapes = set()
    for number in range(6):
        made, wanted = (loader.batch(number) for loader in loaders)
        assert made.keys == wanted.keys and torch.equal(made.mask, wanted.mask)
        assert torch.equal(made.video, components.autoencoder.moments(wanted.video))
        shapes.add(made.video.shape[1:])
    assert len(shapes) == 4
    assert list(alike(range(2, 7), lambda number: number == 3, 2)) == [[2, 4], [5, 6], [3]]


def test_a_larger_shape_costs_more(components: Components) -> None:
    data = components.dataset()
    cost = [
        count_flops(components, StageConfig(), data, torch.float32, torch.device("cpu"), bucket)
        for bucket in range(4)
    ]
    assert cost[0] < cost[1] == cost[2] and cost[3] < cost[1]
