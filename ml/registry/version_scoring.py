"""A registered model classifies pictures, in a process of its own.

A model is code that somebody has logged. Who decides about models holds the key of the audit log and passwords, and
never runs that code itself: the process here is given the model's files and pictures, and none of the secrets.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ml.core.errors import RegistryError, TryAgain
from ml.core.mlflow_client import fetch_artifacts

if TYPE_CHECKING:
    import pandas as pd

_AT_A_TIME = 256
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
"""What is passed on of the environment: where Python, its packages and the GPU are."""


def classify(model: str, number: int, pictures: Iterable[bytes]) -> "pd.DataFrame":
    """What a model version says of pictures: a row each, as of :class:`ml.registry.pyfunc.ImageClassifier`.

    Raises:
        TryAgain: its files cannot be read.
        RegistryError: it cannot classify them.
    """
    import pandas as pd
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory(prefix="breakhis-") as scratch:
        folder = Path(scratch)
        (folder / "pictures").mkdir()
        (folder / "model").mkdir()
        for k, picture in enumerate(pictures):
            (folder / "pictures" / f"{k:08d}").write_bytes(picture)
        try:
            lies = str(fetch_artifacts(f"models:/{model}/{number}", folder / "model"))
        except (MlflowException, OSError) as error:
            raise TryAgain(f"{model} version {number}: its files cannot be read: {error}") from None
        own = {"HOME": scratch, "TMPDIR": scratch, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'none.db'}"}
        # Compiled code beside the model's files would be a change of them.
        own |= {"PYTHONDONTWRITEBYTECODE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(
            [sys.executable, "-m", "ml.registry.version_scoring", lies],
            cwd=folder,
            env={name: os.environ[name] for name in _KEPT if name in os.environ} | own,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1]
            raise RegistryError(f"{model} version {number} cannot classify the test images that came after it: {why}")
        return pd.read_parquet(folder / "said.parquet")


def main(model: str) -> None:
    """Classify the files in ``pictures/`` of the working folder, and write ``said.parquet`` there."""
    import mlflow.pyfunc
    import pandas as pd

    loaded = mlflow.pyfunc.load_model(model)
    files = sorted(Path("pictures").iterdir())
    said = [
        loaded.predict(pd.DataFrame({"image": [file.read_bytes() for file in files[start : start + _AT_A_TIME]]}))
        for start in range(0, len(files), _AT_A_TIME)
    ]
    pd.concat(said, ignore_index=True).to_parquet("said.parquet", index=False)


if __name__ == "__main__":
    main(sys.argv[1])
