"""``--token-replacement.compat videobooth`` in a real run: how a subject is found, from the data to the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dit_booth.strategies.token_replacement import ReplaceSubject
from PIL import Image

from dit_booth.inject import PromptTokens
from dit_booth.models.clip.tokenizer import Tokenizer
from dit_booth.pipeline import Pipeline

pytestmark = pytest.mark.slow
COMPAT = ["--token-replacement.compat", "videobooth"]
PLURAL = ["two polar bears walk", "polar bears in the snow"]
"""No caption has the whole subject: after "polar", CLIP's token is "bears"."""


def on(data: Path, out: Path) -> list[str]:
    return [
        "--data.kind",
        "triplets",
        "--data.triplets.root",
        str(data),
        "--data.triplets.stride",
        "1",
        "--out",
        str(out),
    ]


def ids(text: str) -> tuple[int, ...]:
    """The begin token and the text's own."""
    tokenizer = Tokenizer(24, 2048)
    row = tokenizer([text]).ids[0].tolist()
    return tuple(row[: row.index(tokenizer.end)])


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, ...]]:
    """The ids, up to the first end token, that the taps hand on: -1 is one of the image's words."""
    seen: set[tuple[int, ...]] = set()
    inner = ReplaceSubject.forward

    def forward(self: ReplaceSubject, prompt: PromptTokens, condition: Any) -> PromptTokens:
        out = inner(self, prompt, condition)
        rows = out.ids.tolist()
        seen.update(tuple(row[: row.index(prompt.ids[0, -1].item())]) for row in rows)
        return out

    monkeypatch.setattr(ReplaceSubject, "forward", forward)
    return seen


def test_a_run_finds_the_subject_by_its_first_token(
    in_process: Any, tiny: list[str], write_triplets: Any, replaced: set[Any], tmp_path: Path
) -> None:
    data = write_triplets(tmp_path / "data", PLURAL, "polar bear")
    refused = in_process(*tiny, *on(data, tmp_path / "default"))
    assert refused.code == 1
    (line,) = refused.errors()
    assert "2 of 2 examples" in line and "data.triplets.max_broken is 0" in line
    assert "'two polar bears walk' does not contain the subject 'polar bear' as whole words" in refused.output
    assert not replaced, "no pass through the network"

    ended = in_process(*tiny, *on(data, tmp_path / "run"), *COMPAT)
    assert ended.code == 0, ended.output
    image = [-1] * 5
    assert (*ids("two"), *image, *ids("walk")[1:]) in replaced, "two polar bears walk"
    assert (*ids(""), *image, *ids("in the snow")[1:]) in replaced, "polar bears in the snow"
    assert ids("None") in replaced, "the null prompt has no subject"

    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "bear.png")
    image_file, bear = tmp_path / "bear.png", "polar bear"
    replaced.clear()
    pipe = Pipeline.load(tmp_path / "run")
    pipe(image_file, "two polar bears", subject=bear)
    assert (*ids("two"), *image) in replaced
    with pytest.raises(ValueError, match="not even the first token 'polar' of subject 'polar bear'"):
        pipe(image_file, "two bears", subject=bear)
    with pytest.raises(ValueError, match="subject 'polar bear' is not in caption 'two polar bears'"):
        default = Pipeline.load(tmp_path / "run", settings={"token_replacement": {"compat": ""}})
        default(image_file, "two polar bears", subject=bear)


def test_a_run_refuses_a_caption_without_even_the_first_token(
    in_process: Any, tiny: list[str], write_triplets: Any, tmp_path: Path
) -> None:
    data = write_triplets(tmp_path / "data", [*PLURAL, "a cold night"], "polar bear")
    ended = in_process(*tiny, *on(data, tmp_path / "run"), *COMPAT)
    assert ended.code == 1
    (line,) = ended.errors()
    assert "1 of 3 examples" in line and "data.triplets.max_broken is 0" in line
    assert "clip2: the caption has none of the mask's labels ('polar bear')" in ended.output
    assert (
        "not even the first token 'polar' of subject 'polar bear' is in caption 'a cold night'"
        in ended.output
    )
