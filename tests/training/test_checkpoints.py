import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from ml.core import leases
from ml.core.errors import Conflict, StoreError, TryAgain
from ml.core.store import Store
from ml.training import checkpoints
from ml.training.checkpoints import Checkpoint, remove_abandoned, wait_for_concurrent_training

ARRAYS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array(3, np.int64)]


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


@pytest.fixture
def take_over(store: Store, monkeypatch: pytest.MonkeyPatch):
    """Takes the training over from a process that gives no heartbeat."""
    monkeypatch.setattr(checkpoints, "_SECONDS_UNTIL_DEAD", 0.0)
    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_CHECKS", 0.0)
    return lambda: Checkpoint(store, "job", wait_for_concurrent_training(store, "job"))


def test_what_was_saved_is_taken_over(store: Store) -> None:
    first = Checkpoint(store, "job")
    assert (first.run_id, first.progress, first.read_unfinished("head"), first.read_finished("head")) == (
        None,
        "",
        (0, {}, []),
        None,
    )
    with first.alive():
        first.record_run("run-1")
        first.save("head", 1, {"loss": [0.5]}, [np.zeros(2)])
        first.save("head", 2, {"loss": [0.5, 0.4]}, ARRAYS)
    second = Checkpoint(store, "job")
    epoch, history, arrays = second.read_unfinished("head")
    assert (second.run_id, epoch, history) == ("run-1", 2, {"loss": [0.5, 0.4]})
    for kept, array in zip(arrays, ARRAYS, strict=True):
        assert kept.dtype == array.dtype
        assert np.array_equal(kept, array)
    assert len(store.keys("jobs/training/job")) == 2  # the state, and the arrays of one epoch


def test_a_finished_part_is_kept_beside_the_next(store: Store) -> None:
    first = Checkpoint(store, "job")
    with first.alive():
        first.save("fold 1", 1, {"loss": [0.5]}, [np.zeros(2)])
        first.finish("fold 1", {"loss": [0.5, 0.4]}, ARRAYS)
        first.save("fold 2", 1, {"loss": [0.7]}, [np.ones(2)])
    second = Checkpoint(store, "job")
    assert second.progress == " (1 parts finished, fold 2 after epoch 1)"
    done = second.read_finished("fold 1")
    assert done is not None
    assert (done.epoch, done.history) == (2, {"loss": [0.5, 0.4]})
    assert np.array_equal(done.arrays[0], ARRAYS[0])
    assert second.read_unfinished("fold 1") == (0, {}, [])
    assert second.read_unfinished("fold 2").history == {"loss": [0.7]}
    assert len(store.keys("jobs/training/job")) == 3  # the state and what it names


def test_killed_between_the_arrays_and_the_state_the_older_one_holds(store: Store, take_over, monkeypatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    first = Checkpoint(store, "job")
    first.save("head", 1, {"loss": [0.5]}, ARRAYS)
    monkeypatch.setattr(first, "_write", killed)
    with pytest.raises(Killed):
        first.save("head", 2, {"loss": [0.5, 0.4]}, [np.zeros(2)])
    second = take_over()
    epoch, history, arrays = second.read_unfinished("head")
    assert (epoch, history) == (1, {"loss": [0.5]})
    assert np.array_equal(arrays[0], ARRAYS[0])


def test_a_sign_of_life_tells_of_no_epoch_that_was_not_saved(store: Store) -> None:
    first, history = Checkpoint(store, "job"), {"loss": [0.5]}
    with first.alive():
        first.save("head", 1, history, ARRAYS)
        history["loss"].append(0.4)
    assert Checkpoint(store, "job").read_unfinished("head").history == {"loss": [0.5]}


def test_signs_of_life_go_on_after_the_store_was_away(store: Store, monkeypatch, capsys) -> None:
    came, write = threading.Event(), Checkpoint._write
    answers = iter([OSError("no route"), None])

    def once_away(self: Checkpoint, *, released: bool = False) -> None:
        answer = next(answers, None)
        if isinstance(answer, OSError):
            raise answer
        write(self, released=released)
        came.set()

    monkeypatch.setattr(checkpoints, "_SECONDS_BETWEEN_HEARTBEATS", 0.0)
    monkeypatch.setattr(Checkpoint, "_write", once_away)
    with Checkpoint(store, "job").alive():
        assert came.wait(60)
    assert "cannot write its heartbeat to the store, and tries again: no route" in capsys.readouterr().err


def test_two_do_not_train_the_same(store: Store) -> None:
    first = Checkpoint(store, "job")
    first.record_run("run-1")
    with pytest.raises(TryAgain, match="trained already, in MLflow run run-1"):
        Checkpoint(store, "job")
    Checkpoint(store, "another")


def test_the_dead_are_replaced_and_find_out(store: Store, take_over) -> None:
    first = Checkpoint(store, "job")
    first.save("head", 1, {}, ARRAYS)
    second = take_over()
    for late in (lambda: first.save("head", 2, {}, ARRAYS), lambda: first.record_run("run-1"), first.forget):
        with pytest.raises(Conflict, match="has taken this training over"):
            late()
    second.save("head", 5, {}, ARRAYS)
    assert take_over().read_unfinished("head").epoch == 5


def test_a_dead_process_that_comes_to_life_before_it_is_replaced_keeps_the_training(store: Store, take_over) -> None:
    first = Checkpoint(store, "job")
    first.save("head", 1, {}, ARRAYS)
    left = wait_for_concurrent_training(store, "job")
    first.save("head", 2, {}, ARRAYS)
    with pytest.raises(TryAgain, match="trained already"):
        Checkpoint(store, "job", left)
    first.save("head", 3, {}, ARRAYS)


def set_clocks(monkeypatch: pytest.MonkeyPatch, **clocks) -> None:
    """Gives the code under test other clocks than everything else in this process."""
    own = {"time": time.time, "monotonic": time.monotonic, "sleep": time.sleep}
    for module in (leases, checkpoints):
        monkeypatch.setattr(module, "time", SimpleNamespace(**own | clocks))


@pytest.mark.parametrize("ahead", [-10 * 365 * 24 * 3600.0, 0.0, 10 * 365 * 24 * 3600.0])
def test_whatever_its_clock_showed_a_killed_training_is_waited_for_as_long(
    store: Store, monkeypatch: pytest.MonkeyPatch, ahead: float
) -> None:
    """The watcher measures the silence, on a clock of its own."""
    set_clocks(monkeypatch, time=lambda: time.time() + ahead)
    Checkpoint(store, "job").record_run("run-1")  # and is killed
    now = [0.0]
    set_clocks(monkeypatch, monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    left = wait_for_concurrent_training(store, "job")
    assert checkpoints._SECONDS_UNTIL_DEAD <= now[0] <= checkpoints._SECONDS_UNTIL_DEAD + 10
    assert Checkpoint(store, "job", left).run_id == "run-1"


def test_of_two_that_take_over_at_once_one_is_sent_away(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint(store, "job").alive():
        pass
    read = store.read

    def overtaken(key):
        found = read(key)
        monkeypatch.setattr(store, "read", read)
        Checkpoint(store, "job")
        return found

    monkeypatch.setattr(store, "read", overtaken)
    with pytest.raises(Conflict):
        Checkpoint(store, "job")


def test_a_write_whose_answer_was_lost_is_known_as_ours(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, write = Checkpoint(store, "job"), store.compare_and_set

    def written_but_unheard(*arguments):
        write(*arguments)
        monkeypatch.setattr(store, "compare_and_set", write)
        raise Conflict("the client wrote again, and found what it wrote first")

    with checkpoint.alive():
        monkeypatch.setattr(store, "compare_and_set", written_but_unheard)
        checkpoint.save("head", 1, {}, ARRAYS)
    assert Checkpoint(store, "job").read_unfinished("head").epoch == 1


def test_an_error_leaves_it_to_the_next_at_once(store: Store) -> None:
    checkpoint = Checkpoint(store, "job")
    with pytest.raises(ValueError, match="broken"), checkpoint.alive():  # noqa: PT012
        checkpoint.save("head", 3, {}, ARRAYS)
        raise ValueError("broken")
    assert Checkpoint(store, "job").read_unfinished("head").epoch == 3


def test_what_is_done_is_forgotten(store: Store) -> None:
    checkpoint = Checkpoint(store, "job")
    store.put_json("jobs/training/job/2-left-behind.npz", None)
    with checkpoint.alive():
        checkpoint.save("head", 3, {}, ARRAYS)
        checkpoint.forget()
    assert store.keys("jobs/training/job") == []
    assert Checkpoint(store, "job").read_unfinished("head").epoch == 0


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_damaged_arrays_are_named(store: Store, content: bytes | None) -> None:
    with Checkpoint(store, "job").alive():
        pass
    checkpoint = Checkpoint(store, "job")
    checkpoint.save("head", 3, {}, ARRAYS)
    (name,) = (name for name in store.keys("jobs/training/job") if name.endswith(".npz"))
    if content is None:
        store.remove(f"jobs/training/job/{name}")
    else:
        store.path(f"jobs/training/job/{name}").write_bytes(content)
    with pytest.raises(StoreError, match=rf"{name} cannot be read .*remove .*jobs/training/job to train"):
        checkpoint.read_unfinished("head")


def test_what_nobody_takes_up_again_is_removed_in_the_end(store: Store, monkeypatch, capsys) -> None:
    left, living = Checkpoint(store, "left"), Checkpoint(store, "living")
    for checkpoint in (left, living):
        checkpoint.save("head", 3, {}, ARRAYS)
    # Whoever cleans up has a clock that runs ahead. It is the store's that counts.
    set_clocks(monkeypatch, time=lambda: time.time() + 40 * 24 * 3600.0)
    remove_abandoned(store)
    assert store.keys("jobs/training") == ["left", "living"]
    age = Store.age
    more = {"jobs/training/left/state.json": 40 * 24 * 3600.0}
    monkeypatch.setattr(Store, "age", lambda self, key: age(self, key) + more.get(key, 0.0))
    remove_abandoned(store)
    assert "left, a training that nobody resumed (head after epoch 3)" in capsys.readouterr().err
    assert store.keys("jobs/training/left") == []
    assert len(store.keys("jobs/training/living")) == 2
