import numpy as np
import pytest

from tests.helpers.small_training import run_in_own_process


@pytest.fixture(scope="module")
def results():
    return run_in_own_process("tests.training.two_devices", "CPU")


@pytest.mark.parametrize("number", range(2), ids=["whole last batch", "last batch of one image"])
def test_two_devices_give_the_result_of_one(results, number):
    result = results["two"][number]
    assert result["change"] > 1
    assert result["difference"] < 1e-3


def test_in_float16_the_loss_is_finite_and_falls_and_weights_stay_float32(results):
    loss = results["float16"]["loss"]
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]
    assert results["float16"]["kept as"] == ["float32"]
