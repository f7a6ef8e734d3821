"""The DAG ``remind``: what its task fails with, and whether Airflow tries it again."""

import errno
import os

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from ml.core.errors import CredentialsError, StoreError, TryAgain


@pytest.mark.parametrize(
    ("error", "is_final", "words"),
    [
        (TryAgain("http://airflow:8080 cannot be reached"), False, "http://airflow:8080 cannot be reached"),
        (CredentialsError("http://airflow:8080 refuses the login"), True, "http://airflow:8080 refuses the login"),
        (StoreError("/store/refs/a.json is damaged"), True, "/store/refs/a.json is damaged"),
        (OSError(errno.EACCES, os.strerror(errno.EACCES), "/store/x"), True, "/store/x: user .+ has no right to it"),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/store/x"), False, "/store/x: its server of files was"),
    ],
)
def test_a_failure_is_told_in_our_words_and_tried_again_where_that_helps(
    conf, read, monkeypatch, error, is_final, words
):
    def fail(_):
        raise error

    task = read("remind")["remind"].get_task("remind")
    monkeypatch.setattr("breakhis_airflow.reminders.send_reminders", fail)
    monkeypatch.setitem(task.python_callable.__globals__, "get_current_context", dict)
    with pytest.raises(AirflowException, match=f"^remind, on the worker: {words}") as caught:
        task.python_callable()
    assert isinstance(caught.value, AirflowFailException) == is_final


def test_errors_of_other_kinds_stay_as_they_are(conf, read, monkeypatch):
    task = read("remind")["remind"].get_task("remind")
    monkeypatch.setattr("breakhis_airflow.reminders.send_reminders", lambda _: {}["fault of ours"])
    monkeypatch.setitem(task.python_callable.__globals__, "get_current_context", dict)
    with pytest.raises(KeyError):
        task.python_callable()
