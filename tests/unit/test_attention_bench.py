"""The attention benchmark: its competitors compute the same, and it writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from attention_oracle import dense

from dit_booth.attention import Segment
from experiments.bench import attention as bench
from experiments.bench.measure import Times, interleaved, matmul_peak, peak_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize("plan", ["first", "self", "first+previous", "window(3)", "all"])
@pytest.mark.parametrize("image", [0, 5])
def test_competitors_compute_the_same(plan: str, image: int) -> None:
    case = bench.AttentionCase(plan, 6, 7, image, head=16, heads=2)
    tensors = case.tensors(torch.float64, CPU)
    q, k, v, image_k, image_v = tensors
    segments = [Segment(k, v, case.frame_plan)]
    segments += [Segment(image_k, image_v, ((0,),) * 6)] if image else []
    exact = dense(q, segments)
    most = max(map(len, case.frame_plan))
    full = [i for i, groups in enumerate(case.frame_plan) if len(groups) == most]
    assert set(bench.competitors(case, "cpu")) == {"segments", "cat+repeat", "cat+expand", "dense mask"}
    for name, run in bench.competitors(case, "cpu").items():
        frames = (
            full if name.startswith("cat") else range(6)
        )  # concatenation repeats a key of the first frames
        assert (run(case, *tensors) - exact)[:, list(frames)].abs().max() < 1e-12, name


def test_flops_count_the_scores_that_are_wanted() -> None:
    case = bench.AttentionCase("first+previous", 16, 1024, 1024)
    assert case.flops(False) == 4 * 1024**2 * 64 * 8 * (1 + 1 + 2 * 14 + 16)
    assert case.flops(True) == 3.5 * case.flops(False)


def test_the_page_and_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        bench.AttentionCase("first+previous", 4, 16, 16, 16, 1),
        bench.AttentionCase("all", 3, 16, 0, 16, 1),
    ]
    monkeypatch.setattr(bench, "grid", lambda device: cases)
    monkeypatch.setattr(bench, "PLANS", ("first", "self", "all"))
    monkeypatch.setitem(bench.FRAME_SIZES, "cpu", (torch.float32, 16, 1))
    monkeypatch.setattr(bench, "matmul_peak", lambda *_, **__: 1e9)
    threads = torch.get_num_threads()
    try:
        bench.main(
            bench.AttentionArguments(table=tmp_path / "attention_cpu.md", rounds=2, threads=1, clock="cpu")
        )
    finally:
        torch.set_num_threads(threads)
    page = (tmp_path / "attention_cpu.md").read_text()
    assert "x the time of cat+repeat" in page
    assert "| first | forward+backward |" in page
    rows = [json.loads(line) for line in (tmp_path / "attention_cpu.jsonl").read_text().splitlines()]
    compared = [row for row in rows if "what" in row]
    assert {(r["plan"], r["what"], r["pass"]) for r in compared} >= {
        ("all", "segments", "forward"),
        ("first+previous", "dense mask", "forward+backward"),
    }
    assert all(row["peak_mib"] > 0 and row["share_of_matmul"] > 0 for row in compared)
    growth = [row["growth_of_work"] for row in rows if "what" not in row]
    assert growth == [0.0] * 4


def test_no_further_case_is_begun_when_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [bench.AttentionCase("first", 2, 8, 0, 16, 1), bench.AttentionCase("self", 2, 8, 0, 16, 1)]
    monkeypatch.setattr(bench, "grid", lambda device: cases)
    monkeypatch.setattr(bench, "cost_in_frames", lambda options: [])
    monkeypatch.setattr(bench, "matmul_peak", lambda *_, **__: 1e9)
    bench.main(bench.AttentionArguments(out=tmp_path, budget=0.0, rounds=1, threads=1))
    rows = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert {row["plan"] for row in rows} == {"first"}


# ---- measuring ---------------------------------------------------------------------------------------------


def test_competitors_run_in_turn() -> None:
    ran: list[str] = []
    jobs = {name: lambda name=name: ran.append(name) for name in "ab"}
    times = interleaved(jobs, 3, CPU)
    assert ran == ["a", "b", "a", "b", "b", "a", "a", "b"], "a warm-up, then rounds in alternating order"
    assert {len(t.seconds) for t in times.values()} == {3}
    assert Times((1.0, 2.0, 9.0)).over(Times((2.0, 2.0, 3.0))) == 1.0
    assert (Times((3.0, 1.0, 2.0)).best, Times((3.0, 1.0, 2.0)).median) == (1.0, 2.0)


def test_peak_memory_is_that_of_the_tensors_alive_at_once() -> None:
    def job() -> torch.Tensor:
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b + 1

    assert 2.0 <= peak_memory(job, CPU) / 2**20 < 2.1


def test_matmul_peak_is_a_rate() -> None:
    assert 1e8 < matmul_peak(torch.float32, CPU, rounds=1) < 1e14
