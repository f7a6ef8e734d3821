"""The logged model as its users get it: loaded by MLflow, or served by ``mlflow models serve``. Its network is tiny."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import requests
from PIL import Image

from ml.core.errors import RegistryError
from ml.images import decoding
from tests.helpers import pictures
from tests.helpers.made_up import png
from tests.helpers.served_models import encoded, logged  # noqa: F401  # a fixture

pytestmark = pytest.mark.integration


def test_a_model_refuses_to_load_where_pictures_are_prepared_in_another_way(logged, monkeypatch):
    folder = mlflow.artifacts.download_artifacts(logged["binary"])
    monkeypatch.setitem(decoding.PREPROCESSING, "version", 3)  # as in a release with another way of resizing
    with pytest.raises(RegistryError, match=r"prepared as \{.*2\}; the code of this process prepares them as \{.*3\}"):
        mlflow.pyfunc.load_model(folder)


def test_every_form_of_a_picture_gives_the_same_prediction(logged, tmp_path):
    model = mlflow.pyfunc.load_model(logged["binary"])
    path, data = tmp_path / "picture.png", png()
    path.write_bytes(data)
    pixels = np.asarray(Image.open(path))
    forms = [str(path), data, base64.b64encode(data).decode(), [data], [str(path)]]
    forms += [pd.DataFrame({"image": [form]}) for form in (str(path), data, pixels)]
    tables = [model.predict(form) for form in forms]
    assert len({round(frame["p_malignant"][0], 9) for frame in tables}) == 1
    frame = tables[0]
    assert list(frame) == ["label", "p_benign", "p_malignant", "threshold", "model_version", "run_id"]
    assert frame["label"][0] == ("malignant" if frame["p_malignant"][0] >= 0.3 else "benign")
    assert frame["model_version"][0] == ""
    assert model.metadata.signature.inputs is not None
    assert model.input_example is not None


def test_a_registered_version_returns_its_name_and_number(logged):
    frame = mlflow.pyfunc.load_model(logged["registered"]).predict([png()])
    assert frame["model_version"][0] == "made-binary/1"


def test_a_subtype_is_labelled_by_the_logged_decision_rule(logged):
    frame = mlflow.pyfunc.load_model(logged["subtype"]).predict([png()])
    assert frame["label"][0] == "PC"  # its offset outweighs every probability
    assert frame.filter(like="p_").sum(axis=1)[0] == pytest.approx(1)


GREY, COLOUR = Image.new("L", (50, 50), 128), Image.new("RGB", (50, 50), (200, 100, 150))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(COLOUR.resize((1, 1))), "image 2: 1x1 pixels"),
        (encoded(Image.fromarray(np.zeros((50, 50), np.uint16))), "image 2: pixel format I;16"),
        (encoded(GREY), "image 2: greyscale"),
        (encoded(COLOUR.convert("CMYK"), "JPEG"), "image 2: pixel format CMYK"),
        (encoded(Image.new("1", (20_000, 20_000))), "image 2: too many pixels; at most 100,000,000"),
        (png()[:-200], "image 2: "),
        (b"text", "image 2: not an image file"),
        (np.zeros((50, 50, 3)), "image 2: array of float64"),
        (np.full((50, 50, 3), 128, np.uint8), "image 2: greyscale, stored as RGB"),
        (pictures.png(np.full((50, 50, 3), (300, 200, 100), np.uint16)), "image 2: 16 bits a channel"),
        (np.zeros((4, 50, 3), np.uint8), "image 2: 50x4 pixels"),
        (7, "image 2 is a int"),
    ],
)
def test_unusable_pictures_are_refused_by_position(logged, data, message):
    model = mlflow.pyfunc.load_model(logged["binary"])
    with pytest.raises(Exception, match=message):
        model.predict(pd.DataFrame({"image": [png(), data]}))


def test_pictures_with_transparency_are_accepted(logged):
    model = mlflow.pyfunc.load_model(logged["binary"])
    a, b = model.predict(pd.DataFrame({"image": [encoded(COLOUR), encoded(COLOUR.convert("RGBA"))]}))["p_malignant"]
    assert a == b


def test_paths_can_be_switched_off(logged, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png())
    model = mlflow.pyfunc.load_model(logged["binary"], model_config={"allow_paths": False})
    assert len(model.predict([png()])) == 1
    with pytest.raises(Exception, match="paths are not read here"):
        model.predict([str(path)])


@pytest.fixture(scope="module")
def server(logged, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    environment = {**os.environ, "MLFLOW_TRACKING_URI": logged["settings"].mlflow_uri, "NO_PROXY": "127.0.0.1"}
    # MLflow calls uvicorn by its name.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", logged["binary"], "--port", str(port), "--host", "127.0.0.1", "--workers", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    if requests.get(f"{url}/ping", timeout=2).ok:
                        break
                except requests.ConnectionError:
                    time.sleep(0.3)
            else:
                pytest.fail((folder / "log").read_text())
            yield url
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def request_predictions(server: str, *images: str) -> requests.Response:
    table = {"columns": ["image"], "data": [[image] for image in images]}
    return requests.post(f"{server}/invocations", json={"dataframe_split": table}, timeout=60)


def test_a_served_model_predicts_what_a_loaded_one_predicts(logged, server):
    images = [base64.b64encode(png(seed)).decode() for seed in (0, 1)]
    answer = request_predictions(server, *images)
    assert answer.ok, answer.text
    expected = mlflow.pyfunc.load_model(logged["binary"]).predict(images)
    for served, row in zip(answer.json()["predictions"], expected.to_dict("records"), strict=True):
        assert served["p_malignant"] == pytest.approx(row["p_malignant"], abs=1e-6)
        assert (served["label"], served["run_id"]) == (row["label"], row["run_id"])


def test_a_served_model_reads_no_files(server, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(png())
    answer = request_predictions(server, str(path))
    assert answer.status_code == 400
    assert "paths are not read here" in answer.text
    assert request_predictions(server, str(Path("/etc/hostname"))).status_code == 400


def test_a_served_model_refuses_an_unusable_picture(server):
    answer = request_predictions(server, base64.b64encode(encoded(GREY)).decode())
    assert answer.status_code == 400
    assert "greyscale" in answer.text
