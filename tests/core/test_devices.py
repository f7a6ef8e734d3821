"""What is said of GPUs and of memory that does not suffice.

TensorFlow is imported in the tests: imported while these files are collected, before Airflow, its log handler is closed
by Airflow's logging, and pytest's captured standard error with it.
"""

import pytest

from ml.core import devices
from ml.core.devices import convert_memory_errors, require_gpu
from ml.core.errors import DeviceError, NoGpuError


def show_gpus(monkeypatch, *gpus):
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: list(gpus))


def test_a_missing_gpu_is_an_error_that_says_what_to_check(monkeypatch):
    show_gpus(monkeypatch)
    monkeypatch.setattr(devices, "has_gpu_driver", lambda: False)
    with pytest.raises(NoGpuError) as caught:
        require_gpu()
    for part in (
        "sees 0 (no NVIDIA driver is in reach)",
        "nothing was trained or computed on the CPU",
        "nvidia-container-toolkit",
        "docker run --gpus",
        "DEVICE=gpu",
    ):
        assert part in str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_visible_gpu_is_accepted(monkeypatch):
    show_gpus(monkeypatch, "gpu")
    require_gpu()


@pytest.mark.parametrize(
    ("make_error", "message"),
    [
        (
            lambda errors: errors.ResourceExhaustedError(None, None, "OOM when allocating\ntensor"),
            "out of the GPU's memory: less",
        ),
        (
            lambda errors: errors.InternalError(None, None, "CUDA_ERROR_OUT_OF_MEMORY: out of memory"),
            "out of the GPU's memory",
        ),
        (lambda _: MemoryError(), "^out of memory: less$"),
    ],
)
def test_running_out_of_memory_is_one_line(make_error, message):
    import tensorflow as tf

    error = make_error(tf.errors)
    with pytest.raises(DeviceError, match=message) as caught, convert_memory_errors("less"):
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_pass():
    import tensorflow as tf

    with pytest.raises(tf.errors.InternalError), convert_memory_errors("less"):
        raise tf.errors.InternalError(None, None, "something else")
