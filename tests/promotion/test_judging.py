"""A version is judged by its policy, against a real MLflow registry on SQLite."""

import json
import tempfile
from types import SimpleNamespace

import mlflow
import pytest

from ml.core.errors import Refused, RegistryError
from ml.core.hashes import digest
from ml.data.splits import split_dataset
from ml.promotion import champion_comparison, evidence, judging
from ml.promotion.evidence import read_verified_object
from ml.promotion.judging import judge_version
from ml.promotion.registration import register_run
from ml.registry.registered_model import declared_models
from tests.helpers import made_up
from tests.helpers.decisions import model_folder, open_log, promote
from tests.helpers.registry_world import NOT_RESCORED, RegistryWorld
from tests.trust.servers import mlflow_server


def test_evidence_and_bundle_say_what_they_are_made_of(world, airflow):
    registered = register_run(world.log_run(), world.store, world.settings)
    evidence = world.store.meta(registered["evidence"])
    assert {"preset_sha256", "code_sha256", "lock_sha256", "dag_runs"} <= evidence.keys()
    verdict = judge_version("made-binary", "1", world.store, world.settings)
    bundle = read_verified_object(verdict["bundle"], world.store)
    assert bundle["policy_content"]["binary"]["roc_auc"]["at_least"] == 0.8
    assert verdict["bundle_sha256"] == digest(bundle)
    assert verdict["bundle_sha256"] in verdict["review"]
    airflow.answer_promotion(registered)
    promote(world, registered)
    approved = [r for r in open_log(world).read_model_records("made-binary") if r["event"] == "approved"]
    assert [record["bundle_sha256"] for record in approved] == [digest(bundle)]


def test_gate_passes_and_records_its_verdict(world):
    registered = register_run(world.log_run(), world.store, world.settings)
    verdict = judge_version("made-binary", "1", world.store, world.settings)
    assert verdict["passed"]
    assert verdict["evidence"] == registered["evidence"]
    bundle = world.store.meta(verdict["bundle"])
    assert bundle["passed"]
    assert bundle["evidence"] == read_verified_object(registered["evidence"], world.store)
    assert verdict["bundle"] in verdict["review"]
    tags = world.client.get_model_version("made-binary", "1").tags
    assert tags["breakhis.bundle"] == verdict["bundle"]
    description = world.client.get_model_version("made-binary", "1").description  # the model card, of the evidence
    assert "## made-binary" in description
    assert "| ROC AUC | 0.900 |" in description
    assert "made up" not in description  # the run's own text
    tags = world.client.get_model_version("made-binary", "1").tags
    assert tags["breakhis.gates"] == "passed"
    assert json.dumps(verdict)


def test_a_model_of_a_split_by_slide_is_a_protocol_run(world):
    frame = made_up.manifest_rows(made_up.every_class())
    by_slide = made_up.create_dataset(world.store, frame, ledger="slides", method="sgkf", group="slide")
    split = split_dataset(by_slide, world.store)["split"]
    registered = register_run(world.log_run(**{"breakhis.split": split}), world.store, world.settings)
    evidence = world.store.meta(registered["evidence"])
    assert (evidence["split_method"], evidence["split_group"]) == ("sgkf", "slide")
    verdict = judge_version("made-binary", "1", world.store, world.settings)
    assert not verdict["passed"]
    assert "only a split by case can lead to promotion" in verdict["summary"]


def test_evidence_of_a_split_of_old_comes_out_as_it_was_recorded(world):
    """A split from before there was a choice of method and group tells none, and was by case."""
    sides = {side: {"images": 3, "cases": 1} for side in ("train", "validation", "test")}
    known = world.store.meta(world.data["made"][1])["sides"]
    old = world.store.create("split", ["old"], {"ledger": "made", "method": "allocator", "sides": known, **sides})
    registered = register_run(world.log_run(**{"breakhis.split": old}), world.store, world.settings)
    assert not {"split_method", "split_group"} & world.store.meta(registered["evidence"]).keys()
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]


def test_gate_blocks_below_the_floor_without_a_policy_and_with_an_empty_one(world):
    register_run(world.log_run(auc=0.7), world.store, world.settings)
    assert "0.1000 short of 0.8" in judge_version("made-binary", "1", world.store, world.settings)["summary"]
    world.policy.write_text("")
    assert not judge_version("made-binary", "1", world.store, world.settings)["passed"]
    world.policy.unlink()
    assert "no usable policy" in judge_version("made-binary", "1", world.store, world.settings)["summary"]


def test_gate_blocks_under_a_broken_training_set_whoever_else_has_its_name(world, tmp_path):
    register_run(world.log_run(0.85), world.store, world.settings)
    declared = world.conf / "training_sets" / "made.yaml"
    lenient = tmp_path / "elsewhere" / "made.yaml"
    lenient.parent.mkdir()
    lenient.write_text(declared.read_text())
    declared.write_text(declared.read_text() + "polcy: x\n")
    settings = world.settings.model_copy(update={"training_sets": (lenient,)})
    verdict = judge_version("made-binary", "1", world.store, settings)
    assert not verdict["passed"]
    assert "unknown key 'polcy'" in verdict["summary"]
    assert "made-binary" in declared_models(settings)


def test_another_policy_is_only_shown(world):
    register_run(world.log_run(auc=0.7), world.store, world.settings)
    other = world.conf / "other.yaml"
    other.write_text("name: other\nbinary: {roc_auc: 0.1, macro_f1: 0.1}\n")
    verdict = judge_version("made-binary", "1", world.store, world.settings, policy=str(other))
    assert verdict["passed"]
    assert not world.store.exists(verdict["bundle"])
    assert "breakhis.gates" not in world.client.get_model_version("made-binary", "1").tags


def test_unknown_versions(world):
    with pytest.raises(RegistryError, match="no version 7 of a registered model 'made-binary'"):
        judge_version("made-binary", "7", world.store, world.settings)


def test_changed_model_files_and_metrics_are_noticed(world):
    run = world.log_run()
    register_run(run, world.store, world.settings)
    version = world.client.get_model_version("made-binary", "1")
    folder = mlflow.artifacts.download_artifacts(artifact_uri=f"models:/made-binary/{version.version}")
    victim = next(p for p in __import__("pathlib").Path(folder).rglob("*.pkl"))
    good = victim.read_bytes()
    victim.write_bytes(good + b"\0")
    with pytest.raises(Refused, match=r"changed after evidence-[0-9a-f]{12} was recorded: model_files"):
        judge_version("made-binary", "1", world.store, world.settings)
    victim.write_bytes(good)
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]
    world.client.log_metric(run, "test_roc_auc", 0.99)
    with pytest.raises(Refused, match="one of them was changed"):
        judge_version("made-binary", "1", world.store, world.settings)


def test_compiled_code_and_notes_hidden_among_model_files(world):
    register_run(world.log_run(), world.store, world.settings)
    folder = model_folder(1)
    (folder / "registered_model_meta").write_text("MLflow's own")
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]
    (folder / "code").mkdir()
    (folder / "code" / "registered_model_meta").write_text("hidden")
    with pytest.raises(Refused, match="model_files"):
        judge_version("made-binary", "1", world.store, world.settings)
    (folder / "code" / "registered_model_meta").unlink()
    cache = folder / "code" / "__pycache__"
    cache.mkdir()
    (cache / "serving.cpython-311.pyc").write_bytes(b"")  # as Python leaves it with whoever loads the model in place
    assert judge_version("made-binary", "1", world.store, world.settings)["passed"]
    assert not cache.exists()
    (folder / "code" / "serving.cpython-311.pyc").write_bytes(b"")
    with pytest.raises(Refused, match=r"compiled code lies among its files.*serving.cpython-311.pyc"):
        judge_version("made-binary", "1", world.store, world.settings)


@pytest.mark.integration
def test_nothing_of_what_a_server_hands_out_is_left_behind(tmp_path, monkeypatch):
    """Neither of runs nor of models: the audit reads those of all champions every day."""
    monkeypatch.setattr(evidence, "rescore_predictions", lambda *_: NOT_RESCORED)  # the world's model has no network
    for folder in ("mlflow", "world", "scratch"):
        (tmp_path / folder).mkdir()
    artifacts = ("--serve-artifacts", "--artifacts-destination", (tmp_path / "artifacts").as_uri())
    with mlflow_server(tmp_path / "mlflow", *artifacts, "--default-artifact-root", "mlflow-artifacts:/") as url:
        world = RegistryWorld.create(tmp_path / "world", url)
        run = world.log_run()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
        registered = register_run(run, world.store, world.settings)
        judge_version("made-binary", "1", world.store, world.settings)
        recorded = read_verified_object(registered["evidence"], world.store)
        assert len(champion_comparison._read_predictions(recorded, "test")) > 0
        assert list((tmp_path / "scratch").iterdir()) == []


def test_a_reviewer_s_links_name_the_experiment_of_the_run(monkeypatch):
    run = SimpleNamespace(info=SimpleNamespace(experiment_id="7"))
    monkeypatch.setattr(judging, "connect", lambda _: SimpleNamespace(get_run=lambda _: run))
    evidence = {"run_id": "abc", "model": "demo-binary", "version": 3, "validations": {}}
    links = judging._list_links(evidence, SimpleNamespace(mlflow_ui="http://mlflow/"))
    side = "?workflowType=machine_learning"
    assert list(links.values()) == [
        f"http://mlflow/#/experiments/7/runs/abc{side}",
        f"http://mlflow/#/models/demo-binary/versions/3{side}",
    ]
