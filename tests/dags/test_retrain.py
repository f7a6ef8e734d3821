import pytest
from airflow.sdk import AssetAny
from airflow.sdk.exceptions import ParamValidationError

from ml.training.presets import preset_names
from tests.dags.conftest import SET


@pytest.fixture
def dag(conf, read):
    return read("retrain")["retrain_demo"]


def test_both_models_train_on_one_split_and_end_as_candidates(dag):
    downstream = {task.task_id: task.downstream_task_ids for task in dag.tasks}
    assert downstream == {
        "origin": {"register_binary", "register_subtype"},
        "assemble": {"split"},
        "split": {"features"},
        "weights": {"features"},
        "features": {"train_binary", "train_subtype"},
        "train_binary": {"register_binary"},
        "train_subtype": {"register_subtype"},
        "register_binary": {"trigger_promote_binary"},
        "register_subtype": {"trigger_promote_subtype"},
        "trigger_promote_binary": set(),
        "trigger_promote_subtype": set(),
    }


def test_what_computes_takes_a_gpu(dag):
    pools = {task.task_id: task.pool for task in dag.tasks}
    assert {task for task, pool in pools.items() if pool == "gpu"} == {"features", "train_binary", "train_subtype"}
    queues = {task.task_id: task.queue for task in dag.tasks}
    on_gpu = {"weights", "features", "train_binary", "train_subtype"}
    assert {task for task, queue in queues.items() if queue == "gpu"} == on_gpu


def test_features_are_shared_out(conf, read, monkeypatch):
    monkeypatch.setenv("BREAKHIS_SHARDS", "3")
    task = read("retrain")["retrain_demo"].get_task("features")
    shards = [arguments[arguments.index("--shard") + 1] for arguments in task.expand_input.value["arguments"]]
    assert shards == ["1/3", "2/3", "3/3"]


def test_ids_go_from_task_to_task(dag):
    dataset = "{{ ti.xcom_pull(task_ids='assemble')['dataset'] }}"
    split = "{{ ti.xcom_pull(task_ids='split')['split'] }}"
    preset = ["--preset", "{{ params.preset }}"]
    recipe = [*preset, "--weights", "{{ ti.xcom_pull(task_ids='weights')['weights'] }}"]
    assert dag.get_task("assemble").arguments == ["--", "demo"]
    assert dag.get_task("split").arguments == ["--", dataset]
    assert dag.get_task("weights").arguments == preset
    [shard] = dag.get_task("features").expand_input.value["arguments"]
    assert shard == [*recipe, "--split", split, "--shard", "1/1", "--", dataset]
    train = ["--dataset", dataset, "--split", split, *recipe, "--seed", "{{ params.seed }}", "--", "subtype"]
    assert dag.get_task("train_subtype").arguments == train
    run = "{{ ti.xcom_pull(task_ids='train_subtype')['run_id'] }}"
    assert dag.get_task("register_subtype").arguments == ["--", run]


def test_what_trains_cannot_change_the_registry_and_what_registers_can(dag):
    given = {task.task_id: task.connections for task in dag.tasks if getattr(task, "connections", ())}
    assert given == {
        "origin": ("breakhis_airflow", "breakhis_audit"),
        **dict.fromkeys(("register_binary", "register_subtype"), ("breakhis_audit", "breakhis_mlflow_promoter")),
    }


def test_each_candidate_is_handed_over_once(dag):
    task = dag.get_task("trigger_promote_binary")
    assert task.trigger_dag_id == "promote"
    assert task.trigger_run_id == "demo-binary-v{{ ti.xcom_pull(task_ids='register_binary')['version'] }}"
    assert task.conf == {
        "origin": {"dag": "{{ dag.dag_id }}", "run": "{{ run_id }}"},
        **{
            key: f"{{{{ ti.xcom_pull(task_ids='register_binary')['{key}'] }}}}"
            for key in ("model", "version", "evidence")
        },
    }
    assert task.trained_by == "train_binary"
    assert task.skip_when_already_exists is True
    assert task.wait_for_completion is False
    assert task.logical_date is None


def test_it_runs_monthly_once_unpaused_and_not_for_months_gone_by(dag):
    assert dag.timetable.timetable.expression == "0 0 1 * *"
    assert (dag.catchup, dag.start_date, dag.is_paused_upon_creation) == (False, None, True)
    assert dag.max_active_runs == 1


def test_a_new_version_of_any_of_its_sources_starts_it(conf, read, tmp_path):
    (tmp_path / "more.yaml").write_text("name: more\nkind: demo\n")
    file = conf / "training_sets" / "demo.yaml"
    file.write_text(file.read_text().replace("[demo]", f"[demo, {tmp_path / 'more.yaml'}]"))
    assets = read("retrain")["retrain_demo"].timetable.asset_condition
    assert [asset.uri for asset in assets.objects] == ["x-breakhis://sources/demo", "x-breakhis://sources/more"]
    assert isinstance(assets, AssetAny)
    assert read("ingest")["ingest_demo"].get_task("publish").outlet_asset in assets.objects


def test_without_a_schedule_news_alone_start_it(conf, read):
    file = conf / "training_sets" / "demo.yaml"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("schedule")))
    timetable = read("retrain")["retrain_demo"].timetable
    assert [asset.name for asset in timetable.asset_condition.objects] == ["breakhis_source_demo"]


def test_the_form_starts_from_the_yaml(dag):
    assert dict(dag.params) == {"preset": "demo", "seed": 7}
    assert dag.params.get_param("preset").schema["enum"] == preset_names()


@pytest.mark.parametrize("wrong", [{"preset": "best"}, {"seed": -1}, {"seed": "seven"}])
def test_the_form_refuses_what_no_training_takes(dag, wrong):
    with pytest.raises(ParamValidationError):
        dag.params.update(wrong)


def test_further_sets_come_from_the_settings(conf, read, tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text(SET.format(name="mine").replace('"@monthly"', "null"))
    monkeypatch.setenv("BREAKHIS_TRAINING_SETS", str(file))
    dags = read("retrain")
    assert set(dags) == {"retrain_demo", "retrain_mine"}
    assert dags["retrain_mine"].get_task("assemble").arguments == ["--", str(file)]
    assert dags["retrain_mine"].get_task("trigger_promote_binary").trigger_run_id.startswith("mine-binary-v")


def test_a_set_that_cannot_be_used_disturbs_no_other(conf, read):
    (conf / "training_sets" / "bad.yaml").write_text("name: bad\nsourcs: [demo]\n")
    dags = read("retrain")
    assert dags["retrain_bad"].tags == {"invalid"}
    assert "unknown key 'sourcs'" in dags["retrain_bad"].doc_md
    assert len(dags["retrain_bad"].tasks) == 1
    assert len(dags["retrain_demo"].tasks) == 11


def test_a_set_that_cannot_be_used_takes_no_dag_from_a_good_one_of_its_name(conf, read, tmp_path, monkeypatch):
    good = tmp_path / "mine.yaml"
    good.write_text(SET.format(name="mine"))
    monkeypatch.setenv("BREAKHIS_TRAINING_SETS", str(good))
    (conf / "training_sets" / "mine.yaml").write_text("name: mine\nsourcs: [demo]\n")
    dags = read("retrain")
    assert dags["retrain_mine"].get_task("assemble").arguments == ["--", str(good)]
    assert dags["retrain_mine_2"].tags == {"invalid"}
    assert str(conf / "training_sets" / "mine.yaml") in dags["retrain_mine_2"].doc_md
