"""Kaggle as a user meets it: the real command and the unmodified package in a process of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kaggle_server import KEY, MIRROR, TOKEN, USER, KaggleServer, all_names, environment, mirror_zip, serve, some_names

from ml.errors import EXIT_BAD_INPUT, EXIT_TRY_AGAIN
from ml.settings import PROJECT

Breakhis = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def server() -> Iterator[KaggleServer]:
    with serve() as running:
        running.archives[MIRROR] = [mirror_zip(some_names())]
        yield running


@pytest.fixture
def breakhis(tmp_path: Path, server: KaggleServer) -> Breakhis:
    """Run the command with a home folder, a store and Kaggle of this test's own; keywords are variables."""
    (tmp_path / "user").mkdir()
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("KAGGLE_", "BREAKHIS_", "XDG_CONFIG"))
    }
    own = {"BREAKHIS_HOME": str(tmp_path / "home"), "BREAKHIS_CONF": str(PROJECT / "dags")}

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("breakhis")), *arguments]
        env = {**clean, **own, **environment(server, tmp_path / "user"), **variables}
        return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)

    return run


def test_fetch_prints_one_json_object_and_no_secret(breakhis: Breakhis) -> None:
    done = breakhis("fetch", "breakhis", "--json", KAGGLE_API_TOKEN=TOKEN, VERBOSE="1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["source"], result["files"], result["skipped"]) == ("breakhis", 164, 1)
    assert TOKEN not in done.stdout + done.stderr
    assert "Signature" not in done.stdout + done.stderr


def test_without_credentials_one_line_says_what_is_missing(breakhis: Breakhis, server: KaggleServer) -> None:
    done = breakhis("ingest", "breakhis")
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    for way in (
        "KAGGLE_API_TOKEN",
        "KAGGLE_USERNAME and KAGGLE_KEY",
        "kaggle.json",
        "https://www.kaggle.com/settings/api",
    ):
        assert way in line
    assert server.calls == []


def test_a_kaggle_json_does_as_well(breakhis: Breakhis, tmp_path: Path) -> None:
    file = tmp_path / "user" / ".kaggle" / "kaggle.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"username": USER, "key": KEY}))
    file.chmod(0o600)
    done = breakhis("fetch", "breakhis", "--json")
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr


def test_wrong_credentials_are_one_line_too(breakhis: Breakhis) -> None:
    done = breakhis("fetch", "breakhis", KAGGLE_API_TOKEN="KGAT_wrong-secret", VERBOSE="1")
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: Kaggle does not accept the credentials in KAGGLE_API_TOKEN")
    assert "wrong-secret" not in done.stderr


def test_a_fault_at_kaggle_says_that_trying_again_may_help(breakhis: Breakhis, server: KaggleServer) -> None:
    server.refuse = 503
    done = breakhis("fetch", "breakhis", KAGGLE_USERNAME=USER, KAGGLE_KEY=KEY)
    assert done.returncode == EXIT_TRY_AGAIN
    assert done.stderr.splitlines()[-1] == "error: Kaggle has a fault of its own (status 503); try again later"


@pytest.mark.integration
def test_the_whole_data_set_is_ingested(breakhis: Breakhis, server: KaggleServer) -> None:
    """As many names as BreakHis has, so that the inventory agrees; the pictures are small noise."""
    server.archives[MIRROR] = [mirror_zip(all_names(), side=12)]
    done = breakhis("ingest", "breakhis", "--json", KAGGLE_API_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["files"] == 2 * 7909
    assert result["passed"] is True
    assert result["images"] == 7909 - 246  # both names of the 123 pictures of slide 14-13412
    assert sum(result["quarantined"].values()) == 246
    assert result["changed"] is True
