import json
import os
from pathlib import Path

import pytest
from airflow.sdk.exceptions import AirflowFailException
from airflow.serialization.serialized_objects import DagSerialization

from tests.dags.conftest import SET, SOURCE


def test_one_dag_a_source_from_fetch_to_publish(conf, read):
    (conf / "sources" / "other.yaml").write_text(SOURCE.format(name="other"))
    dags = read("ingest")
    assert set(dags) == {"ingest_demo", "ingest_other"}
    dag = dags["ingest_demo"]
    assert [task.task_id for task in dag.topological_sort()] == ["fetch", "manifest", "validate", "publish"]
    assert dag.get_task("fetch").downstream_task_ids == {"manifest"}
    assert dag.get_task("validate").downstream_task_ids == {"publish"}
    assert type(dag.timetable).__name__ == "NullTimetable"
    assert dag.max_active_runs == 1
    assert dag.is_paused_upon_creation is False
    assert {task.retries for task in dag.tasks} == {2}


def test_ids_go_from_task_to_task(conf, read):
    dag = read("ingest")["ingest_demo"]
    assert dag.get_task("fetch").arguments == ["--", "demo"]
    version = "{{ ti.xcom_pull(task_ids='fetch')['version'] }}"
    manifest = "{{ ti.xcom_pull(task_ids='manifest')['manifest'] }}"
    assert dag.get_task("manifest").arguments == ["--raw", version, "--", "demo"]
    assert dag.get_task("validate").arguments == ["--", manifest]
    assert dag.get_task("publish").arguments == ["--", manifest]


def test_publishing_tells_airflow_of_a_new_version(conf, read):
    asset = read("ingest")["ingest_demo"].get_task("publish").outlet_asset
    assert (asset.name, asset.uri) == ("breakhis_source_demo", "x-breakhis://sources/demo")


def test_a_schedule_begins_with_its_next_time(conf, read):
    (conf / "sources" / "demo.yaml").write_text(SOURCE.format(name="demo") + "schedule: '@daily'\n")
    dag = read("ingest")["ingest_demo"]
    assert dag.timetable.expression == "0 0 * * *"
    assert dag.start_date is None  # with one, whoever unpauses the DAG would find it running for yesterday
    assert dag.catchup is False


def test_the_documentation_comes_from_the_yaml(conf, read):
    text = read("ingest")["ingest_demo"].doc_md
    for words in ("Drawn pictures.", "| Images | `160` |", "when somebody starts it", str(conf / "sources/demo.yaml")):
        assert words in text


def test_columns_and_changed_demands_are_told_of(conf, read):
    table = (
        "layout: table\ntable: {file: c.csv, path: P, patient: 'a|b', subtype: S, magnification: M, subtypes: {x: F}}\n"
    )
    demands = "validation: {quarantine_rate: {limit: 0.3}}\n"
    text = f"name: other\nkind: directory\npath: /data\n{table}{demands}"
    (conf / "sources" / "other.yaml").write_text(text)
    doc = read("ingest")["ingest_other"].doc_md
    for words in (
        "### Columns of `c.csv`",
        r"| patient | `a\|b` |",
        "| subtypes | `x: F` |",
        "- quarantine_rate: limit 0.3 instead of 0.1",
        "/breakhis/sources/other)",
    ):
        assert words in doc


def test_a_source_beside_a_training_set_is_called_by_its_path(conf, read, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "slides.yaml").write_text(SOURCE.format(name="slides"))
    (mine / "set.yaml").write_text(SET.format(name="mine").replace("[demo]", "[./slides.yaml]"))
    monkeypatch.setenv("BREAKHIS_TRAINING_SETS", str(mine / "set.yaml"))
    dags = read("ingest")
    assert set(dags) == {"ingest_demo", "ingest_slides"}
    assert dags["ingest_slides"].get_task("fetch").arguments == ["--", str(mine / "slides.yaml")]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("typo.yaml", "name: typo\nkind: directory\npth: /data\n", "unknown key 'pth'"),
        ("half.yaml", "name: [half\n", "is not valid YAML"),
        ("empty.yaml", "", "expected 'key: value' lines"),
        ("never.yaml", SOURCE.format(name="never") + "schedule: '99 * * * *'\n", "not acceptable, out of range"),
        ("a b,ü.yaml", SOURCE.format(name="ab"), "make them agree"),
    ],
)
def test_a_file_that_cannot_be_used_says_so_and_disturbs_no_other(conf, read, name, text, words):
    file = conf / "sources" / name
    file.write_text(text)
    dags = read("ingest")
    (bad,) = set(dags) - {"ingest_demo"}
    assert dags["ingest_demo"].get_task("publish")
    assert dags[bad].tags == {"invalid"}
    assert words in dags[bad].doc_md
    assert str(file) in dags[bad].doc_md
    (task,) = dags[bad].tasks
    with pytest.raises(AirflowFailException) as caught:
        task.python_callable()
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert DagSerialization.to_dict(dags[bad])


def test_what_is_no_file_disturbs_no_other(conf, read):
    (conf / "sources" / "loop.yaml").symlink_to("loop.yaml")
    (conf / "sources" / ".#demo.yaml").symlink_to("somebody@host.1234:5678")
    (conf / "sources" / "._demo.yaml").write_bytes(b"\0\x05\x16\x07")
    (conf / "sources" / "folder.yaml").mkdir()
    Path(os.fsdecode(bytes(conf / "sources") + b"/\xff.yaml")).write_text(SOURCE.format(name="other"))
    for kind in ("sources", "training_sets"):
        os.mkfifo(conf / kind / "pipe.yaml")
    dags = read("ingest")
    assert set(dags) == {"ingest_demo", "ingest_loop", "ingest_folder", "ingest_pipe", "ingest__"}
    assert dags.pop("ingest_demo").get_task("publish")
    assert "a link that leads to no file" in dags["ingest_loop"].doc_md
    for dag in dags.values():
        assert dag.tags == {"invalid"}
        json.dumps(DagSerialization.to_dict(dag), ensure_ascii=False).encode()  # as a database stores it


def test_two_files_of_one_name_are_told_apart(conf, read, tmp_path, monkeypatch):
    (tmp_path / "demo.yaml").write_text(SOURCE.format(name="demo"))
    (tmp_path / "set.yaml").write_text(SET.format(name="mine").replace("[demo]", "[./demo.yaml]"))
    monkeypatch.setenv("BREAKHIS_TRAINING_SETS", str(tmp_path / "set.yaml"))
    dags = read("ingest")
    assert set(dags) == {"ingest_demo", "ingest_demo_2"}
    assert sorted(len(dag.tasks) for dag in dags.values()) == [1, 4]
    assert "declares ingest_demo already" in dags["ingest_demo_2"].doc_md
