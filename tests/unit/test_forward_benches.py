"""The benches of forward passes: their jobs run, guidance is guidance, and the pages hold what was measured."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from experiments.bench import dit, load, long, measure, side_by_side, unet, wan
from experiments.bench.side_by_side import Row, SideBySideArguments


def row(job: str) -> Row:
    times = {
        "seconds": 1.5,
        "best": 1.25,
        "over_first": 1.2,
        "peak_mib": 900,
        "matmul_gflops": [210.0, 220.0],
    }
    return {"job": job, "device": "CPU", "threads": 2, "torch": "2", "load": 0.5} | times


def test_the_unets_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        unet, "CONFIG", unet.UNetConfig(channels=(32, 64), text_dim=16, down_attention=(True, False))
    )
    for name, value in (("FRAMES", 3), ("SIDE", 8), ("TOKENS", 5)):
        monkeypatch.setattr(unet, name, value)
    bench = unet.UNetBench()
    for p in bench.net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        out = {name: run() for name, run in bench.jobs().items()}
        null = bench.fine(bench.null)
    assert not torch.allclose(out["plain"], out["fine"])
    assert torch.allclose(out["guided, zero image"], null + 4 * (out["fine"] - null), atol=1e-4)
    assert not torch.allclose(out["guided"], out["guided, zero image"])


def test_loading_a_folder_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "SIZES", {"depth": 2, "hidden": 32, "heads": 2, "ffn": 64})
    monkeypatch.setattr(load, "SHARD", "100kB")
    size = load.write_folder(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    built = load.components_from(str(tmp_path), **load.SIZES)
    assert sum(4 * p.numel() for p in built.model.backbone.parameters()) == pytest.approx(size, rel=0.1)
    assert load.peak_of_loading(str(tmp_path)) >= 0


def test_the_pages_hold_the_bars_and_the_figures() -> None:
    rows = [r | unet.more(r) for r in map(row, ("plain", "fine", "guided", "guided, zero image"))]
    page = unet.page(rows)
    assert "| fine | 1.50 | 1.25 | 1.20 | 210.0 to 220.0 | 900 | 0.33 | 22.0 | 2.99 |" in page
    assert "| guided, zero image | 1.50 | 1.25 | 1.20 | 210.0 to 220.0 | 900 | - | - | - |" in page
    latte = row("interleaved")
    assert dit.more(latte) == {"latte_over_it": 1.19}
    assert "| interleaved | 1.50 | 1.25 | 1.19 | 900 |" in dit.page([latte | dit.more(latte)])


def test_the_page_of_long_videos_holds_their_ratios() -> None:
    figures = {"seconds_per_frame": [0.5, 0.45], "peak_mib": [800.0, 820.0]}
    page = long.page([row("") | {"backbone": "dit", "way": "chunks", "steps": 2} | figures])
    assert "| dit | chunks | 2 | 0.500 | 0.450 | 0.90 | 800 | 820 | 1.02 |" in page


def test_the_dits_job_is_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        dit.CONFIGS, "interleaved", dit.DiTConfig(size="nano", layout="interleaved", plan="self")
    )
    monkeypatch.setattr(dit, "SIDE", 8)
    out = dit.job("interleaved")()
    assert out.shape == (1, dit.FRAMES, dit.CHANNELS, 8, 8)
    assert not out.requires_grad


def test_wans_jobs_and_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan, "CONFIG", wan.WanConfig(depth=1, hidden=32, heads=2, ffn=32))
    for name, value in (("FRAMES", 2), ("SIDE", 4), ("TEXT", 8)):
        monkeypatch.setattr(wan, name, value)
    out = {name: wan.job(name)() for name in wan.JOBS}
    assert all(y.shape == (1, 2, 16, 4, 4) and y.any() for y in out.values())
    rows = [row(name) | {"over_first": over} for name, over in zip(wan.JOBS, (1.0, 0.8, 0.92), strict=True)]
    assert "| reference | 1.50 | 1.25 | 0.92 | 1.15 | 900 | 1.00 |" in wan.page(rows)


def test_jobs_run_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "peak_of_process", lambda module, name, threads: len(name))
    monkeypatch.setattr(side_by_side, "matmul_peak", lambda dtype, device: 2e11)
    ran: list[str] = []
    jobs = {name: partial(partial, ran.append, name) for name in ("one", "three")}
    threads = torch.get_num_threads()
    table = tmp_path / "table.md"
    side_by_side.run(
        SideBySideArguments(rounds=2, threads=threads, table=table),
        "m",
        jobs,
        lambda r: {"x": 1},
        lambda rows: "page",
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(r["job"], r["peak_mib"], r["x"]) for r in rows] == [("one", 3, 1), ("three", 5, 1)]
    assert ran.count("one") == ran.count("three") == 3
    assert table.read_text() == "page" and len(table.with_suffix(".jsonl").read_text().splitlines()) == 2


def test_the_peak_is_this_programs() -> None:
    before = measure.own_peak()
    block = torch.ones(64 * 2**18)  # 64 MiB
    assert measure.own_peak() >= before
    assert 50 < measure.own_peak() < 10**5
    del block
