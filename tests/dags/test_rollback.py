import pytest
from airflow.sdk.exceptions import ParamValidationError

CONF = {"model": "demo-binary", "version": "3", "reason": "it fails on 400X"}


@pytest.fixture
def rollback(conf, read):
    return read("rollback")["rollback"]


@pytest.fixture
def withdraw(conf, read):
    return read("withdraw")["withdraw"]


def test_proposed_then_confirmed_then_carried_out(rollback):
    downstream = {task.task_id: task.downstream_task_ids for task in rollback.tasks}
    assert downstream == {"propose": {"review"}, "review": {"rollback"}, "rollback": set()}
    which = ["--", "{{ params.model }}", "{{ params.version }}"]
    although = ["--although-withdrawn", "{{ params.although_withdrawn }}"]
    assert rollback.get_task("propose").arguments == ["--dry-run", "--reason", "{{ params.reason }}", *although, *which]
    assert rollback.get_task("rollback").arguments == ["--dag-run", "{{ run_id }}", *which]
    assert rollback.get_task("review").body == "{{ ti.xcom_pull(task_ids='propose')['review'] }}"


def test_what_changes_the_registry_does_so_one_at_a_time(rollback, withdraw):
    for task in (rollback.get_task("rollback"), withdraw.get_task("withdraw")):
        assert task.pool == "promotion"
        assert task.connections == ("breakhis_airflow", "breakhis_audit", "breakhis_mlflow_promoter")
    assert rollback.get_task("propose").connections == ("breakhis_audit", "breakhis_mlflow_promoter")


@pytest.mark.parametrize("wrong", [{"model": ""}, {"model": "--help"}, {"version": "previous"}, {"reason": "no"}])
def test_the_form_asks_for_everything(rollback, withdraw, wrong):
    for dag in (rollback, withdraw):
        dag.params.update(CONF)
        dag.params.validate()
        with pytest.raises(ParamValidationError):
            dag.params.update({**CONF, **wrong})


def test_a_withdrawn_version_has_to_be_asked_for_expressly(rollback):
    rollback.params.update(CONF)
    assert rollback.params["although_withdrawn"] is False
    with pytest.raises(ParamValidationError):
        rollback.params.update({**CONF, "although_withdrawn": "perhaps"})


def test_the_audit_is_checked_every_day(conf, read):
    dag = read("audit")["audit"]
    assert dag.schedule == "@daily"
    (task,) = dag.tasks
    assert (task.stage, task.arguments) == ("audit", ["verify"])
    assert task.connections == ("breakhis_audit", "breakhis_mlflow_promoter")
