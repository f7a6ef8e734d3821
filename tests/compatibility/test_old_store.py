"""A store and an MLflow that an earlier release has written go on working.

``old_store.tar.xz`` holds what commit f535279 wrote (write_store.py made it): a source of 32 pictures, a dataset, a
split, caches, a finished training of each task, both registered and judged, and a champion that a reviewer approved.
Its models carry the package under the module paths that it had then.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.compatibility.old_store import expected, unpack

pytestmark = pytest.mark.integration

MODELS = ("models:/old-binary@champion", "models:/old-subtype/1")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("old") / "home"


@pytest.fixture(scope="module")
def environment(home):
    return unpack(Path(__file__).with_name("old_store.tar.xz"), home)


@pytest.fixture(scope="module")
def before(environment, home):
    """What the earlier release said of it."""
    return expected(home)


@pytest.fixture
def breakhis(environment, command, monkeypatch):
    """Runs ``breakhis … --json`` on the store; returns what it said."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(*arguments):
        code, out, err = command(*arguments, "--json")
        assert code == 0, err
        said = json.loads(out.splitlines()[-1])
        said.pop("seconds", None)
        return said

    return run


def assert_same(rows, known, home):
    """The rows of a prediction are those of before: texts and columns equal, numbers within 1e-5."""
    assert len(rows) == len(known)
    for pair in zip(rows, known, strict=True):
        now, then = ({name: value for name, value in row.items() if name != "image"} for row in pair)
        assert now.keys() == then.keys()
        for name, value in then.items():
            assert now[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value)


def test_the_audit_log_holds_and_names_the_champion(breakhis, before):
    assert breakhis("audit", "verify") == before["audit_verify"]
    assert breakhis("history", "old-binary") == before["history"]
    assert before["aliases"]["old-binary"] == {"champion": 1}


def test_models_logged_before_predict_as_they_did(breakhis, before, home):
    """Both in one process of ours, which has imported its own package long ago."""
    for model in MODELS:
        known = before["predictions"][model]
        said = breakhis("predict", *(home / row["image"] for row in known), "--model", model)
        assert_same(said["predictions"], known, home)


def test_another_package_of_the_name_does_not_get_in_the_way(breakhis, before, home, tmp_path, monkeypatch):
    """As a later release that prepares pictures in another way: the model brings its own code along."""
    package = tmp_path / "ml"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the code of another release was run')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    known = before["predictions"][MODELS[0]]
    said = breakhis("predict", *(home / row["image"] for row in known), "--model", MODELS[0])
    assert_same(said["predictions"], known, home)


def test_the_gates_score_a_champion_logged_before(environment, before, home, monkeypatch):
    """The way by which a champion classifies test images that came after it."""
    from ml.registry.version_scoring import classify_pictures

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment["BREAKHIS_MLFLOW_URI"])
    import mlflow

    mlflow.set_tracking_uri(environment["BREAKHIS_MLFLOW_URI"])
    mlflow.set_registry_uri(environment["BREAKHIS_MLFLOW_URI"])
    known = before["predictions"][MODELS[0]]
    frame = classify_pictures("old-binary", 1, ((home / row["image"]).read_bytes() for row in known))
    assert_same(frame.to_dict("records"), known, home)


def test_plain_mlflow_loads_them(environment, before, home, tmp_path):
    """In a process that has imported nothing of this package."""
    program = textwrap.dedent(
        """
        import json, sys
        import mlflow

        models, files, address = json.loads(sys.argv[1])
        mlflow.set_tracking_uri(address)
        found = {}
        for model in models:
            assert "ml" not in sys.modules or model != models[0]
            found[model] = mlflow.pyfunc.load_model(model).predict(files).to_dict("records")
        print(json.dumps(found))
        """
    )
    files = [str(home / row["image"]) for row in before["predictions"][MODELS[0]]]
    asked = json.dumps([MODELS, files, environment["BREAKHIS_MLFLOW_URI"]])
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, asked],
        cwd=tmp_path,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for model in MODELS:
        assert_same(found[model], before["predictions"][model], home)


def test_nothing_is_done_again(breakhis, before):
    """The same inputs give the same ids; features and trainings are found."""
    made = breakhis("assemble", "old")
    assert made["dataset"] == before["assemble"]["dataset"]
    split = breakhis("split", made["dataset"])
    assert (split["split"], split["ledger_hash"]) == (before["split"]["split"], before["split"]["ledger_hash"])
    weights = before["weights"]["weights"]
    features = breakhis("features", made["dataset"], "--preset", "demo", "--weights", weights)
    assert (features["extracted"], features["cached"], features["decoded"]) == (0, 32, 0)
    for task in ("binary", "subtype"):
        known = before[f"train_{task}"]
        inputs = ("--dataset", made["dataset"], "--split", split["split"], "--preset", "demo", "--weights", weights)
        again = breakhis("train", task, *inputs)
        assert (again["reused"], again["run_id"]) == (True, known["run_id"])
        assert again["metrics"] == pytest.approx(known["metrics"])


def test_versions_are_what_their_evidence_says_and_pass_their_gates(breakhis, before, command, environment):
    """The policy of then asks for 0 at least, which gates nothing and is refused; a person writes a little more."""
    policy = Path(environment["BREAKHIS_CONF"]) / "policies" / "lenient.yaml"
    text = policy.read_text()
    changed_with_the_policy = ("bundle", "bundle_sha256", "policy_hash", "review", "gates")
    for task in ("binary", "subtype"):
        registered = breakhis("register", before[f"train_{task}"]["run_id"])
        assert registered == before[f"register_{task}"]
        policy.write_text(text)
        code, _, err = command("gate", f"old-{task}", "1")
        assert code == 4
        assert "a model that has learnt nothing keeps at_least: 0" in err
        policy.write_text(re.sub(r"\b0\b", "0.001", text))
        now, then = breakhis("gate", f"old-{task}", "1"), before[f"gate_{task}"]
        for said in (now, then):
            for gate in said["gates"]:
                gate |= {key: None for key in ("limit", "distance") if gate["limit"] is not None}
        assert now["gates"] == then["gates"]
        assert {**now, **dict.fromkeys(changed_with_the_policy)} == {**then, **dict.fromkeys(changed_with_the_policy)}


def test_a_home_that_was_moved_is_told_by_every_command_and_put_right_by_one(before, tmp_path, command, monkeypatch):
    old, new = tmp_path / "home", tmp_path / "larger-disk"
    environment = unpack(Path(__file__).with_name("old_store.tar.xz"), old)
    old.rename(new)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace(str(old), str(new)))
    picture = str(next(new.rglob("*.png"), Path(__file__)))
    commands = (("predict", picture, "--model", MODELS[0]), ("gate", "old-binary", "1"), ("audit", "verify"))
    for arguments in commands:
        code, _, err = command(*arguments)
        assert code == 3, (arguments, err)
        assert "breakhis relocate" in err, (arguments, err)
    assert command("relocate")[0] == 0
    code, out, err = command("audit", "verify", "--json")
    assert code == 0, err
    said = json.loads(out.splitlines()[-1])
    assert {name: said[name] for name in before["audit_verify"]} == before["audit_verify"]
