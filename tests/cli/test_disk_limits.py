"""Disks that fill up, are read-only or forbidden, and limits on files: the command says so in one line, and why."""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.made_up import name, png, write_tree

RUN = [sys.executable, "-c", "from ml.cli import main; main()"]
IN_A_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
"""Begins a command that may mount a disk of its own, without the rights of an administrator."""

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE = 24, 1


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    tried = subprocess.run([*IN_A_NAMESPACE, "mount -t tmpfs tmpfs /mnt"], check=False, capture_output=True)
    return tried.returncode == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source of two megabytes."""
    write_tree(tmp_path / "images", {name("F", f"14-{number}"): png(number, (700, 460)) for number in range(1, 4)})
    file = tmp_path / "made.yaml"
    file.write_text("name: made\nkind: directory\npath: ./images\n")
    return file


def run(
    command: list[str], home: Path, *, stdout: int | None = None, before: Callable[[], object] | None = None
) -> tuple[int, str]:
    """Runs a command; returns its exit status and what it said on stderr."""
    done = subprocess.run(
        command,
        check=False,
        env={**os.environ, "BREAKHIS_HOME": str(home), "BREAKHIS_WORKERS": "1", "PYTHONPATH": str(Path.cwd())},
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
        timeout=120,
    )
    return done.returncode, done.stderr


def last_line(said: str) -> str:
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here without rights")
def test_a_disk_that_fills_up_holds_nothing_by_halves(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size=1500k tmpfs {disk}
        "$@" || status=$?
        cd {disk}/store
        find . -type f -name '.*'
        find tmp -type f 2>/dev/null || true
        ls objects
        exit $status
    """
    done = subprocess.run(
        [*IN_A_NAMESPACE, script, "sh", *RUN, "fetch", str(source)],
        check=False,
        env={**os.environ, "BREAKHIS_HOME": str(disk), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert last_line(done.stderr).startswith(f"error: {disk}/store/objects/blobs/")
    assert "MB free): the disk is full; free some space, or move the store" in last_line(done.stderr)
    assert done.stdout.splitlines() == ["blobs"]


@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here without rights")
def test_a_disk_that_is_read_only(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o ro tmpfs {disk}; exec "$@"'
    status, said = run([*IN_A_NAMESPACE, script, "sh", *RUN, "fetch", str(source)], disk)
    assert status == 3, said
    assert last_line(said).startswith(f"error: {disk}/store: ")
    assert "the disk is read-only; mount it for writing, or move the store" in last_line(said)


def test_a_folder_without_the_right_to_write(source: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    libc = ctypes.CDLL(None)

    def obey() -> None:  # else the superuser may write everywhere
        libc.prctl(_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE)

    status, said = run([*RUN, "fetch", str(source)], home, before=obey)
    assert status == 3, said
    assert last_line(said).startswith(f"error: {home}/store")
    assert "has no right to it; give it by chown or chmod" in last_line(said)


def test_a_limit_on_the_size_of_files(source: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    status, said = run([*RUN, "fetch", str(source)], tmp_path / "home", before=limit)
    assert status == 3, said
    assert "a file would be larger than may be; raise the limit by 'ulimit -f'" in last_line(said)
    assert not [path for path in (tmp_path / "home" / "store").rglob("*") if path.is_file()]


def test_a_limit_on_open_files(source: Path, tmp_path: Path) -> None:
    script = (
        "import resource, ml.data.sources.fetching, ml.data.manifest; from ml.cli import main; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); main()"
    )
    status, said = run([sys.executable, "-c", script, "fetch", str(source)], tmp_path / "home")
    assert status == 3, said
    assert "4 files open and may have no more; raise the limit by 'ulimit -n'" in last_line(said)


def test_a_result_that_nobody_can_take_down(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        status, said = run([*RUN, "config", "--json"], tmp_path, stdout=full.fileno())
    assert (status, len(said.splitlines())) == (3, 1)
    assert "the disk is full; free some space" in said


@pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here without rights")
@pytest.mark.parametrize("is_there", [True, False])
def test_drawn_pictures_that_do_not_fit_leave_nothing(tmp_path: Path, is_there: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = f"mkdir {disk}/drawn" if is_there else "true"
    script = f"""
        mount -t tmpfs -o size=1500k tmpfs {disk}
        {made}
        "$@" || status=$?
        find {disk} -mindepth 1
        exit $status
    """
    done = subprocess.run(
        [*IN_A_NAMESPACE, script, "sh", *RUN, "sources", "draw", f"{disk}/drawn", "--images", "82"],
        check=False,
        env={**os.environ, "BREAKHIS_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert last_line(done.stderr).startswith(f"error: {disk}/drawn")
    assert "MB free): the disk is full; free some space" in last_line(done.stderr)
    assert done.stdout.splitlines() == ([f"{disk}/drawn"] if is_there else [])


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("fetch", "x" * 100_000), 3, "xx…': a name has 200 characters at the most"),
        (("fetch", "x" * 100_000 + ".yaml"), 3, "cannot be read: File name too long"),
        (("validate", "manifest-" + "x" * 100_000), 3, "is no id; give one that a stage printed"),
        (("reproduce", "x" * 100_000, "y" * 100_000), 2, ""),
        (("x" * 100_000,), 2, "No such command"),
        (("config", f"--{'x' * 100_000}"), 2, "No such option"),
        (("config", "--json", *["x" * 900] * 100), 2, "Got unexpected extra arguments"),
    ],
)
def test_arguments_of_any_length(tmp_path: Path, arguments: tuple[str, ...], status: int, words: str) -> None:
    ended, said = run([*RUN, *arguments], tmp_path)
    assert ended == status, said[:2000]
    assert words in said
    assert (len(said) < 1000, "Traceback" in said) == (True, False)


def test_the_result_of_a_stage_in_airflow_is_whole_or_not_there(source: Path, tmp_path: Path) -> None:
    """Airflow's tasks run the same command; its last line is what the task fails with, and its status says for good."""
    (tmp_path / "file").write_text("no folder")
    result = tmp_path / "results" / "one.json"
    status, said = run([*RUN, "fetch", str(source), "--json", "--result", str(result)], tmp_path / "home")
    assert status == 0, said
    assert json.loads(result.read_text())["files"] == 3
    assert [path.name for path in result.parent.iterdir()] == ["one.json"]
