import numpy as np
import pytest

from tests.helpers.small_training import run_in_own_process


@pytest.fixture(scope="module")
def told():
    return run_in_own_process("tests.training.two_devices", "CPU")


@pytest.mark.parametrize("number", range(2), ids=["whole last batch", "last batch of one image"])
def test_two_devices_learn_what_one_does(told, number):
    found = told["two"][number]
    assert found["learnt"] > 1
    assert found["apart"] < 1e-3


def test_in_float16_the_loss_is_finite_and_falls_and_weights_stay_float32(told):
    loss = told["float16"]["loss"]
    assert np.isfinite(loss).all()
    assert loss[-1] < loss[0]
    assert told["float16"]["kept as"] == ["float32"]
