"""The kinds of input of the command line: what people and DAGs write after ``breakhis``, and settings."""

import io
import os
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from ml.core.settings import Settings, read_settings
from tests.fuzz.airflow_kinds import copy_conf
from tests.fuzz.mutation import ODD_TEXTS

_COMMANDS = (
    ("fetch", "demo"),
    ("manifest", "demo", "--raw", "raw-0123456789ab"),
    ("validate", "manifest-0123456789ab"),
    ("publish", "manifest-0123456789ab"),
    ("assemble", "demo"),
    ("split", "dataset-0123456789ab"),
    ("features", "dataset-0123456789ab", "--preset", "demo", "--weights", "weights-0123456789ab", "--shard", "1/3"),
    ("register", "0123456789abcdef0123456789abcdef"),
    ("gate", "made-binary", "1", "--evidence", "evidence-0123456789ab"),
    ("promote", "made-binary", "1", "--dag-run", "made-binary-v1"),
    ("rollback", "made-binary", "1", "--dry-run", "--reason", "it fails on 400X"),
    ("withdraw", "made-binary", "1", "--dag-run", "manual"),
    ("history", "made-binary"),
    ("erase", "1001", "--cohort", "breakhis", "--why", "request 7", "--yes"),
    ("sources", "new", "ours", "--kind", "directory"),
    ("sources", "check", "demo"),
)

_TEXTS = tuple(text for text in ODD_TEXTS if "\0" not in text and "\ud800" not in text)
"""A variable or an argument holds neither a null character nor half a character."""


def prepare_commands(scratch: Path) -> Path:
    """Sets an environment with a store, an MLflow and a conf folder of its own."""
    os.chdir(scratch)
    os.environ |= {
        "BREAKHIS_HOME": str(scratch / "home"),
        "BREAKHIS_CONF": str(copy_conf(scratch)),
        "BREAKHIS_MLFLOW_URI": f"sqlite:///{scratch / 'mlflow.db'}",
        "BREAKHIS_AUDIT_KEY": "key",
    }
    from ml.core.mlflow_client import connect

    connect(read_settings()).search_experiments()  # makes its tables, which takes seconds
    return scratch


def use_command(_: Path, rng: random.Random) -> None:
    """Runs a command of which one to three words are odd."""
    from ml.cli import cli

    words = list(rng.choice(_COMMANDS))
    for _number in range(rng.randint(1, 3)):
        place = rng.randrange(1, len(words)) if words[0] != "sources" else rng.randrange(2, len(words))
        words[place] = rng.choice((*_TEXTS, "x" * 300, f"{'x' * 300}.yaml", "~no-such-user/x.yaml", "a/b"))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        cli(words, standalone_mode=False)


def prepare_settings(scratch: Path) -> Path:
    """Sets a home folder of its own."""
    os.chdir(scratch)
    os.environ["BREAKHIS_HOME"] = str(scratch / "home")
    return scratch


def use_settings(_: Path, rng: random.Random) -> None:
    """Reads the settings from an environment of which one to three variables are odd."""
    names = [f"BREAKHIS_{name.upper()}" for name in rng.sample(list(Settings.model_fields), rng.randint(1, 3))]
    before = dict(os.environ)
    try:
        os.environ.update({name: rng.choice(_TEXTS) for name in names})
        read_settings()
    finally:
        os.environ.clear()
        os.environ.update(before)
