"""The layout ``table``: another hospital's images, told of by a CSV or Parquet file of its own."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import ConfigError, SourceError
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.manifest import make_manifest, read_manifest
from ml.data.sources import SourceSpec, TableSpec, fetch_source
from ml.data.sources.spec import DirectorySource
from ml.data.sources.tables import read_table
from ml.data.validation import validate_manifest
from tests.helpers.made_up import png, write_tree

COLUMNS = {"path": "Image", "patient": "PatientID", "subtype": "Diagnosis", "magnification": "Objective"}
SUBTYPES = {"invasive ductal": "DC", "fibroadenoma": "F"}
ROWS = [
    ("scans/a1.tif", "p1", "invasive ductal", "20x"),
    ("scans/a2.tif", "p1", "invasive ductal", "40.0"),
    ("./scans/b1.tif", "p2", "fibroadenoma", "20 X"),
    ("b2.tif", "p2", "F", "40"),
]


def csv(*rows: tuple[str, ...]) -> bytes:
    return pd.DataFrame(rows, columns=list(COLUMNS.values())).to_csv(index=False).encode()


@pytest.fixture
def source(declare: Callable[..., SourceSpec], tmp_path: Path) -> Callable[..., SourceSpec]:
    """A folder with four pictures and a table that says so of them."""
    files = {f"scans/{name}.tif": png(k) for k, name in enumerate(("a1", "a2", "b1", "b2"))}

    def make(*rows: tuple[str, ...], more: dict[str, bytes] | None = None, **table: Any) -> SourceSpec:
        write_tree(tmp_path / "images", {**files, "labels.csv": csv(*(rows or ROWS)), **(more or {})})
        declared = {"file": "labels.csv", **COLUMNS, "subtypes": SUBTYPES, **table}
        return declare("clinic", kind="directory", path=str(tmp_path / "images"), layout="table", table=declared)

    return make


@pytest.fixture
def ingest(store: Store, settings: Settings) -> Callable[[SourceSpec], tuple[pd.DataFrame, dict[str, tuple[str, str]]]]:
    """The manifest, and of the quarantine reason and detail of each path."""

    def run(spec: SourceSpec) -> tuple[pd.DataFrame, dict[str, tuple[str, str]]]:
        made = make_manifest(spec, store, 0, fetch_source(spec, store, settings)["version"])
        out = pd.read_parquet(store.file(made["manifest"], "quarantine.parquet"))
        return read_manifest(made["manifest"], store), {r.path: (r.reason, r.detail) for r in out.itertuples()}

    return run


def test_a_table_becomes_a_manifest_that_passes(source: Any, ingest: Any, store: Store, settings: Settings) -> None:
    spec = source()
    rows, quarantine = ingest(spec)
    assert quarantine == {}
    told = ["path", "patient", "slide", "subtype", "label", "magnification", "seq"]
    assert [tuple(row) for row in rows[told].itertuples(index=False)] == [
        ("scans/a1.tif", "clinic:p1", "clinic:p1", "DC", "malignant", 20, 1),
        ("scans/a2.tif", "clinic:p1", "clinic:p1", "DC", "malignant", 40, 1),
        ("scans/b1.tif", "clinic:p2", "clinic:p2", "F", "benign", 20, 1),
        ("scans/b2.tif", "clinic:p2", "clinic:p2", "F", "benign", 40, 1),
    ]
    validation = validate_manifest(make_manifest(spec, store, 0)["manifest"], store)
    assert (validation["passed"], validation["failed"]) == (True, [])
    assert [one["name"] for one in validation["warned"]] == ["class_sizes"]  # of two images each


def test_parquet_with_slides_of_its_own(source: Any, ingest: Any) -> None:
    frame = pd.DataFrame(ROWS, columns=list(COLUMNS.values())).assign(Slide=[7, 8, 9, 9])
    packed = io.BytesIO()
    frame.to_parquet(packed)
    rows, quarantine = ingest(source(more={"meta/t.parquet": packed.getvalue()}, file="meta/t.parquet", slide="Slide"))
    assert quarantine == {}
    assert list(rows["slide"]) == ["clinic:7", "clinic:8", "clinic:9", "clinic:9"]
    assert list(rows["patient"]) == ["clinic:p1", "clinic:p1", "clinic:p2", "clinic:p2"]


@pytest.mark.parametrize(
    ("row", "path", "reason", "detail"),
    [
        (("b2.tif", "", "F", "40"), "scans/b2.tif", "row", "labels.csv row 5: 'PatientID' is empty"),
        (("b2.tif", "p", "cyst", "40"), "scans/b2.tif", "subtype", "labels.csv row 5: 'cyst' is no subtype"),
        (("b2.tif", "p", "F", "high"), "scans/b2.tif", "magnification", "row 5: 'high' is no magnification"),
        (("c9.tif", "p", "F", "40"), "c9.tif", "missing_file", "row 5: there is no such image"),
        (("c9.tif", "p", "F", "40"), "scans/b2.tif", "not_in_table", "no row in"),
        (("a1.tif", "p9", "F", "40"), "scans/a1.tif", "conflicting_rows", "row 5 contradicts"),
    ],
)
def test_what_cannot_be_used_is_quarantined(
    source: Any, ingest: Any, row: tuple[str, ...], path: str, reason: str, detail: str
) -> None:
    _, quarantine = ingest(source(*ROWS[:3], row))
    assert quarantine[path][0] == reason
    assert detail in quarantine[path][1]


def test_the_same_row_twice_is_one(source: Any, ingest: Any) -> None:
    rows, quarantine = ingest(source(*ROWS, ROWS[0]))
    assert (len(rows), quarantine) == (4, {})


def test_another_mapping_is_another_manifest(source: Any, ingest: Any) -> None:
    assert set(ingest(source())[0]["subtype"]) == {"DC", "F"}
    other, quarantine = ingest(source(subtypes={"invasive ductal": "LC"}))
    assert set(other["subtype"]) == {"LC", "F"}
    assert quarantine["scans/b1.tif"][0] == "subtype"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"patient": "Who"}, "has no column 'Who'; it has: Image, PatientID, Diagnosis, Objective"),
        ({"file": "other.csv"}, r"clinic\.yaml: the source has no file 'other\.csv'"),
        ({"file": "broken.parquet"}, r"broken\.parquet cannot be read"),
    ],
)
def test_tables_that_cannot_be_read(source: Any, ingest: Any, table: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        ingest(source(more={"broken.parquet": b"PAR1"}, **table))


def test_a_table_alone_is_no_source(ingest: Any, declare: Any, tmp_path: Path) -> None:
    write_tree(tmp_path / "images", {"labels.csv": csv()})
    spec = declare(
        "clinic",
        **{"kind": "directory", "path": str(tmp_path / "images"), "layout": "table"},
        table={"file": "labels.csv", **COLUMNS},
    )
    with pytest.raises(SourceError, match=r"none of its 0 image file\(s\) can be used"):
        ingest(spec)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"subtypes": {"x": "XX"}}, "unknown subtypes XX"),
        ({"file": "../labels.csv"}, "within the source"),
        ({"file": "labels.xlsx"}, "must be the path of a .csv or .parquet file"),
    ],
)
def test_tables_that_cannot_be_declared(source: Any, table: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        source(**table)


def test_layout_and_table_belong_together(declare: Any) -> None:
    for fields in ({"layout": "table"}, {"table": {"file": "a.csv", **COLUMNS}}):
        with pytest.raises(ConfigError, match="belong together"):
            declare(kind="demo", **fields)


@given(st.lists(st.tuples(*[st.text(max_size=6)] * 4), max_size=8))
def test_any_text_in_the_cells_is_told_from_a_fault(rows: list[tuple[str, ...]]) -> None:
    spec = DirectorySource(
        name="x", kind="directory", path=Path("/"), layout="table", table=TableSpec(file="t.csv", **COLUMNS)
    )
    try:
        told = read_table(spec, csv(*rows), ["a.png", "b/c.png"])
    except SourceError:
        return
    for row in told.values():
        assert row.problem or (row.patient and row.slide and row.subtype and row.magnification > 0)
