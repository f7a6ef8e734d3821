"""A logged model in a process of its own: what it is given, and what becomes of its errors."""

import textwrap

import mlflow
import pytest

from ml.core.errors import RegistryError
from ml.registry.version_scoring import MAX_BYTES, MAX_PICTURES, ModelProcess, batches

pytestmark = pytest.mark.integration

MODEL = textwrap.dedent(
    """
    import os
    import sys

    import mlflow.pyfunc
    import pandas as pd


    class Model(mlflow.pyfunc.PythonModel):
        def load_context(self, context):
            print("words of a library")
            if os.path.exists(context.artifacts["broken"]) and open(context.artifacts["broken"]).read():
                raise ValueError("its network is broken")

        def predict(self, context, model_input: pd.DataFrame, params=None):
            pictures = model_input.iloc[:, 0].tolist()
            if b"bad" in pictures:
                raise ValueError("a picture is bad")
            if b"end" in pictures:
                os._exit(9)
            told = {"secret": os.environ.get("BREAKHIS_AUDIT_KEY", ""), "has_ml": "ml" in sys.modules}
            return pd.DataFrame([{"size": len(picture), **told} for picture in pictures])


    mlflow.models.set_model(Model())
    """
)


@pytest.fixture
def save(tmp_path):
    """Saves a model; returns its folder."""

    def make(broken=""):
        (tmp_path / "model.py").write_text(MODEL)
        (tmp_path / "broken").write_text(broken)
        mlflow.pyfunc.save_model(
            tmp_path / "saved",
            python_model=str(tmp_path / "model.py"),
            artifacts={"broken": str(tmp_path / "broken")},
            pip_requirements=[],
        )
        return tmp_path / "saved"

    return make


def test_a_model_is_given_pictures_and_no_secret(save, monkeypatch):
    monkeypatch.setenv("BREAKHIS_AUDIT_KEY", "the key of the audit log")
    with ModelProcess(save(), "made version 1") as process:
        rows = process.predict([b"x", b"four"])
        assert rows == [{"size": size, "secret": "", "has_ml": False} for size in (1, 4)]
        # One that the model refuses takes none of the others along.
        sizes = [row.get("size", row.get("error")) for row in process.predict([b"one", b"bad", b"three"])]
        assert sizes == [3, "a picture is bad", 5]
        with pytest.raises(
            RegistryError, match="made version 1 ended while it classified pictures: its process ended with status 9"
        ):
            process.predict([b"end"])


def test_a_model_that_does_not_load_says_why(save):
    with pytest.raises(RegistryError, match=r"made version 1 cannot be loaded: .*its network is broken"):
        ModelProcess(save(broken="yes"), "made version 1").__enter__()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([], []), ([1] * (MAX_PICTURES + 1), [MAX_PICTURES, 1]), ([MAX_BYTES + 1, 1, MAX_BYTES, 1], [1, 2, 1])],
)
def test_batches_are_as_large_as_memory_allows(sizes, expected):
    assert [len(batch) for batch in batches(sizes, int)] == expected
