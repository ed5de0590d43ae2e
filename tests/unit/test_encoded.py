"""Encoded data: training inputs equal those of the files, bit for bit, without the encoders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from disk import full_disk

from dit_booth import components as components_module
from dit_booth.components import Components, build
from dit_booth.config import DataConfig, RunConfig, StageConfig, TrainConfig, TripletsOptions
from dit_booth.data.example import Loader
from dit_booth.models.autoencoder.config import AutoencoderConfig
from dit_booth.models.clip.config import ClipConfig
from dit_booth.training import encoded
from dit_booth.training.encoded import EncodedData, encode_data
from dit_booth.training.inputs import Inputs, generator_of, make_inputs

torch.set_num_threads(1)
STAGE = StageConfig(drop=0.3, frames=2)


def with_cache(config: RunConfig, cache: Path | str, **changes: object) -> RunConfig:
    return replace(config, data=replace(config.data, cache=str(cache), **changes))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, write_triplets: Callable[..., Path]) -> RunConfig:
    from diffusers import AutoencoderKL

    root = tmp_path_factory.mktemp("encoded")
    write_triplets(root / "data", [f"a box number {i}" for i in range(5)], "box")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "layers_per_block": 1}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    AutoencoderKL(**sizes, **blocks).save_pretrained(root / "vae")
    triplets = TripletsOptions(root=str(root / "data"), stride=2)
    return RunConfig(
        strategy="none",
        weights="none",
        clip=ClipConfig(pretrained="none"),
        autoencoder=AutoencoderConfig(kind="kl", path=str(root / "vae"), posterior="sample"),
        data=DataConfig(kind="triplets", frames=3, size=16, variations=2, triplets=triplets),
        train=TrainConfig(batch_size=2),
    )


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Components:
    return build(config)


@pytest.fixture(scope="module")
def cache(whole: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    lines = list(encode_data(whole, folder))
    assert lines[0].startswith("5 examples, 2 variations") and "--data.variations 2" in lines[1]
    return folder


def inputs_of(components: Components, dataset: object, number: int) -> Inputs:
    loader = Loader(dataset, batch_size=2, seed=3)  # type: ignore[arg-type]
    draws = [generator_of(0, row) for row in loader.positions(number)]
    return make_inputs(components, loader.batch(number), STAGE, draws, torch.float32, with_image=True)


def test_training_inputs_are_equal_bit_for_bit_and_no_encoder_is_built(
    config: RunConfig, whole: Components, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lean_config = with_cache(config, cache)
    lean = build(lean_config)
    monkeypatch.setattr(components_module, "build_autoencoder", None)
    monkeypatch.setattr(components_module, "build_clip", None)
    files, data = whole.dataset(), EncodedData(lean_config)
    assert len(files) == len(data) == 5
    dropped = 0
    for number in range(12):  # more than four epochs: both variations, twice
        wanted, made = inputs_of(whole, files, number), inputs_of(lean, data, number)
        assert made.reference is not None and wanted.reference is not None
        for name in ("x_t", "timestep", "x0", "eps", "t"):
            assert torch.equal(getattr(made, name), getattr(wanted, name)), name
        for name in ("image", "embedding", "latent", "noisy"):
            assert torch.equal(getattr(made.reference, name), getattr(wanted.reference, name)), name
        assert all(map(torch.equal, made.reference.states, wanted.reference.states))
        assert torch.equal(made.prompt.ids, wanted.prompt.ids)
        dropped += int((~wanted.reference.present).sum())
    assert 0 < dropped < 24
    assert lean.built_autoencoder is None and lean.built_image_encoder is None


def test_several_image_prompts_are_encoded_each(config: RunConfig, whole: Components, tmp_path: Path) -> None:
    from PIL import Image

    references = Path(config.data.triplets.root) / "references" / "clip1"
    references.mkdir(parents=True)
    try:
        for number, colour in enumerate(("red", "lime", "blue")):
            Image.new("RGB", (9, 12), colour).save(references / f"{number}.png")
        several = replace(whole, config=replace(config, data=replace(config.data, image_prompts=2)))
        list(encode_data(several, tmp_path))
        data = EncodedData(with_cache(several.config, tmp_path))
        wanted, made = inputs_of(several, several.dataset(), 1), inputs_of(several, data, 1)
    finally:
        shutil.rmtree(references.parent)
    assert wanted.reference is not None and made.reference is not None
    for ours, theirs in zip(made.reference.all, wanted.reference.all, strict=True):
        for name in ("image", "embedding", "latent"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert len(made.reference.all) == 2 and torch.equal(made.x_t, wanted.x_t)


def test_encoders_are_built_when_sampling_needs_them(
    config: RunConfig, whole: Components, cache: Path
) -> None:
    lean = build(with_cache(config, cache))
    assert lean.autoencoder is lean.autoencoder and lean.autoencoder.factor == whole.autoencoder.factor
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(lean.autoencoder.moments(image[None]), whole.autoencoder.moments(image[None]))


@pytest.mark.parametrize(
    "change", [{"size": 24}, {"frames": 2}, {"variations": 3}, {"seed": 1}, {"triplets": None}]
)
def test_a_cache_of_other_settings_is_refused(
    config: RunConfig, cache: Path, change: dict[str, object]
) -> None:
    if "triplets" in change:
        change = {"triplets": replace(config.data.triplets, stride=1)}
    with pytest.raises(ValueError, match=r"data\.cache is .* encoded from other data"):
        EncodedData(with_cache(config, cache, **change))


def test_a_cache_of_another_encoder_or_file_is_refused(config: RunConfig, cache: Path) -> None:
    other = replace(config, autoencoder=replace(config.autoencoder, posterior="mode"))
    with pytest.raises(ValueError, match="encoded from other data"):
        EncodedData(with_cache(other, cache))
    list_file = Path(config.data.triplets.root) / "all.csv"
    text = list_file.read_text()
    try:
        list_file.write_text(text.replace("number 0", "number 9"))
        with pytest.raises(ValueError, match="encoded from other data"):
            EncodedData(with_cache(config, cache))
    finally:
        list_file.write_text(text)


def test_the_cache_does_not_change_a_runs_name(config: RunConfig, cache: Path) -> None:
    assert with_cache(config, cache).fingerprint() == config.fingerprint()


def test_a_folder_without_an_index_and_data_without_files(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no index\.json; make it"):
        build(with_cache(config, tmp_path))
    with pytest.raises(ValueError, match="toyworld has no files"):
        DataConfig(cache=str(tmp_path))


def test_what_changes_in_every_epoch_cannot_be_encoded(whole: Components, tmp_path: Path) -> None:
    endless = replace(whole, config=with_cache(whole.config, "", variations=0))
    with pytest.raises(ValueError, match=r"data\.variations is 0"):
        list(encode_data(endless, tmp_path))


def test_a_full_disk_leaves_no_half_file_and_the_same_command_goes_on(
    whole: Components, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "PER_SHARD", 2)
    with monkeypatch.context() as full:
        save, calls = encoded.write, []

        def fill(file: Path, *rest: object) -> None:
            calls.append(file)
            with full_disk(1000) if len(calls) == 2 else nullcontext():
                save(file, *rest)

        full.setattr(encoded, "write", fill)
        with pytest.raises(OSError, match=r"shard-00001.*cannot be written.*too large"):
            list(encode_data(whole, tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["shard-00000.safetensors"]
    before = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    list(encode_data(whole, tmp_path))
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == before
    data = EncodedData(with_cache(whole.config, tmp_path))
    wanted = inputs_of(whole, whole.dataset(), 3)
    assert torch.equal(inputs_of(whole, data, 3).x_t, wanted.x_t)
