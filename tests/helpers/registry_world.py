"""A test registry: made-up training runs in a real MLflow, with the store and the files that decisions need."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import mlflow
import numpy as np
from mlflow.tracking import MlflowClient

from ml.core.hashes import digest
from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.splits import look_up_sides, read_split, split_dataset
from ml.data.training_sets import read_dataset
from ml.evaluation.decision_rule import DecisionRule
from ml.evaluation.evaluation import evaluate
from ml.evaluation.predictions import save_predictions
from ml.evaluation.scores import ClassNumbers, LabelledPredictions, Probabilities
from ml.images.decoding import decode, resize
from ml.images.pixel_formats import pixel_hash
from ml.promotion import evidence
from ml.promotion.alias_history import STARTED
from ml.promotion.audit_log import AuditLog
from ml.promotion.registration import register_run
from ml.registry.packaging import log_classifier
from tests.helpers import made_up

if TYPE_CHECKING:
    import keras

NOT_RESCORED: Json = {"images": 0, "tolerance": 0.0}
"""Stands in for the result of scoring the test side again, where a made-up model scores nothing."""

RULE = DecisionRule(threshold=0.5)
POLICY = "name: lenient\nbinary: {roc_auc: 0.8, macro_f1: 0.5}\n"


TRAINED_BY = ("retrain_made", "r1")
"""DAG and run that train in this world. The user ``engineer`` started it, as the audit log says."""


class Echo(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """A model that returns its input; it is small and quickly logged."""

    def predict(self, context: Any, model_input: list[str], params: Any = None) -> list[str]:
        return model_input


@dataclass
class RegistryWorld:
    """A store, an MLflow, and training sets that each have the policy ``lenient``."""

    store: Store
    settings: Settings
    client: MlflowClient
    policy: Path
    conf: Path
    data: dict[str, tuple[str, str]]
    """Dataset and split of each training set."""

    @classmethod
    def create(
        cls,
        folder: Path,
        mlflow_uri: str,
        sets: tuple[str, ...] = ("made",),
        *,
        pictures: bool = False,
        with_starter: bool = True,
        **settings: Any,
    ) -> "RegistryWorld":
        """Creates a world in a folder that is empty or has only MLflow's database.

        With ``pictures`` the store has the pictures of the first training set, which a network can score. Without a
        starter the audit log is empty, for what gives it another key first.
        """
        conf = folder / "conf"
        for name in ("sources", "training_sets", "policies"):
            (conf / name).mkdir(parents=True)
        for name in sets:
            (conf / "training_sets" / f"{name}.yaml").write_text(
                f"name: {name}\nsources: [made]\nledger: made\npolicy: lenient\npreset: demo\n"
            )
        policy = conf / "policies" / "lenient.yaml"
        policy.write_text(POLICY)
        store = Store((folder / "store").as_uri())
        defaults: dict[str, Any] = {"airflow_url": "http://localhost:1", "airflow_user": "service"}
        defaults |= {"airflow_password": "stand-in", "audit_key": "k" * 32}
        values = {"home": folder / "home", "store": store.root, "conf": conf, "mlflow_uri": mlflow_uri}
        configuration = Settings(**values, **(defaults | settings))
        data = {}
        for name in sets:
            rows = made_up.manifest_rows(made_up.every_class(images=5))
            if pictures and name == sets[0]:
                files = [made_up.png(seed) for seed in range(len(rows))]
                rows["sha256"] = [store.put_blob(file) for file in files]
                rows["pixel_sha256"] = [pixel_hash(decode(file)) for file in files]
            if name != sets[0]:  # each set has its own images
                rows["pixel_sha256"] = [digest([name, sha256]) for sha256 in rows["pixel_sha256"]]
            dataset = made_up.create_dataset(store, rows, set_name=name)
            data[name] = (dataset, split_dataset(dataset, store)["split"])
        client = connect(configuration)
        for name in sets:
            client.create_experiment(name, artifact_location=(folder / "artifacts" / name).as_uri())
        world = cls(store, configuration, client, policy, conf, data)
        if with_starter:
            world.record_starter()
        return world

    def record_starter(self, user: str = "engineer", run: tuple[str, str] = TRAINED_BY, unknown: str = "") -> None:
        """Writes down who started a run, as the stage ``origin`` does in it."""
        name = "/".join(run)
        for training_set in self.data:
            log = AuditLog(self.store, self.settings)
            log.append(STARTED, f"{training_set}-binary", run=name, users={user: name}, unknown=unknown)

    def log_run(
        self, auc: float = 0.9, training_set: str = "made", *, scored_on: tuple[str, str] | None = None, **tags: str
    ) -> str:
        """Logs a finished training run of a binary model and returns its id.

        ``scored_on`` are the dataset and the split of its predictions; default: those of the training set.
        """
        dataset, split = self._data(training_set, tags)
        scores = self.scores(auc, *(scored_on or (dataset, split)))
        return self._log(
            training_set,
            scores,
            lambda _: mlflow.pyfunc.log_model(name="model", python_model=Echo(), pip_requirements=[]),
            tags,
        )

    def log_trained_run(
        self,
        network: "keras.Model",
        claim: Callable[[Probabilities, ClassNumbers], Probabilities] = lambda outputs, truth: outputs,
        rule: DecisionRule = RULE,
        **tags: str,
    ) -> str:
        """Logs a finished run with a network, as a training does; needs pictures. Returns its id.

        Its predictions are what ``claim`` makes of the network's outputs for the test side and the true classes, and
        its metrics follow from them. ``rule`` is the decision rule that the model is logged with; that of its metrics
        is ``RULE``.
        """
        dataset, split = self._data("made", tags)
        known = self.scores(0.9, dataset, split)
        files = [self.store.blob(sha256) for sha256 in known.rows["sha256"]]
        pixels = np.stack([resize(decode(file)) for file in files]).astype(np.float32)
        outputs = np.asarray(network(pixels, training=False), dtype=np.float64)[:, 0]
        scores = LabelledPredictions("binary", known.rows, known.truth, claim(outputs, known.truth), RULE)
        facts = {"preset": "demo"}
        return self._log(
            "made", scores, lambda run: log_classifier(network, "binary", rule, run, files[0], facts), tags
        )

    def register(self, run: str) -> Json:
        """Registers a run whose model is no network: its test side is not scored again."""
        with patch.object(evidence, "rescore_predictions", return_value=NOT_RESCORED):
            return register_run(run, self.store, self.settings)

    def model_folder(self, run: str) -> Path:
        """Returns the folder of the model that a run logged."""
        (model,) = self.client.search_logged_models(
            [self.client.get_run(run).info.experiment_id], filter_string=f"source_run_id = '{run}'"
        )
        return Path(model.artifact_location.removeprefix("file://"))

    def _data(self, training_set: str, tags: dict[str, str]) -> tuple[str, str]:
        dataset, split = self.data[training_set]
        return tags.get("breakhis.dataset", dataset), tags.get("breakhis.split", split)

    def _log(
        self, training_set: str, scores: LabelledPredictions, log_model: Callable[[str], Any], tags: dict[str, str]
    ) -> str:
        dataset, split = self._data(training_set, tags)
        evaluation = evaluate(scores, draws=0)
        weights = {"kind": "imagenet", "sha256": "0"}
        connect(self.settings)
        experiment = self.client.get_experiment_by_name(training_set)
        assert experiment
        with mlflow.start_run(experiment_id=experiment.experiment_id) as active:
            mlflow.set_tags(
                {
                    "breakhis.set": training_set,
                    "breakhis.task": "binary",
                    "breakhis.dataset": dataset,
                    "breakhis.split": split,
                    "breakhis.ledger": self.store.meta(split)["ledger"],
                    "breakhis.preset": "demo",
                    "breakhis.seed": "0",
                    "breakhis.weights": self.store.create("weights", list(weights.values()), weights),
                    "breakhis.weights_kind": "imagenet",
                    "breakhis.dag_runs": json.dumps([TRAINED_BY]),
                }
                | tags
            )
            mlflow.log_dict(evaluation.to_json(), "evaluation/metrics.json")
            mlflow.log_dict({"name": "demo"}, "preset.json")
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch) / "test_predictions.parquet"
                save_predictions(file, scores)
                mlflow.log_artifact(str(file), "evaluation")
            for name in ("report.html", "model_card.md"):
                mlflow.log_text("made up", f"evaluation/{name}")
            mlflow.log_metrics({f"test_{name}": value for name, value in evaluation.metrics.items()})
            log_model(active.info.run_id)
        return str(active.info.run_id)

    def scores(self, auc: float, dataset: str, split: str) -> LabelledPredictions:
        """Returns predictions on the test side whose area under the ROC curve is ``auc``."""
        rows = read_dataset(dataset, self.store)
        rows = rows[look_up_sides(rows, read_split(split, self.store)) == "test"].reset_index(drop=True)
        truth = (rows["label"] == "malignant").to_numpy(dtype=np.int64)
        malignant, benign = int(truth.sum()), int((1 - truth).sum())
        concordant = round(auc * malignant * benign)  # pairs whose malignant image has the higher probability
        exceeded = np.full(malignant, concordant // malignant)  # benign images with a lower probability
        exceeded[: concordant % malignant] += 1
        probabilities = np.empty(len(rows))
        probabilities[truth == 0] = (np.arange(benign) + 1) / (benign + 1)
        probabilities[truth == 1] = (exceeded + 0.5) / (benign + 1)
        return LabelledPredictions("binary", rows, truth, probabilities, RULE)
