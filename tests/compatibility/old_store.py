"""A store and an MLflow that commit f535279 wrote, to be unpacked anywhere; write_store.py made them."""

import json
import tarfile
from pathlib import Path

from ml.core.mlflow_files import relocate_files

PREFIX = "/old-home"
"""Where it was written."""


def unpack(archive: Path, folder: Path) -> dict[str, str]:
    """Unpack the archive into a folder, which is made if need be, and have everything point there.

    Returns:
        the environment in which ``breakhis`` works on it. Whoever promotes or rolls back needs Airflow's besides:
        BREAKHIS_AIRFLOW_URL, BREAKHIS_AIRFLOW_USER.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    with tarfile.open(archive, "r:xz") as tar:
        tar.extractall(folder, filter="data")
    before, now = f"file://{PREFIX}/", f"{folder.as_uri()}/"
    relocate_files(folder)
    told = folder / "expected.json"
    told.write_text(told.read_text().replace(before, now).replace(f"{PREFIX}/", f"{folder}/"))
    return {
        "BREAKHIS_HOME": str(folder),
        "BREAKHIS_STORE": (folder / "store").as_uri(),
        "BREAKHIS_CONF": str(folder / "conf"),
        "BREAKHIS_MLFLOW_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "BREAKHIS_WEIGHTS": str(folder / "backbone.keras"),
        "BREAKHIS_BACKEND": "openvino",
        "BREAKHIS_WORKERS": "1",
        "BREAKHIS_AUDIT_KEY": json.loads((folder / "secrets.json").read_text())["audit"],
    }


def expected(folder: Path) -> dict[str, object]:
    """What f535279 said of it: see ``main`` in write_store.py."""
    return dict(json.loads((folder / "expected.json").read_text()))
