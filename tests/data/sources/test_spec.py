import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import ConfigError
from ml.core.settings import PROJECT, Settings
from ml.core.yaml_files import validate_mapping
from ml.data.sources import (
    SOURCE_KINDS,
    DemoSource,
    DirectorySource,
    KaggleSource,
    SourceSpec,
    demo,
    load_source,
    source_files,
)
from ml.data.sources.spec import DEMO_IMAGES


def read(tmp_path: Path, text: str, name: str = "mine.yaml") -> SourceSpec:
    path = tmp_path / name
    path.write_text(text)
    return load_source(path, tmp_path)


def test_a_directory_source(tmp_path: Path) -> None:
    spec = read(tmp_path, f"name: mine\nkind: directory\npath: {tmp_path}/images\n")
    assert isinstance(spec, DirectorySource)
    assert spec.path == tmp_path / "images"
    assert spec.file == tmp_path / "mine.yaml"
    assert (spec.description, spec.inventory, spec.schedule) == ("", False, None)
    assert "file" not in spec.model_dump()


def test_a_path_may_start_at_the_yaml_file_or_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/engineer")
    relative = read(tmp_path, "name: mine\nkind: directory\npath: ../images\n")
    home = read(tmp_path, "name: mine\nkind: directory\npath: ~/images\n")
    assert isinstance(relative, DirectorySource)
    assert isinstance(home, DirectorySource)
    assert relative.path == tmp_path.parent / "images"
    assert home.path == Path("/home/engineer/images")


@pytest.mark.parametrize(
    ("handle", "parts"),
    [
        ("spanhol/breakhis", ("spanhol", "breakhis", None)),
        ("spanhol/breakhis/4", ("spanhol", "breakhis", 4)),
        ("spanhol/breakhis/versions/12", ("spanhol", "breakhis", 12)),
    ],
)
def test_kaggle_handles(tmp_path: Path, handle: str, parts: tuple[str, str, int | None]) -> None:
    spec = read(tmp_path, f"name: mine\nkind: kaggle\ndataset: {handle}\n")
    assert isinstance(spec, KaggleSource)
    assert (spec.owner, spec.slug, spec.version) == parts


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kind: demo\n", "'name' is missing"),
        ("name: mine\n", "'kind' is missing (one of: directory, kaggle, s3, http, demo)"),
        ("name: mine\nkind: s4\n", "unknown kind 's4' (known: directory, kaggle, s3, http, demo)"),
        ("name: mine\nkind: [demo]\n", "unknown kind ['demo']"),
        ("name: mine\nkind: directory\n", "'path' is missing"),
        ("name: mine\nkind: directory\npath: ~nobody-here/images\n", "'path': ~nobody-here/images"),
        ("name: mine\nkind: demo\nimages: 81\n", "'images'"),
        ("name: mine\nkind: demo\nimages: 7910\n", "'images'"),
        ("name: mine\nkind: demo\nseed: -1\n", "'seed'"),
        ("name: mine\nkind: demo\nschedule: daily\n", "'schedule': 'daily' is neither @hourly"),
        ("name: mine\nkind: demo\ninventory: perhaps\n", "'inventory'"),
        ("name: Mine!\nkind: demo\n", "'name'"),
        ("name: other\nkind: demo\n", "'name' is 'other', but the file is called mine.yaml: make them agree"),
        (
            "name: mine\nkind: kaggle\ndataset: breakhis\n",
            "'dataset': 'breakhis' is not a Kaggle data set; write owner/",
        ),
        ("name: mine\nkind: kaggle\ndataset: a/b/versions/0\n", "'dataset'"),
        ("name: mine\nkind: kaggle\ndataset: https://kaggle.com/datasets/a/b\n", "write owner/slug"),
        *(
            (f"name: mine\nkind: s3\nbucket: images\nregion: {region}\n", "'region'")
            for region in ("eu_west", "'123'", "-eu", "eu-", "'eu west'", "''", "e" * 64)
        ),
        *(
            (f"name: mine\nkind: s3\nbucket: images\nendpoint: '{address}'\n", "'endpoint'")
            for address in ("http://x?a=b", "http://x#a", "http://x;a", "http://x:99999", "http://[::1", "x:9000")
        ),
        ("- name: mine\n", "expected 'key: value' lines, found list"),
        ("name: [mine\n", "is not valid YAML"),
        ("", "expected 'key: value' lines"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/mine.yaml: ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_lists_those_of_its_kind(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown key 'paht' \(known: cohort, description, inventory, kind, layout, name, path,"
    ):
        read(tmp_path, "name: mine\nkind: directory\npath: x\npaht: y\n")
    with pytest.raises(ConfigError, match=r"unknown key 'path' \(known: .*images.*seed, .*table, trust, validation\)"):
        read(tmp_path, "name: mine\nkind: demo\npath: y\n")


def test_a_missing_source_lists_those_there_are(settings: Settings, declare: Callable[..., SourceSpec]) -> None:
    declare("demo", kind="demo")
    with pytest.raises(ConfigError, match=r"nothere\.yaml: no such file; in .*/sources there are: demo"):
        load_source("nothere", settings.conf)


@given(
    st.dictionaries(st.text(max_size=12), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))
)
def test_whatever_stands_there_fits_or_is_a_config_error(data: dict[str, object]) -> None:
    for kind, model in SOURCE_KINDS.items():
        with contextlib.suppress(ConfigError):
            assert validate_mapping({**data, "kind": kind, "name": "mine"}, model, Path("/mine.yaml")).kind == kind


def test_the_demo_source_draws_whatever_may_be_declared() -> None:
    assert (demo.MIN_PICTURES, demo.MAX_PICTURES) == DEMO_IMAGES


def test_shipped_sources() -> None:
    breakhis = load_source("breakhis", PROJECT / "dags")
    drawn = load_source("demo", PROJECT / "dags")
    assert isinstance(breakhis, KaggleSource)
    assert breakhis.inventory
    assert isinstance(drawn, DemoSource)
    assert (drawn.images, drawn.seed, drawn.inventory) == (640, 1, False)


def test_source_files_are_those_in_conf_and_those_that_training_sets_refer_to(tmp_path: Path) -> None:
    conf, elsewhere = tmp_path / "conf", tmp_path / "elsewhere"
    for folder in (conf / "sources", conf / "training_sets", elsewhere):
        folder.mkdir(parents=True)
    (conf / "sources" / "here.yaml").write_text("name: here\nkind: demo\n")
    (conf / "training_sets" / "a.yaml").write_text("name: a\nsources: [here, ../sources/here.yaml]\n")
    (conf / "training_sets" / "broken.yaml").write_text("sources: [")
    extra = elsewhere / "b.yaml"
    extra.write_text("name: b\nsources: [here, ./there.yaml]\n")
    settings = Settings(conf=conf, training_sets=(extra, elsewhere / "missing.yaml"))
    assert source_files(settings) == [conf / "sources" / "here.yaml", elsewhere / "there.yaml"]


def test_a_link_that_leads_to_itself_costs_no_other_source(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    for folder in (conf / "sources", conf / "training_sets"):
        folder.mkdir(parents=True)
        (folder / "good.yaml").write_text("name: good\nkind: demo\nsources: [good, ../loop.yaml]\n")
        (folder / "loop.yaml").symlink_to("loop.yaml")
    (conf / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(conf / "training_sets" / "pipe.yaml")
    settings = Settings(conf=conf, training_sets=(conf / "loop.yaml",))
    loops = [conf / "loop.yaml", conf / "sources" / "loop.yaml"]
    assert source_files(settings) == [loops[0], conf / "sources" / "good.yaml", loops[1]]
    for file in loops:
        with pytest.raises(ConfigError, match=rf"^{file}: a link that leads to no file"):
            load_source(str(file), conf)


def test_hidden_files_are_no_sources(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "good.yaml").write_text("name: good\nkind: demo\n")
    (sources / "._good.yaml").write_bytes(b"\0\x05\x16\x07")
    (sources / ".hidden.yaml").write_text("name: hidden\nkind: demo\n")
    (sources / ".#good.yaml").symlink_to("somebody@host.1234:5678")
    assert source_files(Settings(conf=tmp_path)) == [sources / "good.yaml"]
    with pytest.raises(ConfigError, match="there are: good; did you mean good"):
        load_source("goood", tmp_path)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("pandas", "pyarrow", "numpy", "PIL", "kaggle", "kagglesdk", "requests", "boto3", "rich", "airflow")
    code = f"import sys, ml.data.sources; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_the_cohort_is_that_of_the_names(tmp_path: Path) -> None:
    assert read(tmp_path, "name: mine\nkind: directory\npath: x\n").cohort == "breakhis"
    assert read(tmp_path, "name: mine\nkind: demo\n").cohort == "demo"
    table = "layout: table\ntable: {file: t.csv, path: a, patient: b, subtype: c, magnification: d}\n"
    assert read(tmp_path, f"name: mine\nkind: directory\npath: x\n{table}").cohort == "mine"
    assert read(tmp_path, f"name: mine\nkind: directory\npath: x\n{table}cohort: north\n").cohort == "north"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trust: {14-13412: XX}", "'trust': unknown subtypes XX"),
        ("trust: {1001: F, 1001.0: DC}", "'trust': '1001.0' is there twice, as F and as DC"),
        ("trust: {1001: F, '=\"1001\"': DC}", "is there twice, as F and as DC"),
        (
            "validation: {quarantine_rat: {limit: 0.2}}",
            "'validation.quarantine_rat' (known: class_sizes, image_sizes, ",
        ),
        ("validation: {quarantine_rate: {limit: 2}}", "'validation.quarantine_rate.limit'"),
        ("validation: {rows: {severity: warning}}", "unknown key 'validation.rows'"),
        ("validation: {class_sizes: {severity: off}}", "'validation.class_sizes.severity'"),
        ("validation: {class_sizes: {subtypes: [XX]}}", "'validation.class_sizes.subtypes.0'"),
    ],
)
def test_what_cannot_be_trusted_or_demanded(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, f"name: mine\nkind: directory\npath: x\n{line}\n")


def test_two_further_checks_need_two_names(tmp_path: Path) -> None:
    check = "{name: mine, sentence: Something of ours., expectation: ExpectColumnValuesToBeInSet}"
    with pytest.raises(ConfigError, match="two checks are called mine"):
        read(tmp_path, f"name: mine\nkind: directory\npath: x\nvalidation: {{more: [{check}, {check}]}}\n")


@pytest.mark.parametrize("number", ["0x" + "f" * 5_000, "0b" + "1" * 20_000, "0o" + "7" * 9_000, "9" * 5_000])
def test_a_number_that_python_does_not_print_is_none(tmp_path: Path, number: str) -> None:
    file = tmp_path / "made.yaml"
    file.write_text(f"name: made\nkind: demo\nseed: {number}\n")
    with pytest.raises(ConfigError, match=r"made\.yaml: line 3: .*seed") as error:
        load_source(str(file), tmp_path)
    assert len(str(error.value)) < 1_000
