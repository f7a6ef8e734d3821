"""What this machine computes on, and TensorFlow's start. Light: it travels with every logged model."""

import os
import sys
import tempfile
from pathlib import Path


def has_gpu_driver() -> bool:
    """Whether this machine has an NVIDIA driver loaded; told without importing TensorFlow."""
    return Path("/dev/nvidiactl").exists()


def quiet_tensorflow() -> None:
    """Import TensorFlow without its start-up chatter, which it writes before any of its own settings apply."""
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Two trainings may share a GPU; by default the first would take all of its memory.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()  # the first look for a GPU, which it calls an error if there is none
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
