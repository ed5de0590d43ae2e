"""What can go wrong in a run: each is one line that says what, where and how to mend it, and nothing is lost."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest
import torch
from disk import DiskLog
from safetensors.torch import load_file, save_file

from dit_booth.files import partial_of

pytestmark = pytest.mark.slow


def said(ended, *words: str) -> str:
    """Assert that the program ended with one error line (exit 1, no traceback) with these words; give the line."""
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output, ended.output
    (line,) = ended.errors()
    assert all(word in line for word in words), line
    return str(line)


# ---- settings ----


def test_an_engine_setting_that_the_run_decides(in_process, tiny, tmp_path: Path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 8, "optimizer": {"type": "Adam"}}))
    ended = in_process(*tiny, "--ds-config", str(file), "--out", str(tmp_path / "run"))
    said(ended, str(file), "train_batch_size, optimizer", "--train.batch-size", "--stages.*.lr")


@pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), (None, "is not a file")])
def test_engine_settings_that_cannot_be_read(in_process, tiny, tmp_path: Path, text, words):
    file = tmp_path / "ds.json"
    if text is not None:
        file.write_text(text)
    said(in_process(*tiny, "--ds-config", str(file), "--out", str(tmp_path / "run")), str(file), words)


def test_a_failed_start_does_not_take_the_folder(in_process, tiny, tmp_path: Path):
    """The mended command may use the same --out: nothing was trained there."""
    arguments = [*tiny, "--sample.videos", "0", "--out", str(tmp_path)]
    said(
        in_process(*arguments, "--train.accumulation", "3"),
        "batch_size 2",
        "accumulation 3 x 1 ranks",
        "multiple of 3",
    )
    assert in_process(*arguments, "--stages.base.steps", "0", "--schedule", "base").code == 0


def test_a_glob_that_matches_no_parameter(in_process, tiny, tmp_path: Path):
    ended = in_process(*tiny, "--stages.coarse.train", "backbone.block.*", "--out", str(tmp_path))
    said(ended, "'backbone.block.*' matches none of the", "nearest: backbone.blocks.")


def test_a_stage_that_trains_nothing(in_process, tiny, tmp_path: Path):
    ended = in_process(*tiny, "--strategy", "none", "--schedule", "coarse", "--out", str(tmp_path))
    said(ended, "stage 'coarse' trains nothing", "'none'", "--stages.coarse.train", "--schedule")


def test_a_stage_with_a_strategy_that_the_run_lacks(in_process, tiny, tmp_path: Path):
    ended = in_process(*tiny, "--stages.fine.strategies", "adaln", "--out", str(tmp_path))
    said(ended, "stages.fine.strategies", "'adaln'", "add it with +")


def test_a_plan_that_does_not_parse(in_process, tiny, capfd):
    with pytest.raises(SystemExit) as stopped:
        in_process(*tiny, "--dit.plan", "sideways")
    assert stopped.value.code == 2
    text = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "dit: plan 'sideways': unknown term 'sideways'; use a sum of self, first, previous" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            "--data.size 15",
            ("15 x 15", "factor 2", "14 x 14"),
        ),  # the demo's autoencoder: 2 x 2 pixels a latent
        ("--data.size 10", ("latents of 5 x 5", "patches of 2", "dit.patch or data.size")),
    ],
)
def test_a_size_that_autoencoder_or_backbone_cannot_cut(in_process, tiny, tmp_path: Path, flags: str, words):
    said(in_process(*tiny, *flags.split(), "--out", str(tmp_path)), *words)


def test_a_port_that_is_taken(in_process, tiny, monkeypatch, tmp_path: Path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for name, value in alone.items():
            monkeypatch.setenv(name, value)
        said(in_process(*tiny, "--out", str(tmp_path)), f"port {port} of 127.0.0.1", "--master_port")


# ---- weights ----


@pytest.fixture(scope="module")
def trained(program, tiny, tmp_path_factory) -> Path:
    """The folder of a run that is to be left as it is."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    ended = program.run(*tiny, "--sample.videos", "0", "--out", str(folder))
    assert ended.code == 0, ended.output
    return folder


def test_weights_of_another_architecture(in_process, tiny, tiny_unet, trained: Path, tmp_path: Path):
    out = ["--weights", str(trained), "--out", str(tmp_path)]
    said(in_process(*tiny, *tiny_unet, *out), str(trained), "unet backbone", "another architecture",
         "missing (conv_in", "unexpected (blocks.0", "weights=none")  # fmt: skip
    said(in_process(*tiny, *out, "--dit.size", "S"), "another architecture",
         "missing (blocks.5.", "of another shape (blocks.0.", "(128,) in the file, (384,) here")  # fmt: skip
    assert not (tmp_path / "metrics.jsonl").exists()


def test_weights_that_fit_are_taken(in_process, tiny, trained: Path, tmp_path: Path):
    """The control of the test above: a run folder is a start for another run."""
    out = ["--sample.videos", "0", "--schedule", "fine", "--stages.fine.steps", "0", "--out", str(tmp_path)]
    start = ["--weights", str(trained), "--train.seed", "1"]
    said(in_process(*tiny, *start, *out), "stages.fine.steps is 0", "kv_concat.taps", "--strategy-weights")
    ended = in_process(*tiny, *start, "--strategy-weights", str(trained), *out)
    assert ended.code == 0, ended.output
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (tmp_path, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_weights_that_are_cut_off_or_missing(in_process, tiny, trained: Path, tmp_path: Path):
    file = tmp_path / "cut.safetensors"
    file.write_bytes((trained / "weights.safetensors").read_bytes()[:-100])
    out = ["--out", str(tmp_path / "run")]
    said(in_process(*tiny, "--weights", str(file), *out), str(file), "cut off", "copy it again")
    said(
        in_process(*tiny, "--weights", "none.safetensors", *out),
        "'none.safetensors'",
        "not a file",
        "run folder",
    )


def test_a_checkpoint_is_on_the_disk_before_it_is_the_latest(
    in_process, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else a power cut could leave a latest.json that names empty files, with the checkpoint before it removed."""
    log = DiskLog(monkeypatch)
    flags = ["--schedule", "fine", "--train.checkpoint-every", "1", "--sample.videos", "1"]
    assert in_process(*tiny, *flags, "--train.ema", "0.9", "--out", str(tmp_path)).code == 0
    (latest,) = tmp_path.glob("checkpoints/*/latest.json")
    folder = latest.parent / json.loads(latest.read_text())["tag"]
    files = {*folder.rglob("*"), folder}
    assert len([file for file in files if file.suffix in (".pt", ".safetensors")]) >= 3
    assert files <= log.synced_before(latest)
    results = {*tmp_path.glob("samples/*.mp4"), tmp_path / "samples" / "contact_sheet.png"}
    kept = {path for kind, path in log if kind == "sync"}
    assert {partial_of(file) for file in results} <= kept, "results too, before the marker"
    assert partial_of(tmp_path / "strategy.safetensors") in log.synced_before(tmp_path / "finished")


def test_a_stage_s_weights_that_were_cut_off(in_process, tiny, tmp_path: Path):
    """A finished stage whose file was damaged later is named, not trained over."""
    file = tmp_path / "checkpoints" / "0_coarse" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    save_file({"strategy.x": torch.zeros(3)}, file)
    said(in_process(*tiny, "--out", str(tmp_path)), str(file), "unexpected (strategy.x)")
    file.write_bytes(file.read_bytes()[:-2])
    said(in_process(*tiny, "--out", str(tmp_path)), str(file), "cut off")


def test_a_folder_that_holds_another_run(in_process, tiny, trained: Path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    ended = in_process(
        *tiny, "--sample.videos", "0", "--train.seed", "5", "--stages.fine.lr", "1e-3", "--out", str(trained)
    )
    said(
        ended,
        str(trained),
        "train.seed: 0 there, 5 here",
        "stages.fine.lr: 0.005 there, 0.001 here",
        "--out",
    )
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


# ---- two ranks ----


def test_a_batch_that_the_ranks_cannot_share(program, tiny, tmp_path: Path):
    for number, ended in enumerate(
        program.two_ranks(*tiny, "--train.batch-size", "3", "--out", str(tmp_path))
    ):
        line = said(ended, "batch_size 3 is not divisible by accumulation 1 x 2 ranks; use a multiple of 2")
        assert line.startswith("error on rank 1: " if number else "error: ")


def test_a_loss_that_is_not_finite_ends_every_rank_and_keeps_the_checkpoint(
    program, in_process, tiny, train_all, steps_of, tmp_path: Path
):
    exploding = ["--stages.coarse.lr", "1e3", "--stages.coarse.steps", "50", "--train.clip", "1e9"]
    command = [*tiny, *train_all, *exploding, "--train.checkpoint-every", "1", "--out", str(tmp_path)]
    for ended in program.two_ranks(*command):
        line = said(ended, "--stages.coarse.lr", str(tmp_path / "checkpoints" / "0_coarse"))
        assert re.search(r"the loss is (nan|inf) at step \d+ of stage coarse", line)
    done = steps_of(tmp_path)[-1][1]
    folder = tmp_path / "checkpoints" / "0_coarse"
    assert json.loads((folder / "latest.json").read_text()) == {"tag": f"step{done}", "ranks": 2, "zero": 2}
    assert list((folder / f"step{done}").glob("*optim_states.pt"))
    assert not (folder / "weights.safetensors").exists()

    # A checkpoint of two ranks, continued by one.
    ended = in_process(*command)
    said(
        ended,
        str(folder),
        "written by 2 ranks at ZeRO stage 2",
        "this run has 1",
        "run it as",
        "remove",
    )
    assert (folder / f"step{done}").is_dir()
    assert steps_of(tmp_path)[-1] == ("coarse", done)


# ---- data ----


@pytest.fixture
def triplets(write_triplets, tmp_path: Path) -> Path:
    """Three sound examples in VideoBooth's format."""
    return write_triplets(tmp_path / "data", [f"a dog is walking, take {n}" for n in range(3)], "dog")


def test_a_truncated_video_is_an_error_or_by_request_left_out(
    in_process, tiny, triplets: Path, tmp_path: Path
):
    video = triplets / "videos" / "page" / "clip1.mp4"
    video.write_bytes(video.read_bytes()[:-200])
    data = [
        "--data.kind",
        "triplets",
        "--data.triplets.root",
        str(triplets),
        "--data.triplets.stride",
        "1",
        "--sample.videos",
        "1",
    ]
    arguments = [*tiny, *data, "--out", str(tmp_path / "run")]
    ended = in_process(*arguments)
    said(ended, "1 of 3 examples", str(triplets), "data.triplets.max_broken is 0", "repair or remove")
    assert "clip1.mp4" in ended.output and "truncated" in ended.output

    ended = in_process(*arguments, "--data.triplets.max-broken", "1")
    assert ended.code == 0, ended.output
    assert "1 of 3 examples" in ended.output and "left out" in ended.output and "clip1" in ended.output
    assert (tmp_path / "run" / "samples" / "000-seed0.mp4").is_file()
