"""The contracts of ``make lint`` on who imports whom refuse what breaks them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PLANTED = {
    "ml.core.store -> ml.promotion.gates": ("ml/core/store.py", "from ml.promotion import gates\n"),
    "ml.images.decoding -> ml.training.presets": (
        "ml/images/decoding.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ml.training.presets import Preset\n",
    ),
    "ml.data.splits -> ml.evaluation.metrics": (
        "ml/data/splits.py",
        "def late():\n    from ml.evaluation import metrics\n",
    ),
    "ml.core.errors -> airflow": ("ml/core/errors.py", "def late():\n    import airflow.sdk\n"),
    "Modules do not import each other in circles BROKEN": (
        "plugins/breakhis_airflow/addresses.py",
        "def late():\n    from breakhis_airflow import web\n",
    ),
}
"""What the linter says -> the file, and the import in it that breaks a contract."""


@pytest.fixture
def copy(tmp_path):
    for folder in ("ml", "plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder):
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{folder / 'plugins'}", "COLUMNS": "200"}
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_contracts_hold(copy):
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 3 kept, 0 broken." in done.stdout


def test_what_breaks_a_contract_is_refused_and_named(copy):
    for name, code in PLANTED.values():
        file = copy / name
        file.write_text(f"{file.read_text()}\n{code}")
    done = lint(copy)
    assert done.returncode == 1
    assert "Contracts: 0 kept, 3 broken." in done.stdout
    assert [broken for broken in PLANTED if broken not in done.stdout] == []


def test_a_new_package_has_to_be_given_its_place(copy):
    (copy / "ml" / "extras").mkdir()
    (copy / "ml" / "extras" / "__init__.py").touch()
    done = lint(copy)
    assert done.returncode == 1
    assert "ml.extras" in done.stdout


@pytest.mark.parametrize("root", ["ml", "plugins/breakhis_airflow"])
def test_no_folder_is_left_unread(root):
    """The linter passes over a folder without ``__init__.py`` and says nothing."""
    folders = {file.parent for file in (ROOT / root).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []
