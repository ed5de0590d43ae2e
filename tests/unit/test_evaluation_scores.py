"""A case, its scores, their summary and file; PSNR."""

import math
from dataclasses import replace

import pytest
import torch

from dit_booth.data.toyworld import Toyworld, ToyworldConfig
from dit_booth.evaluation import score, summary
from dit_booth.evaluation.case import Case, Values
from dit_booth.evaluation.pixels import psnr, psnr_scores
from dit_booth.evaluation.scores import Score, read_scores, write_scores

torch.set_num_threads(1)


def test_psnr_in_decibels():
    a = torch.zeros(2, 3, 4, 4)
    assert psnr(a, a + 0.2) == pytest.approx(20, abs=1e-4)  # peak 2, error 0.2
    assert psnr(a, a) == math.inf
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(a, a[:1])


def case(index: int = 0, frames: int = 3, **fields) -> Case:
    example = Toyworld(ToyworldConfig(size=16, frames=frames))[index]
    own = {"image": example.image, "caption": example.caption, "truth": example.video, "prompt": example.key}
    return Case(**{"video": example.video, **own, **fields})


def test_psnr_is_to_the_real_video():
    truth = 0.7 * case().video
    one = case(video=truth + 0.2 * torch.tensor([1.0, 0.1, 0.0]).view(3, 1, 1, 1), truth=truth)
    assert psnr_scores(one)["psnr"] == pytest.approx([20, 40, math.inf], abs=0.1)
    assert psnr_scores(case(truth=None)) == psnr_scores(case().as_truth()) == {}


def test_scores_are_kept_frame_by_frame():
    def scorer(one: Case) -> dict[str, Values]:
        return {"mean": one.video.mean((1, 2, 3)).numpy(), "frames": float(len(one.video))}

    one = case(noise_seed=2, control="shuffled")
    mean, frames = score(one, [scorer], seed=5)
    assert mean.value == pytest.approx(one.video.mean((1, 2, 3)).tolist())
    assert (frames.value, frames.metric) == (3.0, "frames")
    assert (mean.prompt, mean.seed, mean.noise_seed, mean.control) == (one.prompt, 5, 2, "shuffled")


def test_summary_is_over_prompts():
    def row(prompt: str, value, **fields) -> Score:
        return Score(metric="a", prompt=prompt, value=value, **fields)

    scores = [
        row("x", (0.0, 2.0)), row("x", (math.nan, 3.0), noise_seed=1),  # 1 and 3: one prompt, 2
        row("y", 4.0), row("z", math.nan), row("y", 100.0, control="truth"),
    ]  # fmt: skip
    table = summary(scores)
    assert (table["a"].mean, table["a"].n) == (3, 2)
    assert table["a"].stderr == pytest.approx(1)
    assert summary(scores, "truth")["a"].mean == 100 and math.isnan(summary(scores, "truth")["a"].stderr)
    assert summary([]) == {}


def test_scores_survive_a_file(tmp_path):
    scores = [
        Score(metric="a", value=(math.nan, 0.123456789), prompt="p", point="b", seed=3, control="none"),
        Score(metric="fvd", value=12.5),
    ]
    for name in ("scores.jsonl", "scores.jsonl.gz"):
        write_scores(tmp_path / name, scores)
        first, second = read_scores(tmp_path / name)
        assert math.isnan(first.value[0]) and first.value[1] == 0.123457
        assert replace(first, value=0.0) == replace(scores[0], value=0.0) and second == scores[1]


@pytest.mark.parametrize("line", ["{", '{"metric": "a"}', '{"metric": "a", "value": "b"}', "[]", '{"value": 1}',
                                  '{"metric": "a", "value": 1, "colour": 2}'])  # fmt: skip
def test_a_line_that_is_no_score_is_named(tmp_path, line):
    (tmp_path / "scores.jsonl").write_text('{"metric": "a", "value": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"scores.jsonl:2: no score"):
        read_scores(tmp_path / "scores.jsonl")
    (tmp_path / "scores.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="cannot be read"):
        read_scores(tmp_path / "scores.jsonl.gz")


def test_a_case_is_checked():
    with pytest.raises(ValueError, match=r"video of prompt 'toyworld.*real video \(2, 3, 16, 16\)"):
        case(truth=case(frames=2).video)
    with pytest.raises(ValueError, match="contains NaN"):
        case(video=torch.full((3, 3, 16, 16), math.nan))
    with pytest.raises(ValueError, match=r"video has shape \(3, 1, 16, 16\)"):
        case(video=torch.zeros(3, 1, 16, 16))
