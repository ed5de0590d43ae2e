"""From diffusers' folder of a Wan pipeline: settings, latents and videos equal to WanPipeline's, and training on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import wan_pipeline
from einops import rearrange
from PIL import Image
from torch import Tensor

import dit_booth
from dit_booth.components import Components, build
from dit_booth.config import RunConfig
from dit_booth.config.parse import parse
from dit_booth.config.pipeline_folder import pipeline_settings
from dit_booth.data.example import Loader
from dit_booth.data.video import write_video
from dit_booth.diffusion import GuidanceConfig, SamplerConfig
from dit_booth.diffusion.noise import randn
from dit_booth.models.text import umt5
from dit_booth.sampling.generate import FrameSampler
from dit_booth.training import state
from dit_booth.training.address import stages_of
from dit_booth.training.encoded import EncodedData, encode_data
from dit_booth.training.inputs import _region as make_region
from dit_booth.training.inputs import generator_of, make_inputs

torch.set_num_threads(1)
CAPTIONS = ["a red dog runs on the grass", "a polar bear, number 7"]
SEEDS = [3, 4]
FRAMES, HEIGHT, WIDTH, STEPS = 9, 32, 48, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wan")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return wan_pipeline.write(folder, shift=3.0)


@pytest.fixture(scope="module")
def config(theirs: Any, folder: Path) -> RunConfig:
    return RunConfig.create(weights=str(folder), strategy="none", data={"frames": 5, "size": 16}, text=FLOAT)


FLOAT = {"dtype": "float32"}


@pytest.fixture(scope="module")
def ours(config: RunConfig) -> Components:
    return build(config)


def sampler(ours: Components, **options: Any) -> FrameSampler:
    settings: dict[str, Any] = {
        "guidance": GuidanceConfig(scale=4.0),
        "sampler": ours.config.sampler,
        **options,
    }
    size = (FRAMES, HEIGHT, WIDTH)
    images = torch.zeros(2, 3, 16, 16)
    settings["sampler"] = replace(settings["sampler"], steps=STEPS)
    return FrameSampler.build(ours, images, CAPTIONS, [None, None], SEEDS, size=size, **settings)


def sampled(pipe: Any, output: str, negative: str | None = None) -> Tensor:
    """WanPipeline's result from the noise that our sampler draws."""
    draws = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    noise = randn((2, 3, 4, HEIGHT // 8, WIDTH // 8), draws, torch.device("cpu"), torch.float32)
    out: Tensor = pipe(
        prompt=CAPTIONS,
        negative_prompt=negative,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=rearrange(noise, "b f c h w -> b c f h w"),
        output_type=output,
    ).frames
    return out


def test_the_folder_gives_the_settings_that_it_fixes(config: RunConfig, folder: Path) -> None:
    assert config.backbone == "wan" and config.wan.shape == (2, 32, 2, 40) and config.wan.patch == 2
    assert (config.text.kind, config.text.path, config.text_source.path) == ("umt5", "", str(folder))
    source = config.autoencoder_source
    assert (source.kind, source.path, source.subfolder) == ("wan", str(folder), "vae")
    objective = config.objective
    assert (objective.kind, objective.shift, objective.max_timestep) == ("flow", 3.0, 1000)
    assert config.sampler.kind == "unipc" and config.sampler.steps == 50
    again = RunConfig.create(config.as_dict())
    assert again == config and again.fingerprint() == config.fingerprint()
    assert RunConfig.create(weights=str(folder), objective={"shift": 5}).objective.shift == 5.0
    flags = ["--weights", str(folder), "--data.frames", "5", "--text.dtype", "float32", "--strategy", "none"]
    assert parse([*flags, "--data.size", "16"], default_config="demo") == config
    assert parse(["--weights", "none"], default_config="demo").backbone == "dit"


def test_a_configuration_goes_before_the_folder(folder: Path, theirs: Any, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"weights: {folder}\nobjective: {{shift: 7.0}}\ndata: {{frames: 5}}\nstrategy: none\n")
    found = RunConfig.create(file)
    assert found.objective.shift == 7.0 and found.sampler.kind == "unipc" and found.sampler.steps == 50


@torch.no_grad()
def test_ten_guided_steps_of_unipc_are_wan_pipelines(ours: Components, theirs: Any) -> None:
    latents = sampler(ours).latents.next_block()
    expected = rearrange(sampled(theirs, "latent"), "b c f h w -> b f c h w")
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5


@torch.no_grad()
def test_euler_and_a_negative_prompt_down_to_the_pixels(ours: Components, theirs: Any, folder: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = theirs.scheduler
    try:
        theirs.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        expected = sampled(theirs, "pt", negative="a red box")
    finally:
        theirs.scheduler = own
    video = next(
        sampler(
            ours,
            guidance=GuidanceConfig(scale=4.0, negative="a red box"),
            sampler=SamplerConfig(kind="euler", spacing="diffusers"),
        )
    )
    assert video.shape == (2, FRAMES, 3, HEIGHT, WIDTH)
    torch.testing.assert_close(video / 2 + 0.5, expected, rtol=1e-4, atol=1e-4)
    plain = next(sampler(ours, sampler=SamplerConfig(kind="euler", spacing="diffusers")))
    assert (plain - video).abs().max() > 0.01


def test_the_scheduler_of_a_folder(folder: Path, theirs: Any, tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    for name in ("model_index.json", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((folder / name).read_text())
    FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(tmp_path / "scheduler")
    found = pipeline_settings(str(tmp_path))
    assert (
        found["sampler"] == {"kind": "euler", "spacing": "diffusers"} and found["objective"]["shift"] == 5.0
    )
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"scheduler_config\.json is of DDIMScheduler; known are"):
        pipeline_settings(str(tmp_path))
    for name, option in (
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "solver_order": 3}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
    ):
        file, (changed, value) = tmp_path / "scheduler" / "scheduler_config.json", list(option.items())[-1]
        file.write_text(json.dumps({"_class_name": name, **option}))
        with pytest.raises(ValueError, match=rf"scheduler_config\.json has {changed} {value}, our sampler"):
            pipeline_settings(str(tmp_path))
    (tmp_path / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is no configuration of Wan's transformer"):
        pipeline_settings(str(tmp_path))
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": 0.875}))
    with pytest.raises(ValueError, match="is a pipeline of two networks"):
        pipeline_settings(str(tmp_path))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert pipeline_settings(str(tmp_path)) == {} == pipeline_settings("none")


def test_sampling_refuses_what_needs_a_latent_of_every_frame(ours: Components) -> None:
    from dit_booth.config import LongConfig
    from dit_booth.diffusion.start import StartConfig

    with pytest.raises(ValueError, match=r"start\.kind warp needs a latent of every frame"):
        sampler(ours, start=StartConfig(kind="warp"))
    tiled = replace(ours.config, autoencoder=replace(ours.config.autoencoder, tile=64))
    with pytest.raises(
        ValueError, match=r"long\.kind chunks decodes a video in parts.*tile is 64.*set it to 0"
    ):
        sampler(replace(ours, config=tiled), long=LongConfig(kind="chunks"))
    with pytest.raises(ValueError, match=r"frames is 9: the network sees 3, no more than the 3 of sample"):
        sampler(ours, long=LongConfig(kind="chunks", window=4, prefix=3))
    with pytest.raises(ValueError, match=r"sample\.long\.riflex is 8; .*use 5 or 9"):
        sampler(ours, long=LongConfig(riflex=8))
    assert sampler(ours, long=LongConfig(riflex=5)).frames == FRAMES
    for size, says in (
        ((8, 16, 16), r"frames is 8; .* takes 4k \+ 1 frames: use 5 or 9"),
        ((9, 16, 20), "size is 16 x 20 pixels; the autoencoder needs multiples of 8"),
        ((9, 16, 24), r"latents of 2 x 3 cannot be cut into patches of 2; change wan\.patch or data\.size"),
    ):
        with pytest.raises(ValueError, match=says):
            next(
                FrameSampler.build(
                    ours, torch.zeros(1, 3, 16, 16), ["a"], [None], [0],
                    size=size, guidance=GuidanceConfig(), sampler=SamplerConfig(),
                )
            )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", ["chunks", "diffusion_forcing"])
def test_long_videos_in_parts_are_their_latents_decoded_at_once(ours: Components, kind: Any) -> None:
    """Frames 0 to 4, 5 to 12, ..: window and prefix count latent frames. A saved state goes on after any part."""
    from dit_booth.config import LongConfig

    def start() -> FrameSampler:
        return FrameSampler.build(
            ours, torch.zeros(1, 3, 16, 16), CAPTIONS[:1], [None], [3], size=(21, 16, 16),
            guidance=GuidanceConfig(), sampler=SamplerConfig(kind="euler", steps=2),
            long=LongConfig(kind=kind, window=2, prefix=1),
        )  # fmt: skip

    parts, states = [], []
    sampling = start()
    for part in sampling:
        parts.append(part)
        states.append(sampling.state())
    lengths = [part.shape[1] for part in parts]
    assert lengths == ([5, 4, 4, 4, 4] if kind == "chunks" else [5, 8, 8]) and sampling.frames == 21
    latents, whole = start().latents, torch.cat(parts, dim=1)
    found = torch.cat([latents.next_block() for _ in lengths], dim=1)
    torch.testing.assert_close(ours.autoencoder.decode(found).clamp(-1, 1), whole, rtol=1e-4, atol=1e-5)
    again = start()
    again.restore(states[1])
    assert again.done == 5 + lengths[1]
    assert torch.equal(torch.cat(list(again), dim=1), torch.cat(parts[2:], dim=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_triplets: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("wan-data") / "data"
    return write_triplets(root, [f"a red box number {i}" for i in range(2)], "box")


TINY = """
    --data.frames 5 --data.size 16 --data.kind triplets --data.triplets.stride 1 --data.variations 1
    --stages.coarse.steps 2 --stages.fine.steps 2 --train.batch-size 2 --sample.videos 1 --sampler.steps 2
    --text.dtype float32
"""
ON_CPU = """
    --train.compile false --ds-config engines/zero2_bfloat16.json --clip.model dit-booth-tiny --clip.pretrained embedded
    --data.workers 0
"""


def test_both_stages_run_from_the_folder(
    theirs: Any,
    folder: Path,
    data: Path,
    in_process: Any,
    steps_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``deepspeed experiments/run.py --config wan_1.3b --weights FOLDER`` in bfloat16, in this process."""
    dtypes = []

    def spied(*arguments: Any) -> Any:
        engine = make_engine(*arguments)
        parameters = engine.module.parameters(), engine.optimizer.single_partition_of_fp32_groups
        dtypes.append([{p.dtype for p in group} for group in parameters])
        return engine

    make_engine = state.make_engine
    monkeypatch.setattr(state, "make_engine", spied)
    out = tmp_path / "run"
    flags = [
        "--config",
        "wan_1.3b",
        "--weights",
        str(folder),
        "--data.triplets.root",
        str(data),
        *TINY.split(),
    ]
    ended = in_process(*flags, *ON_CPU.split(), "--out", str(out))
    assert ended.code == 0, ended.output
    assert dtypes == [[{torch.bfloat16}, {torch.float32}]] * 2, "parameters, and master weights"
    assert steps_of(out) == [("coarse", 1), ("coarse", 2), ("fine", 1), ("fine", 2)]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in lines if "grad_norm" in line), "through umT5, too"
    scores = [json.loads(line) for line in (out / "samples" / "scores.jsonl").read_text().splitlines()]
    assert {"own_i", "own_t"} <= {line["metric"] for line in scores}
    pipe = dit_booth.load(out, settings={"sampler": {"steps": 2}}, device="cpu")
    video = pipe(torch.zeros(3, 16, 16), "a red box", subject="box", frames=9)
    assert video.frames.shape == (9, 16, 16, 3)
    assert not any(name.startswith("text.") for name in pipe.model.state_dict()), (
        "umT5 is not saved with a run"
    )


def test_the_folders_own_weights_sample_without_training(
    theirs: Any, folder: Path, in_process: Any, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ["--data.frames", "5", "--data.size", "16", "--sampler.steps", "2", "--text.dtype", "float32"]
    ended = in_process("--config", "wan_sample", "--weights", str(folder), *flags, "--out", str(out))
    assert ended.code == 0, ended.output
    video = dit_booth.load(out, device="cpu")(None, "a red dog runs", frames=9, size=(16, 32))
    assert video.frames.shape == (9, 16, 32, 3)


def test_encoded_data_bring_the_text_states(
    theirs: Any, folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--weights",
        str(folder),
        "--data.triplets.root",
        str(data),
        *TINY.split(),
        "--strategy",
        "kv_concat",
    ]
    config = parse(flags, default_config="demo")
    whole, cache = build(config), tmp_path / "cache"
    list(encode_data(whole, cache))
    monkeypatch.setattr(umt5, "load_encoder", None)
    lean = build(replace(config, data=replace(config.data, cache=str(cache))))
    stage = replace(config.stages.fine, drop=0.5, foreground=True)
    outputs = []
    for components, dataset in ((whole, whole.dataset()), (lean, EncodedData(lean.config))):
        components.model.active = ("kv_concat",)
        batch = Loader(dataset, batch_size=2, seed=3).batch(0)  # type: ignore[arg-type]
        draws = [generator_of(0, row) for row in range(2)]
        inputs = make_inputs(components, batch, stage, draws, torch.float32, with_image=True)
        assert inputs.x0.shape == (2, 2, 4, 2, 2) and inputs.region is not None
        outputs.append(inputs.predict(components.model).output)
    torch.testing.assert_close(*outputs)
    assert lean.model.text.frozen._encoder is None and lean.built_autoencoder is None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"frames is 1, but autoencoder\.kind is wan.*cannot be cropped"):
        make_inputs(lean, batch, replace(stage, frames=1), draws, torch.float32, with_image=True)
    with pytest.raises(ValueError, match=r"single_frames is true, but autoencoder\.kind is wan"):
        make_inputs(lean, batch, replace(stage, single_frames=True), draws, torch.float32, with_image=False)


def test_shapes_references_and_text_of_encoded_data_together(
    theirs: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of two shapes, two image prompts of an example or one: all as from the files, without umT5."""
    root = tmp_path / "data"
    for number, width in enumerate((16, 16, 32, 32)):
        video = torch.rand(5, 3, 16, width, generator=torch.Generator().manual_seed(number)) * 2 - 1
        write_video(root / f"clip{number}.mp4", video, fps=8)
        (root / f"clip{number}.txt").write_text(f"a red box, number {number}\nbox\n")
    for number, colour in enumerate(("red", "blue"), 1):
        Image.new("RGB", (9, 12), colour).save(root / f"clip1.{number}.png")
    section = {"frames": 5, "size": 16, "buckets": ["16x16", "16x32"], "image_prompts": 2, "variations": 1}
    triplets = {"root": str(root), "format": "folder", "stride": 1}
    config = RunConfig.create(
        weights=str(folder),
        strategy="in_context",
        data={"kind": "triplets", "triplets": triplets, **section},
        text=FLOAT,
        train={"batch_size": 2},
    )
    whole, cache = build(config), tmp_path / "cache"
    list(encode_data(whole, cache))
    monkeypatch.setattr(umt5, "load_encoder", None)
    lean = build(replace(config, data=replace(config.data, cache=str(cache))))
    stage, shapes, there = replace(config.stages.fine, drop=0.0), set(), []
    for number in range(2):
        outputs = []
        for components, dataset in ((whole, whole.dataset()), (lean, EncodedData(lean.config))):
            batch = Loader(dataset, batch_size=2, seed=3).batch(number)  # type: ignore[arg-type]
            draws = [generator_of(number, row) for row in range(2)]
            inputs = make_inputs(components, batch, stage, draws, torch.float32, with_image=True)
            outputs.append(inputs.predict(components.model).output)
        torch.testing.assert_close(*outputs)
        shapes.add(outputs[0].shape)
        assert inputs.reference is not None
        there += inputs.reference.further[0].present.tolist()
    assert len(shapes) == 2 and there.count(True) == 1
    assert lean.model.text.frozen._encoder is None  # type: ignore[union-attr]


def test_the_mask_of_a_latent_is_the_mean_of_its_frames_masks() -> None:
    mask = torch.zeros(1, 5, 8, 8)
    mask[:, 0], mask[:, 2, :4], mask[:, 4, :, :2] = 1, 1, 1
    share = make_region(["x"], mask, torch.zeros(1, 2, 4, 1, 1))
    assert (share[0, 1] / share[0, 0]).item() == pytest.approx((0.5 + 0.25) / 4)


def test_addresses_follow_the_content_of_the_parts(config: RunConfig, folder: Path, tmp_path: Path) -> None:
    import shutil

    def address(weights: Path) -> str:
        return stages_of(replace(config, strategy="adaln", weights=str(weights)))[0].address

    copy = shutil.copytree(folder, tmp_path / "copy")
    before = address(folder)
    assert address(copy) == before, "not where it lies"
    (copy / "model_index.json").write_text((folder / "model_index.json").read_text() + "\n")
    assert address(copy) == before
    for part in ("text_encoder", "tokenizer", "vae", "transformer"):
        file = copy / part / "added.json"
        file.write_text("{}")
        assert address(copy) != before, part
        file.unlink()
