"""`dit_booth.train`: a run from Python, and what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
PROGRAM = """
import os
import sys

os.chdir(sys.argv[1])
import numpy as np
import dit_booth

config = dit_booth.RunConfig.create(
    strategy="kv_concat", kv_concat={"update": "direct"}, weights="none", clip={"pretrained": "none"},
    data={"size": 12, "frames": 3}, stages={"fine": {"steps": 2}}, train={"batch_size": 2},
    sample={"videos": 1}, sampler={"steps": 2}, out="mine",
)
pipe = dit_booth.train(config)
again = dit_booth.train(config)  # finished: only loaded
settings = config.as_dict() | {"out": "other", "train": {"batch_size": 2, "seed": 1}}
other = dit_booth.train(dit_booth.RunConfig.create(settings))  # a second training in one process
assert other.config.folder() == "other" and os.path.isfile("other/finished")
image = np.full((12, 12, 3), 90, np.uint8)
videos = [p(image, "a star is spinning on snow").frames for p in (pipe, again)]
assert np.array_equal(*videos) and videos[0].shape == (3, 12, 12, 3)
print(pipe.config.folder(), pipe.model.active)
try:
    dit_booth.train(dit_booth.RunConfig.create(strategy="kv_concat", stop_after="fine"))
except ValueError as error:
    print(error)
"""


def test_a_run_from_python_is_that_of_the_command_line(program: Any, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(PROGRAM)
    done = program.python(str(tmp_path / "train.py"), str(tmp_path))
    assert done.code == 0, done.output
    lines = done.output.splitlines()
    assert lines[-2:] == [
        "mine ('kv_concat',)",
        "stop_after is 'fine'; leave it empty to train all stages",
    ]
    assert (tmp_path / "mine" / "finished").is_file()
    assert "update: direct" in (tmp_path / "mine" / "run.yaml").read_text()
