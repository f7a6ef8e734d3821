"""The devices that this machine computes on, and the import of TensorFlow.

This module imports little, since every logged model carries a copy of it.
"""

import gc
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ml.core.errors import DeviceError, NoGpuError


def has_gpu_driver() -> bool:
    """Returns whether this machine has an NVIDIA driver loaded, without importing TensorFlow."""
    return Path("/dev/nvidiactl").exists()


def has_gpu() -> bool:
    """Returns whether TensorFlow sees a GPU; where no driver is loaded, TensorFlow is not imported."""
    if not has_gpu_driver():
        return False
    import_tensorflow_quietly()
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def describe_devices() -> str:
    """Returns the names of the GPUs, or else of the processor, and the number of cores: for a run's record."""
    import_tensorflow_quietly()
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    names = [str(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")) for gpu in gpus]
    return ", ".join([*(names or [processor_name()]), f"{len(os.sched_getaffinity(0))} cores"])


def processor_name() -> str:
    """Returns the processor's model name, or the architecture where it is unknown."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def require_gpu() -> None:
    """Makes sure that TensorFlow sees a GPU.

    Raises:
        NoGpuError: TensorFlow sees none; the message lists what to check.
    """
    import_tensorflow_quietly()
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        driver = "a driver is loaded" if has_gpu_driver() else "no NVIDIA driver is in reach"
        build = "with" if tf.test.is_built_with_cuda() else "without"
        raise NoGpuError(
            f"a GPU is required (BREAKHIS_GPU_REQUIRED), and TensorFlow {tf.__version__}, built {build} CUDA, sees 0 "
            f"({driver}); nothing was trained or computed on the CPU instead. Check nvidia-smi and "
            "nvidia-container-toolkit on the host, that the container was started with a GPU (docker run --gpus all, "
            "BREAKHIS_DOCKER_GPUS) and that its image was built with DEVICE=gpu"
        )


@contextmanager
def convert_memory_errors(advice: str) -> Iterator[None]:
    """Context manager that converts running out of the GPU's or the machine's memory into a DeviceError.

    Args:
        advice: what to do about it; the one-line message ends with it.

    Raises:
        DeviceError: memory did not suffice.
    """
    try:
        yield
    except MemoryError:
        raise DeviceError(f"out of memory: {advice}") from None
    except Exception as error:
        # The type is compared by name, which needs no TensorFlow. A GPU full from the start is an InternalError.
        if type(error).__name__ != "ResourceExhaustedError" and "CUDA_ERROR_OUT_OF_MEMORY" not in str(error):
            raise
        raise DeviceError(f"out of the GPU's memory: {advice}") from None


def import_tensorflow_quietly() -> None:
    """Imports TensorFlow without its start-up messages, which it writes before any of its own settings apply.

    The garbage collector is off during the import and skips TensorFlow's million objects afterwards, since all of them
    live until the process ends; this halves the time of import and exit. TF32, TensorFlow's default on a GPU, rounds at
    5e-4 and is switched off, so that float32 is computed as float32 there, too.
    """
    if "tensorflow" not in sys.modules:
        _import_tensorflow()
    sys.modules["tensorflow"].config.experimental.enable_tensor_float_32_execution(False)


def _import_tensorflow() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Two trainings may share a GPU; by default the first would take all of its memory.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    sys.stderr.flush()
    saved_stderr, gc_was_enabled = os.dup(2), gc.isenabled()
    gc.disable()
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        try:
            import tensorflow as tf

            tf.config.list_physical_devices()  # the first search for a GPU, which logs an error if there is none
        except BaseException:
            output.seek(0)
            os.write(saved_stderr, output.read())
            raise
        finally:
            os.dup2(saved_stderr, 2)
            os.close(saved_stderr)
            gc.freeze()
            if gc_was_enabled:
                gc.enable()
