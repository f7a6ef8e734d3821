import numpy as np
import pytest

from ml import checkpoints
from ml.checkpoints import Checkpoint
from ml.errors import Conflict, TryAgain
from ml.store import Store

ARRAYS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(3, np.int64)]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store((tmp_path / "store").as_uri())


def test_what_was_saved_is_taken_over(store: Store) -> None:
    first = Checkpoint(store, "job")
    assert (first.run_id, first.epoch, first.history, first.arrays()) == (None, 0, {}, [])
    with first.alive():
        first.begin("run-1")
        first.save(1, {"loss": [0.5]}, [np.zeros(2)])
        first.save(2, {"loss": [0.5, 0.4]}, ARRAYS)
    second = Checkpoint(store, "job")
    assert (second.run_id, second.epoch, second.history) == ("run-1", 2, {"loss": [0.5, 0.4]})
    for kept, array in zip(second.arrays(), ARRAYS, strict=True):
        assert kept.dtype == array.dtype
        assert np.array_equal(kept, array)
    assert len(store.keys("jobs/training/job")) == 2  # the state, and the arrays of one epoch


def test_two_do_not_train_the_same(store: Store) -> None:
    first = Checkpoint(store, "job")
    first.begin("run-1")
    with pytest.raises(TryAgain, match="trained already, in MLflow run run-1"):
        Checkpoint(store, "job")
    Checkpoint(store, "another")


def test_the_dead_are_replaced_and_find_out(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Checkpoint(store, "job")
    first.save(1, {}, ARRAYS)
    monkeypatch.setattr(checkpoints, "_SECONDS_UNTIL_DEAD", 0.0)
    second = Checkpoint(store, "job")
    with pytest.raises(Conflict):
        first.save(2, {}, ARRAYS)
    second.save(5, {}, ARRAYS)
    assert Checkpoint(store, "job").epoch == 5


def test_an_error_leaves_it_to_the_next_at_once(store: Store) -> None:
    checkpoint = Checkpoint(store, "job")
    with pytest.raises(ValueError, match="broken"), checkpoint.alive():  # noqa: PT012
        checkpoint.save(3, {}, ARRAYS)
        raise ValueError("broken")
    assert Checkpoint(store, "job").epoch == 3


def test_what_is_done_is_forgotten(store: Store) -> None:
    checkpoint = Checkpoint(store, "job")
    with checkpoint.alive():
        checkpoint.save(3, {}, ARRAYS)
    checkpoint.forget()
    assert store.keys("jobs/training/job") == []
    assert Checkpoint(store, "job").epoch == 0
