"""Weights in and out: what is listed when they do not fit, and that a file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dit_booth.files import write_text
from dit_booth.models import pretrained, weights
from dit_booth.models.pretrained import load_pretrained
from dit_booth.models.weights import load_strictly, part, read, write


def layer(seed: int = 0, width: int = 3) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(2, width)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "w.safetensors"
    x = torch.randn(4, 6)
    state = {
        "a": nn.Parameter(x),
        "b": x.bfloat16(),
        "n": torch.tensor([3, 4]),
        "t": x.T,
    }
    write(file, state, {"stage": "fine"})
    back = read(file)
    assert set(back) == set(state)
    assert torch.equal(back["a"], x) and torch.equal(back["t"], x.T)
    assert back["b"].dtype == torch.float32 and torch.equal(back["b"], x.bfloat16().float())
    assert back["n"].dtype == torch.int64 and back["n"].tolist() == [3, 4]
    assert [p.name for p in file.parent.iterdir()] == ["w.safetensors"], "no .part is left"


@pytest.mark.parametrize("metadata", [None, {}, {"stage": "fine"}])
def test_a_file_may_hold_nothing(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    write(tmp_path / "w.safetensors", {}, metadata)
    assert read(tmp_path / "w.safetensors") == {}


def test_a_cut_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.safetensors"
    write(file, {"a": torch.zeros(2)})

    def cut(state: object, path: Path, metadata: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        write(file, {"a": torch.ones(2)})
    assert torch.equal(read(file)["a"], torch.zeros(2))


def test_text_is_written_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_truncated_or_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    write(file, {"a": torch.randn(100)})
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(
        ValueError, match=r"w\.safetensors cannot be read as safetensors.*cut off: copy it again"
    ):
        read(file)
    with pytest.raises(ValueError, match=r"none\.safetensors cannot be read"):
        read(tmp_path / "none.safetensors")


def test_another_architecture_is_listed() -> None:
    target = nn.Sequential(layer(), layer(1), layer(2))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = dict(target.state_dict())
    state["0.weight"] = torch.zeros(3, 5)
    del state["1.bias"], state["2.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(22)}
    with pytest.raises(ValueError) as error:
        load_strictly(target, state, "weights=x: some.safetensors")
    message = str(error.value)
    assert message.startswith("weights=x: some.safetensors: the weights are of another architecture: ")
    assert "2 missing (1.bias, 2.bias)" in message
    names = ", ".join(f"extra.{i}" for i in range(20))
    assert f"22 unexpected ({names}, ...)" in message
    assert "1 of another shape (0.weight: (3, 5) in the file, (3, 2) here)" in message
    assert "weights=none" in message
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items()), "nothing is half loaded"


def test_partial_loading_forgives_only_what_is_missing() -> None:
    target, source = nn.Sequential(layer(), layer(1)), layer(7)
    untouched = target[0].weight.clone()
    load_strictly(target, {"1.weight": source.weight}, "x", partial=True)
    assert torch.equal(target[1].weight, source.weight)
    assert torch.equal(target[0].weight, untouched)
    with pytest.raises(ValueError, match=r"1 unexpected \(2\.weight\)"):
        load_strictly(target, {"2.weight": source.weight}, "x", partial=True)
    with pytest.raises(ValueError, match="4 missing"):
        load_strictly(target, {}, "x")


def test_load_pretrained_takes_a_file_or_a_run_folder(tmp_path: Path) -> None:
    backbone, text = layer(1), layer(2)
    file = tmp_path / "weights.safetensors"
    write(
        file,
        {
            f"{p}.{k}": v
            for p, m in (("backbone", backbone), ("text", text))
            for k, v in m.state_dict().items()
        },
    )
    for source in (file, tmp_path):
        new, words = layer(8), layer(9)
        load_pretrained(new, words, str(source), "dit")
        assert torch.equal(new.weight, backbone.weight)
        assert torch.equal(words.weight, text.weight)
    write(file, {f"backbone.{k}": v for k, v in backbone.state_dict().items()})
    new, words = layer(8), layer(9)
    load_pretrained(new, words, str(file), "dit")
    assert torch.equal(new.weight, backbone.weight)
    assert torch.equal(words.weight, layer(9).weight), "a file without a text encoder leaves it"
    load_pretrained(new, words, "none", "dit")
    assert torch.equal(new.weight, backbone.weight)


def test_load_pretrained_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"weights is '.*nowhere'.*use embedded, none, a run folder"):
        load_pretrained(layer(), layer(), str(tmp_path / "nowhere"), "dit")
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a file"):
        load_pretrained(layer(), layer(), str(tmp_path), "dit")
    monkeypatch.setattr(pretrained, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"no unet weights are embedded; use none"):
        load_pretrained(layer(), layer(), "embedded", "unet")
    write(tmp_path / "dit.safetensors", {"backbone.weight": torch.zeros(4, 2)})
    with pytest.raises(
        ValueError, match=r"dit\.safetensors for the dit backbone: .*1 missing \(bias\).*\(4, 2\) in the file"
    ):
        load_pretrained(layer(), layer(), "embedded", "dit")


def test_part() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    assert part({"x.a.x.a": a, "y.x.a": b}, "x.a.") == {"x.a": a}


def test_strict_loading_of_some_names() -> None:
    target = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = {"1.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match=r"x: .*1 missing \(1\.bias\); mend it$"):
        load_strictly(target, state, "x", names=["1.weight", "1.bias"], fix="mend it")
    load_strictly(target, state, "x", names=["1.weight"])
    assert not target[1].weight.any() and target[0].weight.any()
