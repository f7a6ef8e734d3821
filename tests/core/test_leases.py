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


def test_one_at_a_time(store):
    inside, most = 0, 0

    def work():
        nonlocal inside, most
        with hold_lease(store, "x"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.05)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_other_names_do_not_wait(store):
    with hold_lease(store, "x"), hold_lease(store, "y", patience=0):
        pass


def test_patience(store):
    with (
        hold_lease(store, "x"),
        pytest.raises(TryAgain, match="another process has been at x"),
        hold_lease(store, "x", patience=0.3),
    ):
        pass


def test_it_is_free_after_an_error(store):
    with pytest.raises(ValueError, match="oops"), hold_lease(store, "x"):
        raise ValueError("oops")
    with hold_lease(store, "x", patience=0):
        pass


def test_a_sign_of_life_keeps_it(store, monkeypatch):
    monkeypatch.setattr(leases, "_SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_DEAD", 0.4)
    with hold_lease(store, "x"):
        time.sleep(0.8)
        with pytest.raises(TryAgain), hold_lease(store, "x", patience=0.2):
            pass


def test_a_store_that_fails_for_a_moment_does_not_end_it(store, monkeypatch):
    monkeypatch.setattr(leases, "_SECONDS_BETWEEN_BEATS", 0.05)
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_DEAD", 0.6)
    read, failures = Store.read, iter([OSError("reset by peer"), TryAgain("slow down")])

    def hiccup(self, key):
        if threading.current_thread() is not threading.main_thread() and (error := next(failures, None)):
            raise error
        return read(self, key)

    monkeypatch.setattr(Store, "read", hiccup)
    with hold_lease(store, "x"):
        time.sleep(1.0)
        with pytest.raises(TryAgain), hold_lease(store, "x", patience=0.2):
            pass


def test_who_is_killed_is_taken_over_from(store, monkeypatch):
    code = f"""
    from ml.core.leases import exclusively
    from ml.core.store import Store
    with exclusively(Store({store.root!r}), "x"):
        print("in", flush=True)
        import time
        time.sleep(60)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "in\n"
        process.send_signal(signal.SIGKILL)
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_DEAD", 1.0)
    with hold_lease(store, "x", patience=10):
        pass
