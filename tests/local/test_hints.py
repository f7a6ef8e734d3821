from typing import Any

import pytest

from ml.core.errors import AirflowError
from ml.local.hints import find_hints

Json = dict[str, Any]


class Airflow:
    """An Airflow with a retraining, of whose last tasks ``said`` has the XComs."""

    def __init__(self, *, paused: bool = False, queued: int = 0, said: Json | None = None, ran: bool = True) -> None:
        self.paused, self.queued, self.said, self.ran = paused, queued, said or {}, ran

    def dags(self) -> list[Json]:
        return [{"dag_id": "promote", "is_paused": self.paused}, {"dag_id": "retrain_demo"}, {"dag_id": "ingest_demo"}]

    def list_queued_runs(self, dag: str) -> list[Json]:
        assert dag == "promote"
        return [{"dag_run_id": f"demo-binary-v{number + 1}"} for number in range(self.queued)]

    def find_latest_run(self, dag: str) -> Json | None:
        assert dag == "retrain_demo"
        return {"dag_run_id": "r"} if self.ran else None

    def task_instances(self, dag: str, run: str) -> list[Json]:
        return [{"task_id": name} for name in ("train_binary", "trigger_promote_binary", "trigger_promote_subtype")]

    def xcom(self, dag: str, run: str, task: str) -> Json:
        if task not in self.said:
            raise AirflowError("no such XCom", 404)
        found: Json = self.said[task]
        return found


@pytest.mark.parametrize(("paused", "queued", "hints"), [(True, 2, 1), (True, 0, 0), (False, 2, 0)])
def test_candidates_that_wait_for_a_paused_dag_are_named(paused: bool, queued: int, hints: int) -> None:
    found = find_hints(Airflow(paused=paused, queued=queued))  # type: ignore[arg-type]
    assert len(found) == hints
    if hints:
        assert "2 of its runs wait for that (demo-binary-v1, demo-binary-v2): unpause it" in found[0]


def test_a_retraining_that_found_nothing_new_is_named_with_what_it_compared() -> None:
    said = {"trigger_promote_subtype": {"nothing_new": "nothing new: dataset d-1"}, "train_binary": {"run_id": "x"}}
    assert find_hints(Airflow(said=said)) == ["retrain_demo, run r: nothing new: dataset d-1"]  # type: ignore[arg-type]
    assert find_hints(Airflow(said=said, ran=False)) == []  # type: ignore[arg-type]


def test_another_fault_of_airflow_is_not_hidden() -> None:
    airflow = Airflow()
    airflow.xcom = lambda *_: (_ for _ in ()).throw(AirflowError("no", 500))  # type: ignore[method-assign]
    with pytest.raises(AirflowError):
        find_hints(airflow)  # type: ignore[arg-type]
