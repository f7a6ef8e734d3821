"""The Makefile's set-up: which Python it takes, and what it says where there is none. uv and pip are stood in for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "--extra airflow --extra data --extra mlflow-server --extra train"

# Stands in for a Python: says it is of that version, and makes "environments" with a uv that notes how it was called.
PYTHON = """#!/bin/bash
me=$(readlink -f "$0")
case "$*" in
  *version_info*) exit {fits} ;;
  *ensurepip*) exit {venv} ;;
  *sys.executable*) echo "$me" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$me" "$3/bin/python"; echo "venv $me" >> calls ;;
  "-m pip "*)
    printf '#!/bin/sh\\necho "uv $*" >> calls; mkdir -p .venv\\n' > .venv-uv/bin/uv
    chmod +x .venv-uv/bin/uv ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing in it but what make looks at."""
    folder = tmp_path / "checkout with space"
    (folder / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("uv.lock", "pyproject.toml"):
        (folder / name).touch()
        os.utime(folder / name, (1, 1))
    for name in ("make", "bash", "sh", "env", "awk", "cat", "cp", "rm", "mkdir", "touch", "readlink", "chmod"):
        found = shutil.which(name)
        assert found
        (folder / "bin" / name).symlink_to(found)
    return folder


def python(checkout: Path, name: str, *, fits: bool = True, venv: bool = True) -> Path:
    file = checkout / "bin" / name
    file.write_text(PYTHON.format(fits=int(not fits), venv=int(not venv)))
    file.chmod(0o755)
    return file


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(checkout / "bin"), "HOME": str(checkout)}
    return subprocess.run(
        ["make", *arguments], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def calls(checkout: Path) -> list[str]:
    file = checkout / "calls"
    return file.read_text().splitlines() if file.exists() else []


def test_no_python_at_all(checkout: Path) -> None:
    result = make(checkout, "doctor")
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "no Python 3.11, 3.12 or 3.13" in lines[0]
    assert "apt install python3 python3-venv" in lines[0]


def test_a_python_that_does_not_fit(checkout: Path) -> None:
    python(checkout, "python3", fits=False)
    assert "no Python 3.11, 3.12 or 3.13" in make(checkout, "test").stderr


def test_a_python_without_venv_names_the_package(checkout: Path) -> None:
    python(checkout, "python3", venv=False)
    result = make(checkout, "run")
    assert "python3 cannot make virtual environments" in result.stderr
    assert "apt install python3-venv" in result.stderr
    assert not (checkout / ".venv-uv").exists()


def test_the_named_python_is_the_only_one_tried(checkout: Path) -> None:
    python(checkout, "python3")
    assert "among: /bin/false" in make(checkout, "PYTHON=/bin/false", "doctor").stderr
    assert calls(checkout) == []


def test_another_python_is_found(checkout: Path) -> None:
    python(checkout, "python3", fits=False)
    good = python(checkout, "python3.12")
    make(checkout, ".venv/.run")
    assert calls(checkout)[0] == f"venv {good}"
    assert calls(checkout)[1] == f"uv sync --frozen --inexact {EXTRAS} --python {good} --no-dev"


def test_set_up_once_per_lock_file(checkout: Path) -> None:
    python(checkout, "python3")
    for _ in range(2):
        assert make(checkout, ".venv/.run").returncode == 0
    assert len(calls(checkout)) == 2
    # Later by more than the clock of any file system is coarse.
    later = (checkout / ".venv" / ".run").stat().st_mtime + 5
    os.utime(checkout / "uv.lock", (later, later))
    make(checkout, ".venv/.run")
    assert len(calls(checkout)) == 3


def test_run_and_test_in_one_checkout_do_not_undo_each_other(checkout: Path) -> None:
    good = python(checkout, "python3")
    for target in (".venv/.run", ".venv/.dev", ".venv/.run", ".venv/.dev"):
        assert make(checkout, target).returncode == 0
    assert calls(checkout)[1:] == [
        f"uv sync --frozen --inexact {EXTRAS} --python {good} --no-dev",
        f"uv sync --frozen --inexact {EXTRAS} --extra fab --python {good}",
    ]
    # Tests first: running needs nothing more.
    shutil.rmtree(checkout / ".venv")
    make(checkout, ".venv/.dev")
    make(checkout, ".venv/.run")
    assert calls(checkout)[3:] == [f"uv sync --frozen --inexact {EXTRAS} --extra fab --python {good}"]


def test_help_names_every_target(checkout: Path) -> None:
    listing = make(checkout, "help").stdout
    for target in ("run", "demo", "test", "lint", "up", "down", "status", "doctor"):
        assert f"make {target} " in listing
    assert make(checkout).stdout == listing
