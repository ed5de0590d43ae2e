"""Videos that are no squares, from the configuration to the files, the encoded data, the networks and the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_booth.components import Components
from dit_booth.config import DataConfig, RunConfig, SampleConfig, StageConfig, SubjectConfig, TripletsOptions
from dit_booth.config.parse import parse, to_argv
from dit_booth.data.example import Loader
from dit_booth.pipeline import Pipeline
from dit_booth.sampling.prompts import requests_of, sample_prompts
from dit_booth.testing.tiny import trial
from dit_booth.training.address import encoding_address
from dit_booth.training.distributed import Ranks
from dit_booth.training.encoded import EncodedData, encode_data
from dit_booth.training.inputs import generator_of, make_inputs

torch.set_num_threads(1)
SIZE = (12, 24)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_triplets: Callable[..., Path]) -> DataConfig:
    root = write_triplets(tmp_path_factory.mktemp("wide") / "data", ["a box", "one box"], "box")
    triplets = TripletsOptions(root=str(root), stride=1)
    return DataConfig(kind="triplets", frames=3, size=SIZE, variations=1, triplets=triplets)


def components_of(backbone: str, data: DataConfig) -> Components:
    components = trial("kv_concat", backbone).components
    config = components.config
    return replace(components, config=replace(config, data=data, sampler=replace(config.sampler, steps=1)))


def test_a_size_is_a_side_or_height_and_width(data: DataConfig) -> None:
    assert (data.height_width, data.side, data.prompt_side) == (SIZE, 12, 12)
    assert replace(data, image_size=16).prompt_side == 16
    assert DataConfig(size=24).height_width == (24, 24)
    config = RunConfig(data=data, schedule=("fine",))
    assert (
        parse(to_argv({k: v for k, v in config.as_dict().items() if k in ("data", "strategy")})).data == data
    )
    square = replace(config, data=replace(data, size=12))
    assert encoding_address(config) != encoding_address(square)
    for size in ((4, 24), (12, 9000), (12, 24, 3)):
        with pytest.raises(ValueError, match=r"data\.size is \("):
            replace(data, size=size)  # type: ignore[arg-type]


def test_the_toy_world_has_squares_unless_it_is_not_read() -> None:
    with pytest.raises(ValueError, match=r"data\.size is \(12, 24\), and data\.kind toyworld has squares"):
        RunConfig(data=DataConfig(size=SIZE))
    personal = RunConfig(data=DataConfig(size=SIZE), subject=SubjectConfig(prompts=("{} runs",)))
    with pytest.raises(ValueError, match="toyworld has squares"):
        personal.data.build()


def test_one_picture_of_a_subject_is_shown_whole_in_a_wide_frame(data: DataConfig) -> None:
    picture = Path(data.triplets.root) / "masks" / "clip0" / "mask_1.png"
    subject = SubjectConfig(image=str(picture), word="box", augment=False)
    example = subject.build(frames=3, size=SIZE, side=data.prompt_side, seed=0, prior=None)[0]
    assert example.video.shape == (1, 3, *SIZE) and example.image.shape == (3, 12, 12)
    assert torch.equal(example.video[0, :, :, 6:18], example.image)


@pytest.mark.parametrize("backbone", ["dit-factorised", "unet", "wan"])
def test_wide_videos_are_encoded_trained_on_and_sampled(
    data: DataConfig, tmp_path: Path, backbone: str
) -> None:
    components = components_of(backbone, data)
    list(encode_data(components, tmp_path))
    encoded = EncodedData(replace(components.config, data=replace(data, cache=str(tmp_path))))
    rows = [Loader(each, batch_size=2).batch(0) for each in (components.dataset(), encoded)]
    assert rows[0].image.shape == (2, 3, 12, 12)
    files, cached = (
        make_inputs(components, row, StageConfig(), generator_of(0), torch.float32, with_image=True)
        for row in rows
    )
    assert files.x_t.shape[-2:] == (4, 8) and torch.equal(files.x_t, cached.x_t)
    loss = files.loss(components.objective, files.predict(components.model))
    loss.backward()
    assert torch.isfinite(loss) and any(p.grad is not None for p in components.model.parameters())

    requests = requests_of(components, SampleConfig(videos=1))
    assert requests[0].truth is not None and requests[0].truth.shape[-2:] == SIZE
    (case,) = sample_prompts(
        components, SampleConfig(), requests, tmp_path, Ranks(0, 1, torch.device("cpu"))
    ).values()
    assert case.video.shape == (3, 3, *SIZE)
    pipe = Pipeline(**vars(components))
    assert pipe(requests[0].image, "a box", subject="box").frames.shape == (3, *SIZE, 3)
