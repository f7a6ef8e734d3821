"""The command line as a person or a scheduler uses it: JSON, results, exit statuses and one clear line of error."""

import json

import pytest

from ml import cli
from ml.core.settings import Settings
from ml.core.store import Store
from ml.core.taxonomy import SIDES
from ml.promotion.audit_log import AuditLog
from tests.helpers.made_up import create_dataset as made_dataset
from tests.helpers.made_up import every_class, manifest_rows, name, png, write_tree


@pytest.fixture
def breakhis(tmp_path, monkeypatch, command):
    """Runs the command; returns (exit status, stdout, stderr)."""
    monkeypatch.setenv("BREAKHIS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("ml.core.settings.Settings.worker_count", 0)  # decode here: a process starts in seconds
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # which MLflow leaves behind, of another test's server

    return command


@pytest.fixture
def source(tmp_path):
    def write(files, **more):
        write_tree(tmp_path / "images", files)
        (tmp_path / "images").mkdir(exist_ok=True)
        file = tmp_path / "made.yaml"
        lines = {"name": "made", "kind": "directory", "path": "./images", **more}
        file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
        return file

    return write


def last_error(err):
    return err.strip().splitlines()[-1]


def objects(tmp_path):
    root = tmp_path / "home" / "store" / "objects"
    return sorted(p.name for p in root.iterdir()) if root.exists() else []


def test_ingest_prints_one_json_object_and_writes_the_same(breakhis, source, tmp_path):
    file = source({name("F", "14-1"): png(1, (700, 460)), name("DC", "14-2"): png(2, (700, 460)), "notes.txt": b"x"})
    result = tmp_path / "out" / "result.json"
    code, out, err = breakhis("ingest", file, "--json", "--result", result)
    assert code == 0, err
    outcome = json.loads(out.splitlines()[-1])
    assert json.loads(result.read_text()) == outcome
    assert (outcome["images"], outcome["skipped"], outcome["passed"], outcome["changed"]) == (2, 1, True, True)
    again = json.loads(breakhis("ingest", file, "--json")[1].splitlines()[-1])
    assert (again["changed"], again["version"]) == (False, outcome["version"])


def test_for_people_it_prints_lines(breakhis, source):
    _, out, _ = breakhis("fetch", source({name("F", "14-1"): png(1)}))
    assert "files" in out
    assert not out.startswith("{")


def test_a_failed_validation_is_printed_and_exits_4(breakhis, source, tmp_path):
    file = source({name("F", "14-1"): png(1, (700, 460))}, inventory="true")
    code, out, err = breakhis("ingest", file, "--json")
    assert code == 4
    outcome = json.loads(out.splitlines()[-1])
    assert not outcome["passed"]
    assert [check["name"] for check in outcome["failed"]] == ["inventory"]
    assert "did not pass validation: inventory" in last_error(err)
    store = Store((tmp_path / "home" / "store").as_uri())
    assert store.read("refs/sources/made.json") == (None, None)
    code, _, err = breakhis("publish", outcome["manifest"])
    assert code == 4
    assert "has not passed validation" in last_error(err)


def test_a_few_of_many_failed_checks_are_told(breakhis, monkeypatch):
    warned = [{"name": f"check_{number}", "observed": "x" * 10_000} for number in range(300)]
    result = {"source": "mine", "warned": warned, "failed": [], "errored": [], "passed": True, "docs": "file:///docs"}
    monkeypatch.setattr("ml.data.validation.validate_manifest", lambda *_: result)
    _, _, said = breakhis("validate", "manifest-0123456789ab")
    lines = said.splitlines()
    assert len(lines) == 11
    assert "the check check_9 found xxx" in lines[9]
    assert lines[10].endswith("mine: and 290 more checks; see file:///docs")
    assert max(map(len, lines)) < 400


def test_an_empty_folder(breakhis, source, tmp_path):
    code, _, err = breakhis("ingest", source({}))
    assert code == 3
    assert str(tmp_path / "images") in last_error(err)
    assert objects(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "data", "reason"),
    [
        (name("PC", "14-5"), b"text", "undecodable"),
        (name("PC", "14-5"), png(1)[:700], "truncated"),
        ("holiday.png", png(1), "name"),
    ],
)
def test_a_bad_file_is_quarantined_beside_good_ones(breakhis, source, file, data, reason):
    path = source({name("F", "14-1"): png(1), name("DC", "14-2"): png(2), file: data})
    code, out, err = breakhis("fetch", path)
    assert code == 0, err
    code, out, err = breakhis("manifest", path, "--json")
    assert code == 0, err
    outcome = json.loads(out)
    assert (outcome["images"], outcome["quarantined"]) == (2, {reason: 1})


def test_an_unknown_key(breakhis, source, tmp_path):
    code, _, err = breakhis("ingest", source({}, colour="pink"))
    assert code == 3
    assert "unknown key 'colour'" in last_error(err)
    assert "made.yaml" in last_error(err)
    assert objects(tmp_path) == []


def test_a_missing_source_and_set(breakhis):
    for command in ("ingest", "assemble"):
        code, _, err = breakhis(command, "nowhere")
        assert code == 3
        assert "nowhere.yaml: no such file" in last_error(err)
        assert "demo" in last_error(err)


def test_unknown_ids(breakhis):
    for arguments in (
        ("validate", "manifest-0123456789ab"),
        ("split", "dataset-0123456789ab"),
        ("features", "dataset-0123456789ab", "--preset", "demo"),
        ("train", "binary", "--dataset", "dataset-0123456789ab", "--split", "split-0", "--preset", "demo"),
    ):
        code, _, err = breakhis(*arguments)
        assert code == 3
        assert "no such" in last_error(err)


def test_split_and_its_report(breakhis, tmp_path):
    store = Store((tmp_path / "home" / "store").as_uri())
    cases = {case: images for case, images in every_class().items() if images[0] != "A"} | {"14-8": ("A", 3)}
    frame = manifest_rows(cases)
    dataset = made_dataset(store, frame)
    code, out, err = breakhis("split", dataset, "--json")
    assert code == 0, err
    outcome = json.loads(out)
    assert (outcome["method"], outcome["group"], outcome["ledger"]) == ("allocator", "case", "made")
    assert outcome["not_estimable_because"] == {"A": "A has 1 case"}
    code, plain, _ = breakhis("split", dataset)
    assert code == 0
    assert 'not_estimable          ["A"]' in plain
    code, shown, _ = breakhis("split", dataset, "--report")
    assert code == 0
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    table = {cells[0]: cells[1:] for cells in lines}
    assert table["A"] == ["3 / 1 / 1", "0 / 0 / 0", "0 / 0 / 0", "3 / 1 / 1"]
    total = [" / ".join(str(outcome[side][what]) for what in ("images", "slides", "cases")) for side in SIDES]
    assert table["all"] == [*total, "87 / 22 / 22"]
    assert "not estimable: A, no case in test: A has 1 case" in shown
    assert json.loads(breakhis("split", dataset, "--report", "--json")[1])["split"] == outcome["split"]


def test_a_ledger_is_not_split_another_way(breakhis, tmp_path):
    store = Store((tmp_path / "home" / "store").as_uri())
    frame = manifest_rows(every_class())
    assert breakhis("split", made_dataset(store, frame))[0] == 0
    code, _, err = breakhis("split", made_dataset(store, frame, group="slide"))
    assert code == 3
    assert "name another ledger" in last_error(err)


def test_usage_errors_exit_2(breakhis):
    assert breakhis("train", "ternary")[0] == 2
    assert breakhis("no-such-command")[0] == 2


@pytest.mark.parametrize("version", ["1\n", "01", "+1", "1.0", "１", "two", "0"])
@pytest.mark.parametrize("stage", ["gate", "promote", "rollback", "withdraw"])
def test_a_version_is_written_in_one_way_only(breakhis, stage, version):
    run = [] if stage == "gate" else ["--dag-run", "r1"]
    code, _, err = breakhis(stage, *run, "--", "made-binary", version)
    assert code == 2
    assert "is no number of a version, such as 3" in err


@pytest.mark.parametrize("shard", ["3/2", "0/2", "a", "1", "1/0", "-1/2", "1/2/3", ""])
def test_a_part_that_is_none_is_a_usage_error(breakhis, shard):
    code, _, err = breakhis("features", "dataset-0123456789ab", "--preset", "demo", "--shard", shard)
    assert code == 2
    assert "is not a part such as 1/3, 2/3 or 3/3" in err


def test_weights_takes_random_ones_only_where_the_preset_allows_it(breakhis, monkeypatch):
    asked = []

    def fetch_weights(wanted, store, *, allow_random):
        asked.append((wanted, allow_random))
        return {"weights": "weights-0123456789ab"}

    monkeypatch.setattr("ml.training.backbone_weights.fetch_weights", fetch_weights)
    monkeypatch.setenv("BREAKHIS_WEIGHTS", "imagenet")
    for arguments in ((), ("--preset", "demo"), ("--preset", "paper")):
        code, out, _ = breakhis("weights", *arguments, "--json")
        assert (code, json.loads(out)["weights"]) == (0, "weights-0123456789ab")
    assert asked == [("imagenet", False), ("imagenet", True), ("imagenet", False)]


def test_a_bad_setting_is_named(breakhis, monkeypatch):
    monkeypatch.setenv("BREAKHIS_STORE", "/just/a/path")
    code, _, err = breakhis("config")
    assert code == 3
    assert "BREAKHIS_STORE" in last_error(err)
    monkeypatch.setenv("BREAKHIS_STORE", "9" * 5_000)
    assert len(last_error(breakhis("config")[2])) < 500


def test_a_fault_of_ours_shows_its_traceback_and_exits_1(breakhis, monkeypatch, source):
    def broken(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("ml.data.sources.fetch_source", broken)
    code, _, err = breakhis("fetch", source({name("F", "14-1"): png(1)}))
    assert code == 1
    assert "Traceback" in err
    assert "a fault of breakhis" in last_error(err)


def test_config_hides_secrets(breakhis, monkeypatch):
    monkeypatch.setenv("BREAKHIS_AIRFLOW_PASSWORD", "planted2")
    for setting in ("AIRFLOW_URL", "MLFLOW_URI", "DOCKER_MLFLOW_URI", "MLFLOW_UI"):
        monkeypatch.setenv(f"BREAKHIS_{setting}", "http://me:planted2@example.org/?key=planted2")
    for arguments in (("config",), ("config", "--json")):
        code, out, _ = breakhis(*arguments)
        assert code == 0
        assert "planted2" not in out
        assert "**" in out


def test_every_command_has_help(breakhis):
    _, out, _ = breakhis("--help")
    for command in cli.cli.commands:
        assert command in out
        code, text, _ = breakhis(command, "--help")
        assert code == 0
        assert "Usage" in text


def test_history_shows_what_was_damaged_and_the_check_refuses_it(breakhis, tmp_path, monkeypatch):
    monkeypatch.setenv("BREAKHIS_AUDIT_KEY", "secret")
    store = Store((tmp_path / "home" / "store").as_uri())
    log = AuditLog(store, Settings(home=tmp_path / "home", store=store.root, audit_key="secret"))
    for version in (1, 2):
        log.append("rejected", "demo-binary", version=version, by="reviewer", reason="too few", champion=None)
    assert breakhis("history", "demo-binary")[1].count("rejected") == 2
    file = store.local("audit/log/00000001.json")
    file.write_text(file.read_text().replace("too few", "too many"))
    code, out, _ = breakhis("history", "demo-binary")
    assert code == 0
    assert out.count("(!)") == 2  # the record, and what the mark means
    file.write_text("{")
    assert "00000001.json is damaged" in breakhis("history", "demo-binary")[1]
    code, out, _ = breakhis("audit", "verify", "--json")
    assert (code, json.loads(out)["faults"][0]) == (4, "00000001.json is no record")
