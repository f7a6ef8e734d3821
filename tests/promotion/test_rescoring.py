"""Registration scores the test side again, with the network of the run and no code that came with it."""

import json
import shutil
import zipfile
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ml.core.errors import Refused, StoreError
from ml.evaluation.decision_rule import DecisionRule
from ml.promotion import evidence as evidence_module
from ml.promotion import rescoring
from ml.promotion.evidence import verify_evidence
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from tests.helpers.decisions import read_aliases
from tests.helpers.registry_world import NOT_RESCORED, RegistryWorld
from tests.helpers.served_models import network

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def world(tmp_path_factory, fresh_database):
    """A world whose store has pictures."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copy(fresh_database, folder / "mlflow.db")
    return RegistryWorld.create(folder, f"sqlite:///{folder / 'mlflow.db'}", pictures=True)


@pytest.fixture(scope="module")
def honest(world):
    """An honest run, and what registering it gave."""
    run = world.log_trained_run(network(1))
    return run, register_run(run, world.store, world.settings)


def register_anew(world, run):
    """Registers a run that was registered before, as if it had not been: its test side is scored again."""
    for version in world.client.search_model_versions(f"run_id='{run}'"):
        world.client.delete_model_version(version.name, version.version)
    return register_run(run, world.store, world.settings)


def in_this_process(monkeypatch, probabilities):
    """Has these probabilities in place of those of a network in a process of its own, which takes seconds to start."""
    monkeypatch.setattr(rescoring, "_score", lambda *_: np.asarray(probabilities, dtype=float))


def read_outputs(world):
    """Returns the probabilities that an honest run logs."""
    logged = []
    world.log_trained_run(network(1), lambda outputs, _: logged.append(outputs) or outputs)
    return logged[0][:, None]


def test_an_honest_run_is_registered_with_what_was_scored(world, honest):
    _, registered = honest
    recorded = world.store.meta(registered["evidence"])
    assert recorded["rescored"] == {"images": recorded["sides"]["test"]["images"], "tolerance": 1e-3}
    assert recorded["rescored"]["images"] > 10
    assert judge_version("made-binary", "1", world.store, world.settings)["evidence"] == registered["evidence"]


def test_forged_predictions_with_figures_that_follow_from_them_are_refused(world, honest):
    """What the figures alone cannot show: all that the run logged agrees with itself."""
    before = read_aliases(world)
    run = world.log_trained_run(
        network(1), lambda outputs, _: np.clip(outputs + np.linspace(0, 0.4, len(outputs)), 0, 1)
    )
    message = (
        r"p_malignant of the test image [0-9a-f]{64} is 0\.\d{4}, in test_predictions\.parquet [01]\.\d{4} \(\d+ of"
    )
    with pytest.raises(Refused, match=message):
        register_run(run, world.store, world.settings)
    assert read_aliases(world) == before


@settings(max_examples=15, deadline=timedelta(seconds=30))
@given(row=st.integers(0), by=st.sampled_from([-2e-3, -1.1e-3, -0.9e-3, 0.0, 0.9e-3, 1.1e-3, 2e-3, float("nan")]))
def test_a_probability_may_differ_by_the_tolerance(world, honest, row, by):
    outputs = read_outputs(world) if not KNOWN else KNOWN[0]
    KNOWN[:] = [outputs]
    scored = outputs.copy()
    scored[row % len(scored)] += by
    with pytest.MonkeyPatch.context() as monkeypatch:
        in_this_process(monkeypatch, scored)
        if abs(by) <= rescoring.TOLERANCE:
            recorded = world.store.meta(register_anew(world, honest[0])["evidence"])
            assert recorded["rescored"] == {"images": len(scored), "tolerance": rescoring.TOLERANCE}
        else:
            with pytest.raises(Refused, match=r"does not give the predictions|gives no 1 finite"):
                register_anew(world, honest[0])


KNOWN: list[np.ndarray] = []


def test_outputs_of_another_shape_are_refused(world, honest, monkeypatch):
    in_this_process(monkeypatch, np.full((3, 1), 0.5))
    with pytest.raises(Refused, match="gives no 1 finite probabilities for each picture"):
        register_anew(world, honest[0])


def test_a_model_that_would_decide_otherwise_is_refused(world):
    run = world.log_trained_run(network(1), rule=DecisionRule(threshold=0.01))
    with pytest.raises(Refused, match=r"says that threshold is '0\.01'; by its run and this release it is 0\.5"):
        register_run(run, world.store, world.settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["malignant", "benign"]}, "says that classes is"),
        ({"task": "subtype"}, "says that task is"),
        ({"preparation": {"size": 224}}, "says that preparation is"),
        ({"run_id": "another"}, "says that run_id is 'another'"),
        ({"threshold": "0.5"}, "holds no decision rule of a binary model"),
        ({"threshold": None, "offsets": [1, 2]}, "holds no decision rule of a binary model"),
        ({"threshold": True}, "holds no decision rule of a binary model"),
    ],
)
def test_facts_that_are_not_those_of_the_run(world, change, message):
    run = world.log_trained_run(network(1))
    file = world.model_folder(run) / "artifacts" / "facts.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(Refused, match=message):
        register_run(run, world.store, world.settings)


def test_a_network_with_code_is_refused_before_it_is_read(world, monkeypatch):
    import keras

    run = world.log_trained_run(network(1))
    inputs = keras.Input((224, 224, 3))
    marked = keras.layers.Lambda(lambda x: x)(inputs)
    outputs = keras.layers.Dense(1, activation="sigmoid")(keras.layers.GlobalAveragePooling2D()(marked))
    keras.Model(inputs, outputs).save(world.model_folder(run) / "artifacts" / "network.keras")
    monkeypatch.setattr(rescoring, "NetworkProcess", lambda *_: pytest.fail("the network was read"))
    with pytest.raises(Refused, match=r"configuration names keras\.layers\.Lambda, which is none of the layers"):
        register_run(run, world.store, world.settings)


def test_a_file_that_is_no_network(world):
    run = world.log_trained_run(network(1))
    (world.model_folder(run) / "artifacts" / "network.keras").write_bytes(b"no archive")
    with pytest.raises(Refused, match=r"network\.keras is no network that Keras has saved"):
        register_run(run, world.store, world.settings)


def test_a_model_that_no_training_has_logged(world):
    with pytest.raises(Refused, match="its model has no network of its own, as a training logs it"):
        register_run(world.log_run(), world.store, world.settings)


@pytest.mark.parametrize("path", ["../../facts.json", "/etc/passwd", "MLmodel\0"])
def test_a_network_from_elsewhere(world, path):
    run = world.log_trained_run(network(1))
    file = world.model_folder(run) / "MLmodel"
    file.write_text(file.read_text().replace("path: artifacts/network.keras", f"path: {json.dumps(path)}"))
    with pytest.raises(Refused, match="its model has no network of its own"):
        register_run(run, world.store, world.settings)


def test_a_picture_that_was_erased(world, honest):
    blob = world.store.local(world.store.blob_key(world.scores(0.9, *world.data["made"]).rows["sha256"][0]))
    content = blob.read_bytes()
    blob.unlink()
    try:
        with pytest.raises(
            StoreError, match=r"test images cannot be scored again: .*not in the store. If a patient was"
        ):
            register_anew(world, honest[0])
    finally:
        blob.write_bytes(content)
    assert register_anew(world, honest[0])["model"] == "made-binary"


def test_evidence_of_an_earlier_release_keeps_its_id_and_is_scored_by_the_gate(world, honest, monkeypatch):
    run = world.log_trained_run(network(1), lambda outputs, _: np.clip(outputs + 0.2, 0, 1))
    with monkeypatch.context() as earlier:
        earlier.setattr(evidence_module, "rescore_predictions", lambda *_: NOT_RESCORED)
        registered = register_run(run, world.store, world.settings)
    recorded = {key: value for key, value in world.store.meta(registered["evidence"]).items() if key != "id"}
    del recorded["rescored"]
    older = world.store.create("evidence", recorded, recorded)
    number = str(registered["version"])
    world.client.set_model_version_tag("made-binary", number, "breakhis.evidence", older)
    version = world.client.get_model_version("made-binary", number)
    assert verify_evidence(version, world.store, world.settings)[0] == older  # as of a champion
    with monkeypatch.context() as scored:
        in_this_process(scored, np.full((recorded["sides"]["test"]["images"], 1), 0.123))
        with pytest.raises(Refused, match="does not give the predictions that its run logged"):
            judge_version("made-binary", number, world.store, world.settings)
    monkeypatch.setattr(evidence_module, "rescore_predictions", lambda *_: NOT_RESCORED)
    assert register_run(run, world.store, world.settings)["evidence"] == older


def test_a_network_that_ends_its_process_is_told(world, honest, monkeypatch):
    """Such as one that asks for more memory than there is: its weights do not fit its configuration."""
    run = world.log_trained_run(network(1))
    file = world.model_folder(run) / "artifacts" / "network.keras"
    with zipfile.ZipFile(file) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    content["model.weights.h5"] = b"no weights"
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(Exception, match="its network cannot be loaded: "):
        register_run(run, world.store, world.settings)


def _append(text):
    return lambda file: file.write_text(file.read_text() + text)


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("pyfunc.py", _append("\n# answers otherwise\n"), r"not this release's: pyfunc\.py"),
        (
            "code/ml/images/decoding.py",
            _append("\n# reads otherwise\n"),
            r"not this release's: code/ml/images/decoding\.py",
        ),
        (
            "code/sitecustomize.py",
            lambda file: file.write_text("pass\n"),
            r"not this release's: code/sitecustomize\.py",
        ),
        (
            "requirements.txt",
            _append("\nevil-package==1.0"),
            r"requirements\.txt of its model says 'evil-package==1\.0'",
        ),
        (
            "conda.yaml",
            _append("\nprefix: git+https://localhost/x"),
            r"conda\.yaml of its model says 'git\+https://local",
        ),
        (
            "MLmodel",
            lambda file: file.write_text(file.read_text().replace("loaders.code_model", "loaders.chat_agent")),
            "its MLmodel says loader_module otherwise",
        ),
        (
            "MLmodel",
            lambda file: file.write_text(file.read_text().replace("code: code", "code: code/..")),
            "its MLmodel says code otherwise",
        ),
    ],
)
def test_code_of_ones_own_beside_an_honest_network_is_refused(world, path, change, message):
    """Whoever loads the model would run it, and nobody has measured what it answers."""
    run = world.log_trained_run(network(1))
    change(world.model_folder(run) / path)
    with pytest.raises(Refused, match=message):
        register_run(run, world.store, world.settings)
