"""What this machine computes on, and TensorFlow's start. Light: it travels with every logged model."""

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
    """Whether this machine has an NVIDIA driver loaded; told without importing TensorFlow."""
    return Path("/dev/nvidiactl").exists()


def has_gpu() -> bool:
    """Whether TensorFlow sees a GPU; without a driver, told without importing it."""
    if not has_gpu_driver():
        return False
    import_tensorflow_quietly()
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def describe_devices() -> str:
    """What this machine computes on, for the record: GPUs by name, or the processor, and the number of cores."""
    import_tensorflow_quietly()
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    names = [str(tf.config.experimental.get_device_details(gpu).get("device_name", "GPU")) for gpu in gpus]
    return ", ".join([*(names or [processor_name()]), f"{len(os.sched_getaffinity(0))} cores"])


def processor_name() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def require_gpu() -> None:
    """Make sure that TensorFlow sees a GPU.

    Raises:
        NoGpuError: it sees none.
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
    """Turn running out of memory, the GPU's or the machine's, into one line that ends with ``advice``.

    Raises:
        DeviceError: memory did not suffice.
    """
    try:
        yield
    except MemoryError:
        raise DeviceError(f"out of memory: {advice}") from None
    except Exception as error:
        # By name: TensorFlow need not be imported for this. What is lacking from the start is an InternalError.
        if type(error).__name__ != "ResourceExhaustedError" and "CUDA_ERROR_OUT_OF_MEMORY" not in str(error):
            raise
        raise DeviceError(f"out of the GPU's memory: {advice}") from None


def import_tensorflow_quietly() -> None:
    """Import TensorFlow without its start-up chatter, which it writes before any of its own settings apply.

    And in half the time, the process's end counted: its million of objects, which all stay to the end, are not looked
    through for garbage, neither while they are made nor later. What computes in float32 does so on a GPU, too: TF32,
    which TensorFlow takes there by default, rounds at 5e-4.
    """
    if "tensorflow" not in sys.modules:
        _import_tensorflow()
    sys.modules["tensorflow"].config.experimental.enable_tensor_float_32_execution(False)


def _import_tensorflow() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Two trainings may share a GPU; by default the first would take all of its memory.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    sys.stderr.flush()
    kept, collecting = os.dup(2), gc.isenabled()
    gc.disable()
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
            gc.freeze()
            if collecting:
                gc.enable()
