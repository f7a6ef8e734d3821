"""Counts the GPUs of this machine, and the trainings that may run on them."""

import subprocess

from ml.core.settings import Settings


def count_gpus() -> int:
    """Returns how many NVIDIA GPUs nvidia-smi lists; 0 without nvidia-smi."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def count_gpu_slots(settings: Settings) -> int:
    """Returns how many trainings may run at a time: BREAKHIS_GPUS, or one per GPU; two on a machine without a GPU."""
    return (count_gpus() if settings.gpus is None else settings.gpus) or 2
