"""All DAG files together, with the YAML that is shipped."""

import json
import os
import subprocess
import sys

from airflow.dag_processing.dagbag import DagBag
from airflow.serialization.serialized_objects import DagSerialization

from breakhis_airflow.run_conf import KEYS_OF_EVERY_DAG, refuse_unknown_conf
from tests.dags.conftest import DAGS

HEAVY = {
    "PIL",
    "numpy",
    "tensorflow",
    "keras",
    "mlflow",
    "great_expectations",
    "kaggle",
    "openvino",
    "sklearn",
    "matplotlib",
    "pandas",
}


def test_every_file_is_read_and_every_dag_documented(monkeypatch):
    monkeypatch.delenv("BREAKHIS_CONF", raising=False)
    bag = DagBag(str(DAGS))
    assert bag.import_errors == {}
    assert {"ingest_breakhis", "ingest_demo", "retrain_breakhis", "retrain_demo", "promote"} <= set(bag.dags)
    for dag in bag.dags.values():
        assert "invalid" not in dag.tags, dag.doc_md
        assert len(dag.doc_md) > 300
        assert dag.description
        assert DagSerialization.from_dict(DagSerialization.to_dict(dag)).task_ids == dag.task_ids


def test_no_task_of_any_dag_runs_with_a_conf_that_nothing_reads(conf):
    (conf / "notifications.yaml").write_text(
        "on_failure:\n- notifier: airflow.providers.smtp.notifications.smtp.SmtpNotifier\n  arguments: {to: a@b.org}\n"
    )
    dags = DagBag(str(DAGS)).dags
    handed_over = set()
    for dag in dags.values():
        for task in dag.tasks:
            mapped = getattr(task, "partial_kwargs", {}).get("pre_execute")
            assert (getattr(task, "_pre_execute_hook", None) or mapped) is refuse_unknown_conf, (
                dag.dag_id,
                task.task_id,
            )
            if hasattr(task, "trigger_dag_id"):
                assert set(task.conf) <= {*dags[task.trigger_dag_id].params, *KEYS_OF_EVERY_DAG}
                handed_over |= set(task.conf)
    assert handed_over == {"model", "version", "evidence", "origin"}


def test_reading_them_imports_nothing_heavy():
    script = (
        "import json, sys; import airflow.dag_processing.dagbag as b; before = set(sys.modules)\n"
        f"bag = b.DagBag({str(DAGS)!r}); assert bag.dags and not bag.import_errors\n"
        "print('RESULT', json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert not HEAVY & set(json.loads(line.removeprefix("RESULT")))
