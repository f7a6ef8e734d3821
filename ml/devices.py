"""What this machine computes on, and TensorFlow's start. Light: it travels with every logged model."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def has_gpu_driver() -> bool:
    """Whether this machine has an NVIDIA driver loaded; told without importing TensorFlow."""
    return Path("/dev/nvidiactl").exists()


def require_gpu() -> None:
    """Make sure that TensorFlow sees a GPU.

    Raises:
        DeviceError: it sees none.
    """
    from ml.errors import DeviceError

    quiet_tensorflow()
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        driver = "a driver is loaded" if has_gpu_driver() else "no NVIDIA driver is in reach"
        raise DeviceError(
            f"a GPU was asked for (BREAKHIS_GPU_REQUIRED) and TensorFlow {tf.__version__} sees none ({driver}). "
            "Nothing was computed. Check nvidia-smi and nvidia-container-toolkit on the host, DEVICE=gpu of the image"
        )


@contextmanager
def name_exhaustion(advice: str) -> Iterator[None]:
    """Turn running out of memory, the GPU's or the machine's, into one line that ends with ``advice``.

    Raises:
        DeviceError: memory did not suffice.
    """
    from ml.errors import DeviceError

    try:
        yield
    except MemoryError:
        raise DeviceError(f"out of memory: {advice}") from None
    except Exception as error:
        # By name: TensorFlow need not be imported for this.
        if type(error).__name__ != "ResourceExhaustedError":
            raise
        raise DeviceError(f"out of the GPU's memory: {advice}") from None


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
