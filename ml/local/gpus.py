"""The GPUs of this machine."""

import subprocess

from ml.core.settings import Settings


def gpu_count() -> int:
    """NVIDIA GPUs that nvidia-smi lists; 0 without it."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.splitlines())


def gpu_slots(settings: Settings) -> int:
    """Trainings that may run at a time: the setting, or one per GPU; two on a machine without."""
    return (gpu_count() if settings.gpus is None else settings.gpus) or 2
