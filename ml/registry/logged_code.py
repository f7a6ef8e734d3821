"""Checks what a training logged beside a model's network: the code and the packages that whoever loads the model runs.

Anybody who may log to MLflow can log other code with a network that scores as its run says. So of a new version every
file has to be one that a training with this release logs.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import ml
from ml.core.errors import Refused
from ml.core.hashes import hash_file
from ml.core.messages import list_items, quote_value
from ml.registry.packaging import REQUIREMENTS

_MODULE = "pyfunc.py"
_FILES = frozenset(
    {
        *("MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", _MODULE),
        *("input_example.json", "serving_input_example.json", "artifacts/network.keras", "artifacts/facts.json"),
    }
)
_CODE = "code/ml/"

_FLAVOUR: Mapping[str, Any] = {
    "loader_module": "mlflow.pyfunc.loaders.code_model",
    "code": "code",
    "config": {"allow_paths": True},
    "env": {"conda": "conda.yaml", "virtualenv": "python_env.yaml"},
    "streamable": False,
}
_FREE = frozenset({"artifacts", "cloudpickle_version", "model_code_path", "python_version"})
"""Fields of the flavour that differ from training to training. Where the artifacts lie is checked where they are read;
of the code's path MLflow reads the last part."""

_VERSION = r"\d[0-9A-Za-z.+!]{0,40}"
_PACKAGES = "|".join((*REQUIREMENTS, "pip", "setuptools", "wheel"))
_ENVIRONMENT = re.compile(
    rf"(({_PACKAGES})((==|<=|>=){_VERSION})?|python={_VERSION}|{_VERSION}|-r requirements\.txt|conda-forge|mlflow-env)"
)
"""What stands in the files that name packages to install."""


def check_logged_code(folder: Path, files: Mapping[str, str]) -> None:
    """Check that a model brings along nothing but this release's code and the packages that a training names.

    Args:
        folder: the model's files.
        files: path -> SHA-256 of each of them.

    Raises:
        Refused: it brings other code, names other packages, or is loaded in another way.
    """
    own = {_CODE + path: sha256 for path, sha256 in _hash_release()}
    others = [path for path in sorted(files) if path not in _FILES and path not in own]
    changed = [path for path in sorted(files) if path in own and files[path] != own[path]]
    if files.get(_MODULE) != own[f"{_CODE}registry/{_MODULE}"]:
        changed.append(_MODULE)
    if others or changed:
        raise Refused(
            f"its model brings along code that is not this release's: {list_items(others + changed)}; whoever loads "
            "the model would run it. Train the model again with this release"
        )
    _check_flavour(folder / "MLmodel")
    for name in ("conda.yaml", "python_env.yaml", "requirements.txt"):
        for text in _list_texts(folder / name):
            if not _ENVIRONMENT.fullmatch(text):
                raise Refused(
                    f"{name} of its model says {quote_value(text, 80)}, which no training writes there; train the "
                    "model again"
                )


def _hash_release() -> Iterator[tuple[str, str]]:
    package = Path(ml.__file__).parent
    for file in package.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file.relative_to(package).as_posix(), hash_file(file)


def _check_flavour(file: Path) -> None:
    """Check how MLflow would load the model.

    Raises:
        Refused: otherwise than a training logs it.
    """
    try:
        flavours = yaml.safe_load(file.read_text(encoding="utf-8"))["flavors"]
        flavour = dict(flavours["python_function"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        raise Refused("its MLmodel cannot be read; train the model again") from None
    wrong = [key for key, value in _FLAVOUR.items() if flavour.get(key) != value]
    wrong += sorted(map(str, flavour.keys() - _FLAVOUR.keys() - _FREE)) + sorted(
        map(str, flavours.keys() - {"python_function"})
    )
    if str(flavour.get("model_code_path")).rpartition("/")[2] != _MODULE:
        wrong.append("model_code_path")
    if wrong:
        raise Refused(f"its MLmodel says {list_items(wrong)} otherwise than a training does; train the model again")


def _list_texts(file: Path) -> Iterator[str]:
    """Yields every text of a file that names packages, YAML or lines.

    Raises:
        Refused: it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if file.suffix == ".yaml" else text.split("\n")
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        raise Refused(f"{file.name} of its model cannot be read; train the model again") from None
    pending = [content]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, list):
            pending += one
        elif one not in ("", None):
            yield str(one).strip()
