import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ml.core import leases
from ml.core.errors import TryAgain
from ml.core.leases import hold_lease
from ml.core.store import Store


@pytest.fixture
def store(tmp_path):
    return Store((tmp_path / "store").as_uri())


def test_a_lease_has_one_holder_at_a_time(store):
    inside, largest = 0, 0

    def work():
        nonlocal inside, largest
        with hold_lease(store, "x"):
            inside += 1
            largest = max(largest, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert largest == 1


def test_leases_of_other_names_are_independent(store):
    with hold_lease(store, "x"), hold_lease(store, "y", timeout=0):
        pass


def test_a_lease_that_is_held_too_long_is_an_error_to_try_again(store):
    with (
        hold_lease(store, "x"),
        pytest.raises(TryAgain, match="another process has held the lease x"),
        hold_lease(store, "x", timeout=0.3),
    ):
        pass


def test_a_lease_is_free_after_an_error(store):
    with pytest.raises(ValueError, match="oops"), hold_lease(store, "x"):
        raise ValueError("oops")
    with hold_lease(store, "x", timeout=0):
        pass


def test_heartbeats_keep_the_lease(store, monkeypatch):
    monkeypatch.setattr(leases, "_SECONDS_BETWEEN_HEARTBEATS", 0.05)
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_EXPIRED", 0.4)
    with hold_lease(store, "x"):
        time.sleep(0.8)
        with pytest.raises(TryAgain), hold_lease(store, "x", timeout=0.2):
            pass


def test_a_store_that_fails_for_a_moment_does_not_end_the_lease(store, monkeypatch):
    monkeypatch.setattr(leases, "_SECONDS_BETWEEN_HEARTBEATS", 0.05)
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_EXPIRED", 0.6)
    read, failures = Store.read, iter([OSError("reset by peer"), TryAgain("slow down")])

    def hiccup(self, key):
        if threading.current_thread() is not threading.main_thread() and (error := next(failures, None)):
            raise error
        return read(self, key)

    monkeypatch.setattr(Store, "read", hiccup)
    with hold_lease(store, "x"):
        time.sleep(1.0)
        with pytest.raises(TryAgain), hold_lease(store, "x", timeout=0.2):
            pass


def test_the_lease_of_a_killed_process_is_taken_over(store, monkeypatch):
    code = f"""
    from ml.core.leases import hold_lease
    from ml.core.store import Store
    with hold_lease(Store({store.root!r}), "x"):
        print("in", flush=True)
        import time
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGKILL)
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_EXPIRED", 1.0)
    with hold_lease(store, "x", timeout=10):
        pass
