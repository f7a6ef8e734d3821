"""One table, however it is written: the same images get the same patients."""

import gzip
import io
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from ml.core.errors import SourceError
from ml.data.sources import TableSpec
from ml.data.sources.spec import DirectorySource
from ml.data.sources.tables import TableRow, read_table

COLUMNS = {"path": "Image", "patient": "Patient", "subtype": "Dx", "magnification": "Zoom"}


def declare(file: str, **table: object) -> DirectorySource:
    return DirectorySource.model_validate(
        {
            "name": "x",
            "kind": "directory",
            "path": "/",
            "layout": "table",
            "table": TableSpec.model_validate({"file": file, **COLUMNS, **table}),
        }
    )


def read(rows: list[tuple[str, str]], paths: list[str]) -> dict[str, TableRow]:
    """The rows of a CSV file with these images and patients."""
    frame = pd.DataFrame([(*row, "DC", "40") for row in rows], columns=list(COLUMNS.values()))
    return read_table(declare("t.csv"), frame.to_csv(index=False).encode(), paths)


def used(rows: dict[str, TableRow], paths: list[str]) -> dict[str, str]:
    """The patient of each delivered image that has a usable row."""
    return {path: rows[path].patient.removeprefix("x:") for path in paths if path in rows and not rows[path].problem}


# --- which image a row means ------------------------------------------------------------------------------------------

FOLDERS, FILES = ("P1", "P2", "Zoe\u0301"), ("a.png", "e\u0301.png", "IMG_1.png")
IMAGES = [f"{folder}/{file}" for folder in FOLDERS for file in FILES]
WRITTEN: list[Callable[[str], str]] = [
    str,
    lambda path: unicodedata.normalize("NFC", path),
    lambda path: unicodedata.normalize("NFD", path),
    lambda path: f"./{path}",
    lambda path: path.replace("/", "\\"),
    lambda path: path.replace("/", "//"),
]
some_images = st.lists(st.sampled_from(IMAGES), unique=True)
in_some_form = st.lists(st.sampled_from(WRITTEN), min_size=len(IMAGES), max_size=len(IMAGES))


@given(listed=some_images, delivered=some_images, forms=in_some_form, disk=in_some_form)
def test_a_row_with_a_folder_means_that_path_alone(
    listed: list[str],
    delivered: list[str],
    forms: list[Callable[[str], str]],
    disk: list[Callable[[str], str]],
) -> None:
    on_disk = {path: form(path) for path, form in zip(delivered, disk, strict=False)}
    owner = {on_disk[path]: path.partition("/")[0] for path in delivered}
    told = read([(form(path), path.partition("/")[0]) for path, form in zip(listed, forms, strict=False)], list(owner))
    patients = used(told, list(owner))
    expected = {on_disk[path]: path for path in listed if path in on_disk}
    assert set(patients) == set(expected)
    assert patients == {path: unicodedata.normalize("NFC", owner[path]) for path in expected}
    unmatched = [row for row in told.values() if row.problem]
    assert len(unmatched) == len(set(listed) - set(delivered))
    assert all(row.problem and row.problem[0] == "missing_file" for row in unmatched)


@given(
    listed=st.lists(st.sampled_from(FILES), unique=True),
    with_folder=some_images,
    delivered=st.lists(st.sampled_from([*IMAGES, *FILES]), unique=True),
    form=st.sampled_from(WRITTEN[:3]),
)
def test_a_file_name_alone_means_the_only_image_of_that_name(
    listed: list[str], with_folder: list[str], delivered: list[str], form: Callable[[str], str]
) -> None:
    rows = [(form(name), f"by name {name}") for name in listed] + [(path, f"by path {path}") for path in with_folder]
    told = read(rows, delivered)
    patients = used(told, delivered)
    named = Counter(path.rpartition("/")[2] for path in {*delivered, *with_folder})
    for path in delivered:
        name = path.rpartition("/")[2]
        by_name = name in listed and (path == name or (named[name] == 1 and name not in delivered))
        expected = [f"by name {name}"] * by_name + [f"by path {path}"] * (path in with_folder)
        composed = [unicodedata.normalize("NFC", patient) for patient in expected]
        if len(expected) == 2:
            problem = told[path].problem
            assert problem
            assert problem[0] == "conflicting_rows"
        else:
            assert [patients[path]] == composed if expected else path not in patients


AT_ROOT: list[Callable[[str], str]] = [lambda name: f"./{name}", lambda name: f".\\{name}", lambda name: f"././{name}"]


@given(
    listed=st.lists(st.sampled_from(FILES), unique=True),
    delivered=st.lists(st.sampled_from([*IMAGES, *FILES]), unique=True),
    form=st.sampled_from(AT_ROOT),
)
def test_a_row_that_names_the_root_means_the_path_there_alone(
    listed: list[str], delivered: list[str], form: Callable[[str], str]
) -> None:
    told = read([(form(name), f"by root {name}") for name in listed], delivered)
    at_root = [name for name in listed if name in delivered]
    assert used(told, delivered) == {name: unicodedata.normalize("NFC", f"by root {name}") for name in at_root}
    unmatched = [row.problem[0] for row in told.values() if row.problem]
    assert unmatched == ["missing_file"] * (len(listed) - len(at_root))


SUFFIXES = ("png", "PNG", "Png")
some_cases = st.lists(
    st.tuples(st.sampled_from(["", "P1/", "P2/"]), st.sampled_from(SUFFIXES)).map("a.".join), unique=True, max_size=6
)


@given(some_cases, st.sampled_from(["", "./", "P1/", "P2/"]), st.sampled_from(SUFFIXES))
def test_of_several_images_whose_suffixes_differ_in_case_a_row_means_one_or_none(
    delivered: list[str], folder: str, suffix: str
) -> None:
    """The exact path, or the only image that fits; never one of several."""
    path = f"{folder.removeprefix('./')}a.{suffix}"
    fits = [image for image in delivered if image.lower() == path.lower()]
    if not folder:
        fits = delivered
    expected = [path] if path in delivered else fits if len(fits) == 1 else []
    told = read([(f"{folder}a.{suffix}", "p")], delivered)
    assert used(told, delivered) == dict.fromkeys(expected, "p")
    [problem] = [row.problem for row in told.values()]
    assert problem is None or problem[0] == "missing_file"
    assert ("several images" in str(problem)) == (not expected and len(fits) > 1)


def test_two_files_whose_names_differ_in_encoding_alone_get_no_row() -> None:
    paths = ["a/\u00e9.png", "a/e\u0301.png"]
    told = read([(paths[0], "p1"), (paths[1], "p2")], paths)
    assert used(told, paths) == {}
    assert {row.problem[0] for row in told.values() if row.problem} == {"missing_file"}
    assert any("encoded" in row.problem[1] for row in told.values() if row.problem)


@pytest.mark.parametrize(
    ("written", "delivered", "meant"),
    [
        (" P1/x.png", [" P1/x.png", "P1/x.png"], " P1/x.png"),
        ("P1/x.png", [" P1/x.png", "P1/x.png"], "P1/x.png"),
        (" P1/x.PNG", [" P1/x.png", "P1/x.png"], " P1/x.png"),
        (" P1/x.png", ["P1/x.png", "P2/x.png"], "P1/x.png"),
        ("P1/x.png ", ["P1/x.png"], "P1/x.png"),
        ("'P1/x.png", ["'P1/x.png", "P1/x.png"], "'P1/x.png"),
        ("'P1/x.png", ["P1/x.png"], "P1/x.png"),
        ("P1/x\u200b.png", ["P1/x\u200b.png", "P1/x.png"], "P1/x\u200b.png"),
        ("P1/x.png  ", [" P1/x.png", "P1/x.png"], None),
        ("P1/x.png", [" P1/x.png"], None),
        (" x.png", ["P1/ x.png", "P2/x.png"], "P1/ x.png"),
        (" x.png", ["P1/x.png"], "P1/x.png"),
        ("x.png ", ["P1/ x.png", "P2/x.png"], None),
        ("x.png ", ["P1/x.png", "x.png"], "x.png"),
        ("x.png ", ["x.png", "x.PNG"], "x.png"),
        ("x.png ", ["P1/x.png", "P2/x.png"], None),
        ('="P1/x.png"', ["P1/x.png"], "P1/x.png"),
    ],
)
def test_a_path_is_what_is_written_before_it_is_what_blanks_leave(
    written: str, delivered: list[str], meant: str | None
) -> None:
    assert used(read([(written, "p")], delivered), delivered) == ({meant: "p"} if meant else {})


def test_two_rows_whose_paths_differ_in_blanks_mean_two_images() -> None:
    paths = [" P1/x.png", "P1/x.png", "P1/x.png "]
    assert used(read([(path, f"p{k}") for k, path in enumerate(paths)], paths), paths) == {
        path: f"p{k}" for k, path in enumerate(paths)
    }


def test_a_column_may_be_path_and_patient() -> None:
    rows = read_table(declare("t.csv", patient="Image"), b"Image,Dx,Zoom\n 1.png,DC,40\n", [" 1.png"])
    assert used(rows, [" 1.png"]) == {" 1.png": "1.png"}


def test_a_row_says_that_its_image_lies_elsewhere() -> None:
    told = read([("P1/IMG_1.png", "P1")], ["P2/IMG_1.png"])
    assert told["P1/IMG_1.png"].problem == (
        "missing_file",
        "t.csv row 2: there is no such image in the source; P2/IMG_1.png lies in another folder than the row says",
    )


# --- what a patient is called -----------------------------------------------------------------------------------------

NUMBER_COLUMNS: dict[str, Callable[[list[int | None]], pa.Array]] = {
    "int64": lambda ids: pa.array(ids, pa.int64()),
    "int32": lambda ids: pa.array(ids, pa.int32()),
    "float64": lambda ids: pa.array(ids, pa.float64()),
    "float32": lambda ids: pa.array(ids, pa.float32()),
    "decimal with three places": lambda ids: pa.array(
        [None if n is None else Decimal(n) for n in ids], pa.decimal128(38, 3)
    ),
    "text with a decimal comma": lambda ids: pa.array([None if n is None else f"{n},0" for n in ids]),
    "decimal": lambda ids: pa.array([None if n is None else Decimal(n) for n in ids], pa.decimal128(20, 2)),
    "text": lambda ids: pa.array([None if n is None else str(n) for n in ids]),
    "text of floats": lambda ids: pa.array([None if n is None else f"{n}.0" for n in ids]),
    "bytes": lambda ids: pa.array([None if n is None else str(n).encode() for n in ids], pa.binary()),
    "dictionary": lambda ids: pa.array(ids, pa.int64()).dictionary_encode(),
    "dictionary of floats": lambda ids: pa.array(ids, pa.float64()).dictionary_encode(),
    "pandas floats": lambda ids: pa.array(pd.Series(ids, dtype="float64")),
    "pandas Int64": lambda ids: pa.array(pd.Series(ids, dtype="Int64")),
    "pandas category": lambda ids: pa.array(pd.Series(ids, dtype="Int64").astype("category")),
}
CSV_COLUMNS: dict[str, Callable[[list[int | None]], pd.Series]] = {
    "integers": lambda ids: pd.Series(ids, dtype="Int64"),
    "floats": lambda ids: pd.Series(ids, dtype="float64"),
    "numpy": lambda ids: pd.Series([None if n is None else np.int32(n) for n in ids], dtype="object"),
    "blanks": lambda ids: pd.Series(["" if n is None else f"  {n} " for n in ids]),
    "floats of a German spreadsheet": lambda ids: pd.Series(["#NV" if n is None else f"{n},0" for n in ids]),
    "text of missing": lambda ids: pd.Series(ids, dtype="float64").astype(str),
}


def pack(patients: pa.Array) -> bytes:
    count = len(patients)
    images = pa.array([f"{k}.png" for k in range(count)])
    table = pa.table([images, patients, pa.array(["DC"] * count), pa.array([40.0] * count)], list(COLUMNS.values()))
    packed = io.BytesIO()
    parquet.write_table(table, packed)
    return packed.getvalue()


def name_patients(file: str, data: bytes, count: int, **table: object) -> list[str]:
    paths = [f"{k}.png" for k in range(count)]
    rows = read_table(declare(file, **table), data, paths)
    problems = {rows[path].problem[0] for path in paths if rows[path].problem}
    assert problems <= {"row"}
    return ["" if rows[path].problem else rows[path].patient for path in paths]


@given(
    st.lists(st.none() | st.integers(0, 2**24 - 1), min_size=1, max_size=6),
    st.sampled_from([*NUMBER_COLUMNS]),
    st.data(),
)
def test_a_number_is_one_patient_in_every_type_of_column(ids: list[int | None], kind: str, data: st.DataObject) -> None:
    expected = ["" if n is None else f"x:{n}" for n in ids]
    assert name_patients("t.parquet", pack(NUMBER_COLUMNS[kind](ids)), len(ids)) == expected
    values = CSV_COLUMNS[data.draw(st.sampled_from([*CSV_COLUMNS]))](ids)
    frame = pd.DataFrame({"Image": [f"{k}.png" for k in range(len(ids))], "Patient": values, "Dx": "DC", "Zoom": "40x"})
    assert name_patients("t.csv", frame.to_csv(index=False).encode(), len(ids)) == expected
    bom = frame.to_csv(index=False).encode("utf-8-sig")  # as a spreadsheet writes it
    assert name_patients("t.csv", bom, len(ids)) == expected


# -1 and -999 stand for a missing number.
WHOLE_NUMBERS = st.integers(0, 2**63 - 1) | st.integers(-(2**63), -1).filter(lambda number: len(set(str(number))) > 2)


@given(st.lists(WHOLE_NUMBERS, min_size=1, max_size=6))
def test_whole_numbers_keep_all_digits_or_are_refused(ids: list[int]) -> None:
    with_gap = [*ids, None]
    assert name_patients("t.parquet", pack(pa.array(with_gap, pa.int64())), len(with_gap))[:-1] == [
        f"x:{n}" for n in ids
    ]
    floats = name_patients("t.parquet", pack(pa.array([float(n) for n in ids], pa.float64())), len(ids))
    assert floats == [f"x:{n}" if abs(n) < 2**53 and abs(float(n)) < 2**53 else "" for n in ids]


@pytest.mark.parametrize(
    ("cell", "fault"),
    [
        ("#WERT!", "is '#WERT!', an error in a spreadsheet; correct the cell and export the table again"),
        ("1,23457E+11", "is '1,23457E+11', a rounded number that several may share; export the column as text"),
        ("2.000", "is '2.000', which is 2 or 2000 by language; export the column as text"),
        ("NULL", "is 'NULL', which stands for a missing value; fill it in"),
    ],
)
def test_a_cell_that_names_nobody_is_told_with_file_row_column_and_remedy(cell: str, fault: str) -> None:
    rows = read([("a.png", "p1"), ("b.png", cell)], ["a.png", "b.png"])
    assert rows["a.png"].problem is None
    assert rows["b.png"].problem == ("row", f"t.csv row 3: 'Patient' {fault}")


def test_codes_of_subtypes_may_be_numbers_too() -> None:
    table = pa.table([["0.png", "1.png"], [1, 2], [3.0, None], [40, 40]], list(COLUMNS.values()))
    packed = io.BytesIO()
    parquet.write_table(table, packed)
    for key in ("3", "3.0"):
        rows = read_table(declare("t.parquet", subtypes={key: "DC"}), packed.getvalue(), ["0.png", "1.png"])
        assert (rows["0.png"].subtype, rows["0.png"].problem) == ("DC", None)
        assert rows["1.png"].problem


def test_a_column_of_lists_is_refused() -> None:
    with pytest.raises(SourceError, match="'Patient' holds list"):
        read_table(declare("t.parquet"), pack(pa.array([[1], [2]])), ["0.png"])


def test_a_column_is_found_in_composed_and_decomposed_letters() -> None:
    for header, declared in (("Gr\u00f6\u00dfe", "Gro\u0308\u00dfe"), ("Gro\u0308\u00dfe", "Gr\u00f6\u00dfe")):
        data = f"Image,Patient,Dx,{header}\na.png,p,DC,40\n".encode()
        [row] = read_table(declare("t.csv", magnification=declared), data, ["a.png"]).values()
        assert (row.magnification, row.problem) == (40, None)


def test_a_trusted_slide_is_found_under_its_former_name(tmp_path: Path) -> None:
    spec = declare("t.csv").model_copy(update={"trust": {"7.0": "LC"}})
    assert spec.trusted_subtype("x:7") == "LC"


# --- tables as people write them --------------------------------------------------------------------------------------

HEADER = "Image,Patient,Dx,Zoom\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (HEADER + "a.png,p,DC,40\nb.png,,DC,40\n", 3),
        (HEADER + "\na.png,p,DC,40\n\n\nb.png,,DC,40\n", 6),
        ("\n\n" + HEADER + "a.png,p,DC,40\n  \nb.png,,DC,40\n", 6),
        (HEADER + "a.png,p,DC,40\n,,,\n , , ,\nb.png,,DC,40\n,,,\n", 5),
        (HEADER.replace("\n", "\r\n") + "\r\na.png,p,DC,40\r\nb.png,,DC,40", 4),
        (HEADER + '"a.png",p,"DC",40\nc.png,"p\n\n1",DC,40\nb.png,,DC,40\n', 6),
        (HEADER.replace("Dx", '"Dx"').replace("Zoom", 'Zoom,"a\nnote"') + "a.png,p,DC,40\nb.png,,DC,40\n", 4),
    ],
)
def test_rows_are_counted_as_an_editor_counts_lines(text: str, line: int) -> None:
    rows = read_table(declare("t.csv"), text.encode(), ["a.png", "b.png", "c.png"])
    assert rows["a.png"].problem is None
    assert rows["b.png"].problem == ("row", f"t.csv row {line}: 'Patient' is empty")
    assert set(rows) <= {"a.png", "b.png", "c.png"}


@given(st.lists(st.sampled_from(["", "  ", ",,,", "good", "bad"]), max_size=12), st.sampled_from(["\n", "\r\n", "\r"]))
def test_every_row_at_fault_is_named_by_its_line(kinds: list[str], end: str) -> None:
    lines = [HEADER.strip(), *(f"{n}.png,{'p' if kind == 'good' else ''},DC,40" if kind[:1].isalpha() else kind
                               for n, kind in enumerate(kinds))]  # fmt: skip
    rows = read_table(declare("t.csv"), end.join(lines).encode(), [f"{n}.png" for n in range(len(kinds))])
    expected = {f"{n}.png": f"t.csv row {n + 2}: 'Patient' is empty" for n, kind in enumerate(kinds) if kind == "bad"}
    assert {path: row.problem[1] for path, row in rows.items() if row.problem} == expected
    assert set(rows) - set(expected) == {f"{n}.png" for n, kind in enumerate(kinds) if kind == "good"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("\n \n,,\n", "it is empty"),
        (HEADER + 'a.png,"p,DC,40\nb.png,p,DC,40\n', "line 2: unexpected end of data"),
        (HEADER + "\na.png,p,DC,40,x\n", "line 3 has 5 cells and the header 4"),
        (
            HEADER + f"a.png,{'p' * 200_000},DC,40\n",
            r"line 2: a cell of more than 131,072 characters; is a quotation mark missing\?",
        ),
    ],
)
def test_a_csv_file_at_fault_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=rf"t\.csv cannot be read: {message}"):
        read_table(declare("t.csv"), text.encode(), ["a.png"])


def make_zip(*names: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (make_zip("[Content_Types].xml", "xl/workbook.xml"), r"it is an Excel workbook \(\.xlsx\).*'CSV UTF-8'"),
        (make_zip("mimetype", "content.xml"), r"it is an OpenDocument spreadsheet \(\.ods\).*Text CSV"),
        (make_zip("t.csv"), "it is a ZIP archive; unpack it"),
        (make_zip("t.csv")[:20], "it is a ZIP archive; unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"it is an Excel workbook \(\.xls\).*'CSV UTF-8'"),
        (gzip.compress(HEADER.encode()), "it is packed by gzip; unpack it"),
    ],
    ids=["xlsx", "ods", "zip", "cut zip", "xls", "gzip"],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_file_of_another_format_is_named(data: bytes, message: str, suffix: str) -> None:
    with pytest.raises(SourceError, match=rf"t\.{suffix} cannot be read: {message}"):
        read_table(declare(f"t.{suffix}"), data, ["a.png"])


def test_a_parquet_file_called_csv_is_named() -> None:
    with pytest.raises(SourceError, match=r"it is a Parquet file; let its name end in \.parquet"):
        read_table(declare("t.csv"), b"PAR1", ["a.png"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER.replace(",", ";"), "line 1: the columns are separated by semicolons; save it with commas"),
        ("\n" + HEADER.replace(",", "\t"), "line 2: the columns are separated by tabs"),
        ('"' + HEADER.strip().replace(",", '";"') + '"\r\n', "line 1: the columns are separated by semicolons"),
        (HEADER.strip().replace(",", ";") + ';"a, b"\n', "line 1: the columns are separated by semicolons"),
        ("picture;who\n", "line 1: the columns are separated by semicolons"),
        ("sep=;\n" + HEADER.replace(",", ";"), "line 1: 'sep=;' is for Excel alone; remove that line, and separate"),
        ("SEP=,\n" + HEADER, r"line 1: 'SEP=,' is for Excel alone; remove that line$"),
    ],
)
def test_other_separators_than_commas_are_named(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=rf"t\.csv cannot be read: {message}"):
        read_table(declare("t.csv"), text.encode(), ["a.png"])


def test_columns_may_have_semicolons_in_their_names() -> None:
    data = HEADER.replace("Zoom", "Zoom,a;b") + "a.png,p,DC,40,x\n"
    assert read_table(declare("t.csv"), data.encode(), ["a.png"])["a.png"].problem is None
    data = HEADER.replace("Zoom", "Zoom;x") + "a.png,p,DC,40\n"
    assert read_table(declare("t.csv", magnification="Zoom;x"), data.encode(), ["a.png"])["a.png"].problem is None


def test_rows_may_be_shorter_and_end_in_commas() -> None:
    data = (HEADER.replace("\n", ",Note\n") + "a.png,p,DC,40\nb.png,p,DC,40,x,,\n").encode()
    rows = read_table(declare("t.csv"), data, ["a.png", "b.png"])
    assert [row.problem for row in rows.values()] == [None, None]


def test_suffixes_of_tables_are_in_any_case() -> None:
    data = (HEADER + "a.png,p,DC,40\n").encode()
    assert read_table(declare("t.CSV"), data, ["a.png"])["a.png"].patient == "x:p"
    packed = io.BytesIO()
    pd.read_csv(io.BytesIO(data)).to_parquet(packed)
    assert read_table(declare("T.Parquet"), packed.getvalue(), ["a.png"])["a.png"].patient == "x:p"
    table = declare("d/t.csv").table
    assert table
    assert table.is_at("./d/t.CSV")
    assert not table.is_at("d/T.csv")
    assert not table.is_at("t.csv")


def test_suffixes_of_pictures_are_in_any_case_where_only_one_is_meant() -> None:
    paths = ["P1/a.tif", "P2/b.TIF", "c.tif", "c.TIF", "P3/a.png", "P4/d.tif", "P4/d.TIF"]
    told = read(
        [("P1/a.TIF", "1"), ("b.tif", "2"), ("c.tif", "3"), ("c.TIF", "4"), ("c.Tif", "5"), ("P4/d.Tif", "6")], paths
    )
    assert used(told, paths) == {"P1/a.tif": "1", "P2/b.TIF": "2", "c.tif": "3", "c.TIF": "4"}
    assert {path: row.problem[1] for path, row in told.items() if row.problem} == {
        "c.Tif": "t.csv row 6: several images have this name, such as c.TIF and c.tif; give the path",
        "P4/d.Tif": "t.csv row 7: several images differ from it in the suffix' case alone: P4/d.TIF and P4/d.tif; "
        "write it as one is",
    }


def test_two_rows_that_mean_one_picture_by_two_suffixes_contradict() -> None:
    told = read([("a.TIF", "1"), ("a.tif", "2")], ["a.tif"])
    problem = told["a.tif"].problem
    assert problem
    assert problem[0] == "conflicting_rows"
