"""Fixtures of several unit tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from launch_stub import STUB

from dit_booth.study import launch


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps launch the stub instead of `dit_booth.run`."""
    (tmp_path / "run_stub.py").write_text(STUB)
    monkeypatch.setattr(launch, "RUN", "run_stub")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}")
