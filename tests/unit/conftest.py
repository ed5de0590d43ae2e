"""Fixtures of several unit tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch_stub import STUB

from dit_booth.study import launch


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps launch the stub instead of run.py."""
    file = tmp_path / "stub.py"
    file.write_text(STUB)
    monkeypatch.setattr(launch, "PROGRAM", file)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
