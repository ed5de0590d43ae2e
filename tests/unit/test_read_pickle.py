"""Files that torch.save wrote: only tensors are read, and everything else is one line that says what to do."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_booth.models.weights import read_pickle


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (logging.critical, ("a pickle ran code",))


def test_a_pickle_that_needs_code_is_refused_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "unet.pt"
    for extra in (RunsCode(), argparse.Namespace(hook=RunsCode())):
        torch.save({"ema_unet": {"a": torch.zeros(2)}, "args": extra}, file)
        with pytest.raises(
            ValueError, match=r"unet\.pt holds logging\.critical, which only a pickle that runs code"
        ) as error:
            read_pickle(file)
        assert "\n" not in str(error.value)
    assert "a pickle ran code" not in caplog.text


@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_scripts_arguments_may_stand_beside_the_weights(tmp_path: Path, zipped: bool) -> None:
    """As in the checkpoints of DiT's training script, and those made after it."""
    file, weights = tmp_path / "0400000.pt", {"a": torch.randn(3)}
    arguments = argparse.Namespace(lr=1e-4, betas=(0.9, 0.999), data_path="x", resume=None)
    content = {"model": {"a": torch.zeros(3)}, "ema": weights, "opt": {"step": 7}, "args": arguments}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    state, key = read_pickle(file)
    assert key == "ema" and torch.equal(state["a"], weights["a"])
    assert argparse.Namespace not in torch.serialization.get_safe_globals(), "for this file alone"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_broken_pickle_is_refused_in_one_line(tmp_path: Path, zipped: bool) -> None:
    file = tmp_path / "mapper.pt"
    torch.save({"ema": {"a": torch.randn(300)}}, file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    assert read_pickle(file)[0]["a"].shape == (300,) and read_pickle(file)[1] == "ema"
    lengths = [0, 1, 7, 60, 200, len(whole) // 2, len(whole) - 30]
    for content in (
        *(whole[:n] for n in lengths),
        b"version https://git-lfs",
        b"<html>",
        b"hello",
        bytes(500),
    ):
        file.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"mapper\.pt cannot be read as PyTorch weights.*copy it again"
        ) as error:
            read_pickle(file)
        assert "\n" not in str(error.value)


def test_a_pickle_without_weights_says_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    for content, says in (
        ({"optimizer": 1, "epoch": 3}, r"is no state dict itself \(it has: optimizer, epoch\)"),
        ([torch.zeros(2)], r"it has: list"),
        ({"ema": {}}, r"holds no weights under ema_unet or ema"),
        ({"ema": {"a": "b"}}, r"holds no weights"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=says):
            read_pickle(file)
    half = {"a": torch.ones(2, dtype=torch.float16), "n": torch.tensor([1])}
    torch.save(half, file)
    state, key = read_pickle(file)
    assert key == "" and state["a"].dtype == torch.float32 and state["n"].dtype == torch.int64
