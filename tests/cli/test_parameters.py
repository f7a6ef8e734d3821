"""What every command makes of an empty path and of a mistyped name."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ml.cli import cli
from ml.core.mlflow_client import connect
from ml.core.parameters import FilledPath
from ml.core.settings import Settings


def walk(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk(inner, (*words, name))
    else:
        yield words, command


PARAMETERS = [(words, command, parameter) for words, command in walk(cli) for parameter in command.params]
PATHS = [
    pytest.param(words, command, parameter, id=f"{' '.join(words)} {parameter.name}")
    for words, command, parameter in PARAMETERS
    if isinstance(parameter.type, click.Path | click.File)
]


def test_every_parameter_that_holds_a_path_has_the_type() -> None:
    names = {"source", "training_set", "images", "folder", "output", "policy", "result_uri"}
    for words, _, parameter in PARAMETERS:
        if isinstance(parameter.type, click.Path | click.File | click.types.StringParamType):
            is_text = isinstance(parameter.type, click.types.StringParamType)
            holds_path = not is_text or parameter.name in names or parameter.metavar in {"URI", "FILE"}
            assert isinstance(parameter.type, FilledPath) == holds_path, (words, parameter.name)
    assert {parameter.values[2].name for parameter in PATHS} >= names


@pytest.mark.parametrize(("words", "called", "parameter"), PATHS)
def test_an_empty_path_is_wrong_usage(
    words: tuple[str, ...], called: click.Command, parameter: click.Parameter, command
) -> None:
    arguments = []
    for other in called.params:
        value = "" if other is parameter else "x" if other.required else None
        if isinstance(other.type, click.Choice) and value:
            value = str(other.type.choices[0])
        if value is not None:
            arguments += [other.opts[0], value] if isinstance(other, click.Option) else [value]
    code, _, err = command(*words, *arguments)
    assert code == 2
    assert "it is empty; say a name or a path" in err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("fetch", "brekhis"), "breakhis"),
        (("sources", "check", "dem"), "demo"),
        (("assemble", "breakhsi"), "breakhis"),
        (("run", "Demo"), "demo"),
        (("reproduce", "demoo"), "demo"),
    ],
)
def test_a_mistyped_source_or_set(arguments: tuple[str, ...], meant: str, command, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path))
    code, _, err = command(*arguments)
    assert code == 3
    assert f"did you mean {meant}?" in err


@pytest.fixture
def registry(fresh_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLflow with one model that no training set declares."""
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("BREAKHIS_MLFLOW_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    connect(Settings(mlflow_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")).create_registered_model("clinic-binary")


@pytest.mark.integration
@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    "arguments",
    [
        ("gate", "MODEL", "1"),
        ("promote", "MODEL", "1", "--dag-run", "r"),
        ("rollback", "MODEL", "1", "--dry-run", "--reason", "it was better"),
        ("rollback", "MODEL", "1", "--dag-run", "r"),
        ("withdraw", "MODEL", "1", "--dag-run", "r"),
        ("predict", "a.png", "--model", "models:/MODEL@champion"),
    ],
)
def test_a_mistyped_model(arguments: tuple[str, ...], command) -> None:
    code, _, err = command(*(word.replace("MODEL", "clinic-binray") for word in arguments))
    assert code == 3
    assert "did you mean clinic-binary?" in err
    code, _, err = command(*(word.replace("MODEL", "clinic-binary") for word in arguments))
    assert code in {3, 4}
    assert "did you mean" not in err


@pytest.mark.integration
@pytest.mark.usefixtures("registry")
def test_a_mistyped_model_of_a_declared_set(command, monkeypatch) -> None:
    code, _, err = command("gate", "demo-binry", "1")
    assert code == 3
    assert "did you mean demo-binary?" in err
    monkeypatch.setenv("BREAKHIS_AUDIT_KEY", "k" * 40)
    code, out, _ = command("history", "demo-binry")
    assert (code, "did you mean demo-binary?" in out) == (0, True)
