import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core import leases
from ml.core.errors import TryAgain
from ml.core.leases import OwnerWatch, hold_lease, mark_beat
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


class FakeHost:
    """A host with clocks of its own."""

    def __init__(self, monotonic: float, wall: float) -> None:
        self.now, self.wall = monotonic, wall

    def run(self, call):
        """Returns what ``call`` returns on this host."""
        before = leases.time
        leases.time = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.wall, sleep=self.sleep)
        try:
            return call()
        finally:
            leases.time = before

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeStore:
    """One file whose tag changes with its content."""

    def __init__(self) -> None:
        self.state = None

    def read(self, key):
        return self.state, None if self.state is None else str(sorted(self.state.items()))


clocks = st.floats(-1e12, 1e12)


@given(
    owner=clocks,
    watcher=clocks,
    start=st.floats(0, 1e9),
    beats=st.lists(st.tuples(st.booleans(), st.floats(0, 30), clocks), min_size=1, max_size=20),
)
def test_dead_is_who_was_silent_for_long_on_the_watchers_own_clock(owner, watcher, start, beats):
    """Whatever wall clocks show, and whenever they are set: only whether the file changes, and the watcher's time."""
    store, host = FakeStore(), FakeHost(start, watcher)
    store.state = FakeHost(0, owner).run(lambda: mark_beat({"owner": "x"}))
    watch = OwnerWatch(store, "key", 10.0)
    assert not host.run(watch.look).is_free  # nobody is found dead at first sight
    silent_since = host.now
    for has_beaten, pause, wall in beats:
        host.now += pause
        host.wall = -wall  # somebody sets the watcher's clock, too
        if has_beaten:
            store.state = FakeHost(0, wall).run(lambda: mark_beat({"owner": "x"}))
            silent_since = host.now
        assert host.run(watch.look).is_free == (host.now - silent_since >= 10.0)


def test_a_suspended_watcher_takes_its_own_sleep_for_nobodys_death():
    store, host = FakeStore(), FakeHost(0.0, 0.0)
    store.state = mark_beat({"owner": "x"})
    watch = OwnerWatch(store, "key", 10.0)
    read = store.read

    def read_and_sleep(key):
        found = read(key)
        host.now += 60.0
        return found

    host.run(watch.look)
    store.read = read_and_sleep
    assert not host.run(watch.look).is_free
    store.state = mark_beat({"owner": "x"})
    assert not host.run(watch.look).is_free


@pytest.mark.parametrize("beat", [0.0, 4_000_000_000.0])
def test_a_lease_of_an_earlier_release_is_free_where_it_was_released_or_is_silent(store, monkeypatch, beat):
    store.put_json("jobs/leases/x.json", {"owner": "an earlier release", "beat": beat})
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_EXPIRED", 0.5)
    with hold_lease(store, "x", timeout=5 if beat else 0):
        pass


def test_a_host_whose_clock_runs_ahead_does_not_keep_its_lease_for_ever(store, monkeypatch):
    monkeypatch.setattr(leases, "_SECONDS_UNTIL_EXPIRED", 0.5)
    state = FakeHost(0, time.time() + 3600).run(lambda: mark_beat({"owner": "dead"}))
    store.put_json("jobs/leases/x.json", state)
    with hold_lease(store, "x", timeout=10):
        pass
