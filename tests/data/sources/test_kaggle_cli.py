"""Kaggle as a user meets it: the real command and the unmodified package in a process of their own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kaggle_server import KEY, MIRROR, TOKEN, USER, KaggleServer, all_names, environment, mirror_zip, serve, some_names

from ml.core.errors import EXIT_BAD_INPUT, EXIT_TRY_AGAIN
from ml.core.settings import PROJECT

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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is no JSON"),
        (b'{"username": "ada", "key": "0123456789abcdef"', "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b'\xff{"username": "ada", "key": "x"}', "it is no JSON"),
        (b'"0123456789abcdef"', "it does not have 'username' and 'key'"),
        (b'{"username": "ada"}', "it does not have 'username' and 'key'"),
        (b'{"username": "ada", "key": 123456789}', "it does not have 'username' and 'key'"),
        (b'{"username": "ada", "key": "0123456789abcdef\\n"}', "there are characters in it that none has"),
        ('{"username": "ada", "key": "☃"}'.encode(), "there are characters in it that none has"),
    ],
)
def test_a_kaggle_json_that_is_none_is_told(
    breakhis: Breakhis, server: KaggleServer, tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "user" / ".kaggle" / "kaggle.json"
    file.parent.mkdir()
    file.write_bytes(content)
    file.chmod(0o600)
    done = breakhis("fetch", "breakhis")
    assert done.returncode == EXIT_BAD_INPUT
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {file}: no credentials of Kaggle's: {message}")
    assert "0123456789abcdef" not in line
    assert server.calls == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("KAGGLE_API_TOKEN", "KGAT_secret" * 30, "it has 330 characters, and Kaggle's package takes 255 at the most"),
        ("KAGGLE_API_TOKEN", "KGAT_secret\n", "there are characters in it that none has"),
        ("KAGGLE_KEY", "secret\r\nX-Other: 1", "there are characters in it that none has"),
        ("KAGGLE_USERNAME", "adä", "there are characters in it that none has"),
    ],
)
def test_variables_that_hold_no_credentials_are_told(
    breakhis: Breakhis, server: KaggleServer, name: str, value: str, message: str
) -> None:
    given = {"KAGGLE_USERNAME": USER, "KAGGLE_KEY": KEY} if name != "KAGGLE_API_TOKEN" else {}
    done = breakhis("fetch", "breakhis", **given | {name: value})
    assert done.returncode == EXIT_BAD_INPUT
    (line,) = done.stderr.splitlines()
    assert message in line
    assert name in line
    assert "secret" not in line
    assert server.calls == []


def test_an_access_token_of_two_lines_is_told(breakhis: Breakhis, tmp_path: Path) -> None:
    file = tmp_path / "user" / ".kaggle" / "access_token"
    file.parent.mkdir()
    file.write_text("KGAT_secret\nsecret")
    done = breakhis("fetch", "breakhis")
    assert (done.returncode, "secret" in done.stderr) == (EXIT_BAD_INPUT, False)
    assert f"{file}: no credentials of Kaggle's: there are characters in it" in done.stderr


def test_wrong_credentials_are_one_line_too(breakhis: Breakhis) -> None:
    done = breakhis("fetch", "breakhis", KAGGLE_API_TOKEN="KGAT_wrong-secret", VERBOSE="1")
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: Kaggle does not accept the credentials in KAGGLE_API_TOKEN")
    assert "wrong-secret" not in done.stderr


@pytest.mark.parametrize(
    ("status", "exit_status", "message"),
    [
        (401, EXIT_BAD_INPUT, "Kaggle does not accept the credentials in KAGGLE_USERNAME and KAGGLE_KEY"),
        (403, EXIT_BAD_INPUT, f"{MIRROR}: Kaggle does not let the account of KAGGLE_USERNAME and KAGGLE_KEY download"),
        (404, EXIT_BAD_INPUT, f"{PROJECT}/dags/sources/breakhis.yaml: Kaggle has no data set or version"),
        (429, EXIT_TRY_AGAIN, "Kaggle has had too many requests; try again in 7 s"),
        (500, EXIT_TRY_AGAIN, "Kaggle has a fault of its own (status 500); try again later"),
    ],
)
def test_the_exit_status_says_whether_trying_again_may_help(
    breakhis: Breakhis, server: KaggleServer, status: int, exit_status: int, message: str
) -> None:
    server.refuse, server.retry_after = status, "7"
    done = breakhis("ingest", "breakhis", KAGGLE_USERNAME=USER, KAGGLE_KEY=KEY)
    assert (done.returncode, done.stdout) == (exit_status, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr


def test_no_network_may_get_better(breakhis: Breakhis) -> None:
    done = breakhis("ingest", "breakhis", KAGGLE_API_TOKEN=TOKEN, STANDIN_KAGGLE_URL="http://localhost:9")
    assert done.returncode == EXIT_TRY_AGAIN
    assert "Kaggle cannot be reached or broke off" in done.stderr.splitlines()[-1]


def test_an_ingest_that_broke_off_in_the_middle_goes_on(
    breakhis: Breakhis, server: KaggleServer, tmp_path: Path
) -> None:
    conf = tmp_path / "conf" / "sources"
    conf.mkdir(parents=True)
    (conf / "mirror.yaml").write_text(f"name: mirror\nkind: kaggle\ndataset: {MIRROR}\n")
    given = {"KAGGLE_API_TOKEN": TOKEN, "BREAKHIS_CONF": str(tmp_path / "conf")}
    server.archives[MIRROR] = [mirror_zip(some_names(), side=80)]
    server.cut = [2**20 + 100, *[0] * 5]  # the package itself tries five times more
    broken = breakhis("ingest", "mirror", **given)
    assert broken.returncode == EXIT_TRY_AGAIN
    assert "broke off" in broken.stderr.splitlines()[-1]
    assert "Signature" not in broken.stderr
    server.calls.clear()
    done = breakhis("ingest", "mirror", "--json", **given)
    assert done.returncode == 0, done.stderr
    assert [call.range for call in server.downloads()] == [None, f"bytes={2**20}-"]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["files"], result["images"], result["passed"]) == (164, 80, True)


@pytest.mark.parametrize("data", [b"<html>Please log in</html>", mirror_zip(some_names())[:-1000]])
def test_a_wrong_zip_is_one_line_and_leaves_nothing(
    breakhis: Breakhis, server: KaggleServer, tmp_path: Path, data: bytes
) -> None:
    server.archives[MIRROR] = [data]
    done = breakhis("ingest", "breakhis", KAGGLE_API_TOKEN=TOKEN)
    assert (done.returncode, done.stdout) == (EXIT_BAD_INPUT, "")
    assert "not a whole zip" in done.stderr.splitlines()[-1]
    assert "the download was removed, so fetching again downloads it anew" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "home").rglob("*.zip*"))
    assert not (tmp_path / "home" / "store" / "objects").exists()


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
