"""The harness counts as a fault what is one, and sees the same inputs again."""

import time

import pytest

from ml.core.errors import StoreError
from tests.fuzz import harness
from tests.fuzz.harness import Kind, make_generator, run_kind
from tests.fuzz.kinds import KINDS


def tally(use, **options):
    return run_kind(Kind("made", lambda folder: folder, use, **options), 3, seed=1)


def test_what_is_accepted_and_what_is_refused_with_our_error_is_counted():
    assert tally(lambda *_: None).accepted == 3

    def refuse(*_):
        raise StoreError("refs/made.json is damaged")

    assert tally(refuse).refused == 3
    assert tally(refuse, names=r"made\.json").refused == 3


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (KeyError("x"), "KeyError in test_harness.py"),
        (StoreError("it is damaged"), "a message that names nothing"),
        (StoreError("made.json: " + "x" * 3_000), "a long message"),
    ],
)
def test_another_error_or_one_that_names_nothing_or_grows_is_a_fault(error, fault):
    def fail(*_):
        raise type(error)(*error.args)  # each has a traceback of its own

    found = tally(fail, names=r"made\.json")
    assert found.refused == found.accepted == 0
    [(outcome, numbers)] = found.faults.items()
    assert outcome.startswith(fault)
    assert numbers == [0, 1, 2]


def test_what_takes_too_long_and_what_takes_too_much_is_a_fault(monkeypatch):
    monkeypatch.setattr(harness, "MAX_SECONDS", 0.2)
    assert list(tally(lambda *_: time.sleep(10)).faults.values()) == [[0, 1, 2]]
    monkeypatch.setattr(harness, "MAX_SECONDS", 5)
    monkeypatch.setattr(harness, "MAX_MB", 1)
    assert list(tally(lambda *_: None).faults) == ["more than 1 MB of memory"]


def test_a_process_that_ends_costs_its_input_alone():
    found = run_kind(Kind("made", lambda _: None, lambda *_: exit_now()), 2, seed=1)
    assert found.faults == {"the process ended with 7": [0, 1]}


def exit_now():
    import os

    os._exit(7)


def test_the_same_seed_gives_the_same_inputs():
    assert make_generator("a", 3, 1).random() == make_generator("a", 3, 1).random()
    assert (
        len({make_generator(kind, number, seed).random() for kind in "ab" for number in (1, 2) for seed in (1, 2)}) == 8
    )


def test_kinds_have_names_of_their_own():
    assert len({kind.name for kind in KINDS}) == len(KINDS)
