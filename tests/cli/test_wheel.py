"""The built wheel in an environment of its own, used from an empty folder: the five lines and the console script."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from warm import AS_INSTALLED

ROOT = Path(__file__).parents[2]
SOURCES = ("dit_booth", "strategies", "experiments/configs", "experiments/baselines", "experiments/sweeps")
FIVE_LINES = """
import dit_booth
pipe = dit_booth.load("toyworld")
video = pipe("star.png", "a star is spinning on a white background", subject="star", seed=0, steps=2)
video.save("star.mp4")
print(video, dit_booth.list_strategies("*kv*"), dit_booth.__file__)
"""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and an empty folder to work in."""

    python: Path
    folder: Path
    wheel: Path

    def run(self, *command: str, code: int = 0) -> str:
        own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        done = subprocess.run(
            [str(self.python.parent / command[0]), *command[1:]],
            cwd=self.folder,
            env=own,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build the wheel from a copy of the sources; install it where its dependencies are, but no editable install."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copytree(
            ROOT / name, folder / "src" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "ds_config.json"):
        shutil.copy(ROOT / name, folder / "src" / name)
    pip = [sys.executable, "-m", "pip"]
    build = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(folder / "src")]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    site = environment / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    # A path file inside a path file's folder is not read: the tests' own editable install stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    shutil.copy(Path(AS_INSTALLED) / "sitecustomize.py", site)
    install = ["--python", str(python), "install", "-q", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*pip, *install, str(wheel)], check=True)
    (folder / "empty").mkdir()
    return Installed(python, folder / "empty", wheel)


def test_no_generic_name_enters_site_packages(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as file:
        names = {name.split("/")[0] for name in file.namelist()}
        files = set(file.namelist())
    assert {name for name in names if not name.endswith(".dist-info")} == {"dit_booth"}
    assert {"dit_booth/configs/demo.yaml", "dit_booth/configs/ds_config.json"} < files
    assert {"dit_booth/baselines/dreambooth.yaml", "dit_booth/configs/subject.yaml"} < files
    assert {"dit_booth/sweeps/schedule.yaml", "dit_booth/strategies/kv_concat.py"} < files
    sources = [(ROOT / "dit_booth", "dit_booth"), (ROOT / "strategies", "dit_booth/strategies")]
    modules = {f"{to}/{file.relative_to(folder)}" for folder, to in sources for file in folder.rglob("*.py")}
    assert modules == {name for name in files if name.endswith(".py")}, "pyproject.toml lists every folder"


def test_the_five_lines_make_a_video(installed: Installed) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[16:48, 16:48] = (220, 40, 40, 255)
    Image.fromarray(pixels).save(installed.folder / "star.png")
    said = installed.run("python", "-c", FIVE_LINES)
    assert "Video(8 frames of 32 x 32" in said and "['kv_concat']" in said
    assert str(installed.python.parents[1]) in said, "the wheel's package, not the checkout's"
    assert (installed.folder / "star.mp4").stat().st_size > 500


def test_the_console_script_trains_samples_and_lists(installed: Installed) -> None:
    assert "kv_concat: Cross-frame attention" in installed.run("dit-booth", "strategies", "kv_concat")
    small = "--data.frames 2 --train.batch-size 2 --sampler.steps 2 --sample.videos 1 --out run"
    run = ["dit-booth", "run", "--strategy", "kv_concat", "--stages.fine.steps", "2", *small.split()]
    assert "run folder      run" in installed.run(*run)
    assert (installed.folder / "run" / "finished").is_file()
    assert "sweep schedule: 8 points" in installed.run("dit-booth", "sweep", "schedule", "--dry-run")
    assert "error: 'rnu' is no command; nearest: run" in installed.run("dit-booth", "rnu", code=2)
