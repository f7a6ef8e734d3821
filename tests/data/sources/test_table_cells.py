"""Tables of many rows, long rows and well packed columns: limits that hold before memory fills up."""

import io
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from ml.core.errors import SourceError
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.manifest import make_manifest
from ml.data.sources import fetch_source, load_source, table_cells
from ml.data.sources.table_cells import read_cells
from tests.helpers.made_up import png, write_tree


def csv_table(rows: int, cell: str = "x") -> bytes:
    return ("a,b\n" + f"1,{cell}\n" * rows).encode()


def parquet_table(rows: int, cell: str = "x", **options: object) -> bytes:
    packed = io.BytesIO()
    parquet.write_table(pa.table({"a": ["1"] * rows, "b": [cell] * rows}), packed, **options)
    return packed.getvalue()


def read(data: bytes, columns: tuple[str, ...] = ("a",), max_rows: int = 100) -> list[tuple[int, dict[str, str]]]:
    is_parquet = data.startswith(b"PAR1")
    return list(read_cells("mine.yaml: t", data, columns, is_parquet=is_parquet, max_rows=max_rows))


TABLES = [pytest.param(csv_table, id="csv"), pytest.param(parquet_table, id="parquet")]


@pytest.mark.parametrize("make", TABLES)
def test_the_number_of_rows_is_limited(make) -> None:
    assert read(make(100)) == [(number, {"a": "1"}) for number in range(2, 102)]
    many = r"^mine\.yaml: t has more than the 100 rows allowed; .* or raise BREAKHIS_TABLE_ROWS$"
    with pytest.raises(SourceError, match=many):
        read(make(101))


@pytest.mark.parametrize("make", TABLES)
def test_no_row_is_read_beyond_the_limit(make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cells, "_BATCH", 10)
    formatted: list[object] = []
    monkeypatch.setattr(table_cells, "format_value", lambda value: formatted.append(value) or "")
    with pytest.raises(SourceError, match="more than the 20 rows"):
        read(make(5_000), max_rows=20)
    assert len(formatted) <= 30


@pytest.mark.parametrize("make", TABLES)
def test_only_declared_columns_take_up_memory(make) -> None:
    data = make(2_000, "x" * 1_000)  # two megabytes in a column that is not read
    read(data, max_rows=2_000)
    tracemalloc.start()
    read(data, max_rows=2_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (3 * len(data) if make is csv_table else 1_500_000)


def test_a_text_that_many_rows_repeat_is_in_memory_once() -> None:
    data = parquet_table(2_000, "x" * 10_000)
    assert len(data) < 20_000
    usual = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counted)
    tracemalloc.start()
    try:
        rows = read(data, ("b",), 2_000)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert {cells["b"] for _, cells in rows} == {"x" * 10_000}
    assert peak < 3_000_000
    assert counted.max_memory() < 5_000_000


def test_a_column_that_unpacks_to_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cells, "MAX_FILE_BYTES", 100_000)
    data = parquet_table(200, "x" * 1_000, use_dictionary=False, compression="zstd")
    assert len(data) < 10_000
    with pytest.raises(SourceError, match=r"cannot be read: its declared columns unpack to more than 100,000 bytes"):
        read(data, ("b",), 200)
    assert len(read(data, ("a",), 200)) == 200


@pytest.mark.parametrize(
    "text",
    ["a,b\n1,x\n2," + "x" * 60, "a,b\n1,x\n2,x" + ",y" * 40, 'a,b\n1,x\n2,"' + "x\n" * 40 + '"'],
    ids=["a cell", "many cells", "many lines"],
)
def test_a_row_of_csv_is_short(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_cells, "MAX_ROW_TEXT", 50)
    with pytest.raises(SourceError, match="line 3: a row of more than 50 characters"):
        read(text.encode())


def test_a_source_says_how_many_rows_its_table_may_have(tmp_path: Path) -> None:
    write_tree(tmp_path / "images", {"a.png": png(1), "t.csv": b"Image,Who,Dx,Zoom\na.png,p,DC,40\nb.png,p,DC,40\n"})
    file = tmp_path / "made.yaml"
    table = "{file: t.csv, path: Image, patient: Who, subtype: Dx, magnification: Zoom}"
    file.write_text(f"name: made\nkind: directory\npath: ./images\nlayout: table\ntable: {table}\n")
    spec, store = load_source(file, tmp_path), Store((tmp_path / "store").as_uri())
    fetch_source(spec, store, Settings(home=tmp_path))
    with pytest.raises(SourceError, match=r"made\.yaml: t\.csv has more than the 1 rows allowed"):
        make_manifest(spec, store, 0, max_rows=1)
    assert make_manifest(spec, store, 0, max_rows=2)["images"] == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (pa.timestamp("ms"), 2**62),
        (pa.timestamp("us", "Mars/Olympus"), 0),
        (pa.timestamp("us", "+99:99"), 0),
        (pa.date32(), 2**31 - 1),
    ],
)
def test_a_date_that_is_none_is_told(kind: pa.DataType, value: int) -> None:
    """Of such a date Python has no object, and Arrow raises what that raises."""
    packed = io.BytesIO()
    storage = pa.int32() if kind == pa.date32() else pa.int64()
    parquet.write_table(pa.table({"a": pa.array([value], storage).cast(kind), "b": ["x"]}), packed)
    with pytest.raises(SourceError, match=r"^mine\.yaml: t cannot be read: a column of .* holds a value that is none"):
        read(packed.getvalue(), ("a", "b"))
