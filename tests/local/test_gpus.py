"""How many trainings run at a time."""

from pathlib import Path

import pytest

from ml.core.settings import Settings
from ml.local.gpus import count_gpu_slots


@pytest.mark.parametrize(("listing", "slots"), [("GPU 0: H200\nGPU 1: H200\nGPU 2: H200\n", 3), ("", 2)])
def test_a_training_per_gpu_or_two(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listing: str, slots: int
) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\nprintf '{listing}'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent))
    assert count_gpu_slots(settings) == slots
    assert count_gpu_slots(settings.model_copy(update={"gpus": 1})) == 1
    assert count_gpu_slots(settings.model_copy(update={"gpus": 0})) == 2
