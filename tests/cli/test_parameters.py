"""What every command makes of an empty text and of a mistyped name."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ml.cli import cli
from ml.core.mlflow_client import connect
from ml.core.settings import Settings


def walk(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk(inner, (*words, name))
    else:
        yield words, command


PARAMETERS = [
    pytest.param(words, command, parameter, id=f"{' '.join(words)} {parameter.name}")
    for words, command in walk(cli)
    for parameter in command.params
    if not (isinstance(parameter, click.Option) and parameter.is_flag)
]


def test_parameters_of_every_kind_are_tried() -> None:
    tried = {parameter.values[2].opts[0] for parameter in PARAMETERS}
    texts = {"patient", "model", "--cohort", "--why", "--reason", "--weights", "--dataset", "--dag-run", "--raw"}
    paths = {"source", "training_set", "images", "folder", "--output", "--policy", "--result", "--model"}
    assert tried >= texts | paths | {"--seed", "--preset", "--shard", "--although-withdrawn", "name"}


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize(("words", "called", "parameter"), PARAMETERS)
def test_an_empty_text_is_wrong_usage(
    words: tuple[str, ...], called: click.Command, parameter: click.Parameter, empty: str, command
) -> None:
    arguments = []
    for other in called.params:
        value = empty if other is parameter else "x" if other.required else None
        if isinstance(other.type, click.Choice) and value == "x":
            value = str(other.type.choices[0])
        if value is not None:
            arguments += [other.opts[0], value] if isinstance(other, click.Option) else [value]
    code, _, err = command(*words, *arguments)
    assert code == 2
    assert f"for '{parameter.opts[0]}" in err or f"for '{parameter.make_metavar(click.Context(called))}" in err
    is_told_by_kind = isinstance(parameter.type, click.Choice | click.types.IntParamType) or parameter.name == "shard"
    assert is_told_by_kind or "it is empty; " in err


def test_an_empty_path_is_told_what_the_current_folder_is_called(command) -> None:
    code, _, err = command("predict", "", "--model", "m")
    assert (code, "it is empty; say a name or a path (the current folder is '.')" in err) == (2, True)
    code, _, err = command("manifest", "demo", "--raw", "")
    assert (code, "'--raw': it is empty; give it a value, or leave it out" in err) == (2, True)
    code, _, err = command("history", "")
    assert (code, "'MODEL': it is empty; give it a value\n" in err) == (2, True)


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
    code, out, _ = command("history", "demo-binary")
    assert (code, out) == (0, "nothing was ever decided about demo-binary\n")
