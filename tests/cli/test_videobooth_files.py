"""VideoBooth's recipe and its sampling, as a user with the official files runs them; here all of it is tiny."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import official
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dit_booth.config.parse import parse
from dit_booth.data.video import probe
from dit_booth.models.upstream.stable_diffusion import to_diffusers
from dit_booth.models.upstream.videobooth import to_videobooth
from dit_booth.models.weights import part

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
FIDELITY = ROOT / "docs" / "fidelity.md"
RECIPE, SAMPLING = (f"experiments/configs/videobooth_{name}.yaml" for name in ("unet", "sample"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, write_triplets: Any) -> Path:
    """What a user has: Stable Diffusion, CLIP, ELITE's mapper, VideoBooth's two files, and a data set."""
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    official.write_sd(folder / "sd")
    official.write_transformers(folder / "clip", official.randomised(official.clip_model()), "")
    official.write_elite(folder / "global_mapper.pt")
    official.write_videobooth(folder)
    write_triplets(folder / "data", [f"a dog is walking, take {number}" for number in range(2)], "dog")
    return folder


def tiny(files: Path) -> list[str]:
    """On top of either YAML file: small sizes, and where the files are."""
    flags = f"""
        --unet.channels 8 16 --unet.layers-per-block 1 --unet.heads 2 --unet.norm-groups 4
        --unet.down-attention True False --data.frames 3 --data.triplets.stride 1 --data.size 16 --data.workers 0
        --train.batch-size 2 --sample.videos 1 --sampler.steps 2 --clip.model dit-booth-tiny
        --clip.pretrained {files}/clip --autoencoder.path {files}/sd --autoencoder.subfolder vae
        --data.triplets.root {files}/data
    """
    return flags.split()


@pytest.fixture(scope="module")
def python(program: Any) -> Callable[..., str]:
    """Run a script as one process; what it printed."""

    def run(*arguments: str) -> str:
        ended = program.python(*arguments)
        assert ended.code == 0, ended.output
        return str(ended.output)

    return run


def written(folder: Path) -> dict[str, Tensor]:
    """A run folder's weights, under the names of the whole model."""
    strategy = load_file(folder / "strategy.safetensors")
    return load_file(folder / "weights.safetensors") | {f"strategy.{k}": v for k, v in strategy.items()}


def test_the_recipe_trains_both_stages_from_stable_diffusion_and_elite(
    files: Path, python: Callable[..., str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    short = ["--stages.coarse.steps", "1", "--stages.fine.steps", "1"]
    start = ["--weights", str(files / "sd"), "--strategy-weights", str(files / "global_mapper.pt")]
    said = python("experiments/run.py", "--config", RECIPE, *tiny(files), *short, *start, "--out", str(run))
    assert "token_replacement+kv_concat on unet, ranks: 1, stages: coarse fine" in said
    assert "ELITE's mapper; the text attention's K/V stay the backbone's" in said
    assert "first step of coarse" in said and "first step of fine" in said
    ours, image = written(run), official.image_unet().from_pretrained(files / "sd" / "unet").state_dict()
    spatial = to_diffusers(part(ours, "backbone."))
    assert set(spatial) == set(image) and all(torch.equal(spatial[name], image[name]) for name in image)
    # A step at 1e-4 moves a parameter by about as much (AdamW), from where the official files put it.
    elite = torch.load(files / "global_mapper.pt")["mapping_patch_2.3.weight"]
    mapper = ours["strategy.token_replacement.mapper.mapping_patch_2.3.weight"]
    assert 0 < (mapper - elite).abs().max() < 1e-3
    site = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    for tap in ("to_k_new", "to_v_exemplar"):
        moved = ours[f"strategy.kv_concat.taps.{site}.{tap}.weight"] - image[f"{site}.{tap[:4]}.weight"]
        assert 0 < moved.abs().max() < 1e-3, tap
    assert probe(run / "samples" / "000-seed0.mp4").frames == 3


def test_sampling_from_videobooths_files(files: Path, python: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    unet, mapper = (str(files / name) for name in ("watermark_remove_module.pt", "mapper.pt"))
    start = ["--weights", unet, "--strategy-weights", mapper]
    said = python("experiments/run.py", "--config", SAMPLING, *tiny(files), *start, "--out", str(run))
    assert "first step" not in said, "nothing is trained"
    exported = to_videobooth(written(run))
    for key, file in (("ema_unet", unet), ("ema", mapper)):
        state = torch.load(file)[key]
        assert set(exported[key]) == set(state)
        assert all(torch.equal(exported[key][name], state[name]) for name in state), key
    assert probe(run / "samples" / "000-seed0.mp4").frames == 3
    picture = np.full((20, 16, 3), 255, np.uint8)
    picture[5:15, 4:12] = (200, 30, 30)
    Image.fromarray(picture).save(tmp_path / "panda.png")
    own = ["--image", str(tmp_path / "panda.png"), "--caption", "a panda is running", "--subject", "panda"]
    assert probe(python("experiments/sample.py", str(run), *own).strip().splitlines()[-1]).frames == 3


def test_sampling_as_the_release_does(files: Path, tmp_path: Path, in_process: Any) -> None:
    """The command of docs/fidelity.md with all its switches; the U-Net under the key of a training checkpoint."""
    state = torch.load(files / "watermark_remove_module.pt")["ema_unet"]
    torch.save({"ema": state, "args": {"lr": 1e-4}}, tmp_path / "unet.pt")
    (command,) = re.findall(r"```bash\n(python experiments/run.py .*?)```", FIDELITY.read_text(), re.DOTALL)
    given = {"watermark_remove_module.pt": tmp_path / "unet.pt", "mapper.pt": files / "mapper.pt"}
    words = [str(given.get(word, word)) for word in shlex.split(command.replace("\\\n", ""))]
    assert words[:4] == ["python", "experiments/run.py", "--config", SAMPLING]
    ended = in_process(*words[2:], *tiny(files), "--out", str(tmp_path / "run"))
    assert ended.code == 0, ended.output
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert settings["guidance"] | {"channels": 3, "unconditional": "omit"} == settings["guidance"]
    assert settings["kv_concat"]["reference_frames"] == 16
    assert settings["token_replacement"]["compat"] == "videobooth"
    ours = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(torch.equal(ours[f"backbone.{name}"], tensor) for name, tensor in state.items())
    assert probe(tmp_path / "run" / "samples" / "000-seed0.mp4").frames == 3


def test_half_of_the_files_do_not_sample(files: Path, tmp_path: Path, in_process: Any) -> None:
    """A mapper of the first stage: the second one's keys and values would silently be the backbone's."""
    mapper = torch.load(files / "mapper.pt")["ema"]
    coarse = {name: t for name, t in mapper.items() if not name.endswith(("_new.weight", "_exemplar.weight"))}
    assert len(coarse) < len(mapper)
    torch.save({"ema": coarse}, tmp_path / "mapper.pt")
    start = ["--weights", str(files / "watermark_remove_module.pt")]
    start += ["--strategy-weights", str(tmp_path / "mapper.pt"), "--out", str(tmp_path / "run")]
    ended = in_process("--config", SAMPLING, *tiny(files), *start)
    assert ended.code == 1
    (line,) = ended.errors()
    assert "stages.fine.steps is 0, but neither weights nor strategy_weights has kv_concat.taps (" in line
    assert "--strategy-weights, or train it with --stages.fine.steps" in line
    assert not (tmp_path / "run" / "run.yaml").exists()


@pytest.mark.parametrize("file", [RECIPE, SAMPLING])
def test_the_files_hold_the_papers_settings(file: str) -> None:
    config = parse(["--config", str(ROOT / file)])
    data, train, stages = config.data, config.train, config.stages
    assert (data.frames, data.triplets.stride, data.size) == (16, 4, 256)
    assert (train.batch_size, train.clip, train.weight_decay) == (16, 0.1, 0.0)
    assert (stages.coarse.lr, stages.fine.lr, stages.coarse.drop, stages.fine.drop) == (1e-4, 1e-4, 0.0, 0.1)
    assert (config.objective.kind, config.objective.beta_schedule) == ("eps", "linear")
    assert (config.sampler.kind, config.sampler.steps, config.guidance.scale) == ("ddpm", 250, 4.0)
    assert config.options()["token_replacement"].l1_weight == 0.01  # type: ignore[attr-defined]
    sampling = file == SAMPLING
    assert config.unet.watermark == sampling
    assert (stages.coarse.steps == 0) == (stages.fine.steps == 0) == sampling
