"""The hashes of a model version's files, by which its evidence names them."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from ml.core.errors import Refused
from ml.core.hashes import hash_files

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


def is_used_in_place(version: "ModelVersion", client: "MlflowClient") -> bool:
    """Returns whether a model's files are used where they lie: on a disk, not in an object store."""
    location = client.get_model_version_download_uri(version.name, str(version.version))
    return urlsplit(location).scheme in {"", "file"}


def hash_model_files(folder: Path, name: str, *, in_place: bool) -> dict[str, str]:
    """Returns the SHA-256 of each of a model's files. None may be compiled code: Python would run it, not the source.

    Where files are used in place, Python writes such code into ``__pycache__`` when the model is loaded. It is removed
    first: nothing is lost, and none of it is run.

    Raises:
        Refused: compiled code lies elsewhere, or cannot be removed.
    """
    for cache in list(folder.rglob("__pycache__")) if in_place else ():
        with suppress(OSError):
            shutil.rmtree(cache)
    hashes = hash_files(folder)
    # MLflow writes it into the folder when a version is loaded; it is not part of the model.
    hashes.pop("registered_model_meta", None)
    compiled = sorted(file for file in hashes if file.endswith((".pyc", ".pyo")) or "__pycache__" in file.split("/"))
    if compiled:
        raise Refused(
            f"{name}: compiled code lies among its files, which whoever loads the model would run: "
            f"{', '.join(compiled[:3])}; find out how it came there, and delete it"
        )
    return hashes
