"""The validate stage: each check finds what it is for, crashes are told from failures, answers are remembered."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_up import Keep, manifest_table, named_wrongly, quarantine_table, quarantined, row, with_values

from ml.core.errors import StoreError
from ml.core.store import Json, Store
from ml.core.taxonomy import DUPLICATED_SLIDE
from ml.data.source_versions import publish_manifest
from ml.data.validation import count_only_in_quarantine, validate_manifest
from ml.data.validation.checks import ONLY_IN_QUARANTINE, build_suite


def names(found: list[Json]) -> set[str]:
    return {one["name"] for one in found}


def with_row(frame: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The frame with one more row, which is the first one but for these values."""
    return manifest_table([*frame.to_dict("records"), {**frame.iloc[0].to_dict(), **values}])  # type: ignore[list-item]


Fault = Callable[[pd.DataFrame], pd.DataFrame]


FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "one more column": (lambda f: f.assign(note="x"), {"schema"}),
    "number of another type": (lambda f: f.assign(width=f["width"].astype(float)), {"schema"}),
    "text instead of numbers": (
        lambda f: f.assign(magnification=f["magnification"].astype(str)),
        {"schema", "names_agree", "magnifications"},
    ),
    "no row at all": (lambda f: f.iloc[:0], {"rows"}),
    "empty cell": (lambda f: with_values(f, 3, patient=None), {"not_null"}),
    "empty path": (lambda f: with_values(f, 3, path=None), {"not_null"}),
    "name of another kind": (lambda f: with_values(f, 3, path="a/IMG_0001.png"), {"file_names"}),
    "number of two digits": (lambda f: with_values(f, 3, path="a/SOB_B_A-14-22549AB-400-01.png"), {"file_names"}),
    "grammar in the folder only": (lambda f: with_values(f, 3, path=f"{f.loc[3, 'path']}/thumb.png"), {"file_names"}),
    "another number": (lambda f: with_values(f, 3, seq=7), {"names_agree"}),
    "another case for a slide": (
        lambda f: f.assign(patient=f["patient"].replace("14-2523", "14-22549")),
        {"names_agree"},
    ),
    "another magnification": (lambda f: with_values(f, 3, magnification=50), {"names_agree", "magnifications"}),
    "one slide, two subtypes": (
        lambda f: manifest_table([*f.to_dict("records"), row("F", "14-22549AB", 40, 2)]),  # type: ignore[list-item]
        {"subtype_per_slide"},
    ),
    "one slide, two patients": (lambda f: with_values(f, 3, patient="14-2523"), {"names_agree", "patient_per_slide"}),
    "label against subtype": (
        lambda f: with_values(f, 0, path="a/SOB_M_A-14-22549AB-40-001.png", label="malignant"),
        {"label_of_subtype"},
    ),
    "same pixels": (lambda f: with_values(f, 3, pixel_sha256=f.loc[5, "pixel_sha256"]), {"unique_pixels"}),
    "same name": (lambda f: with_row(f, path=f"b/{f.loc[0, 'path']}", pixel_sha256="0" * 64), {"unique_names"}),
}


@pytest.mark.parametrize(("fault", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_each_check_fails_on_what_it_is_for_and_no_other(
    fault: Fault, expected: set[str], small: pd.DataFrame, keep: Keep, store: Store
) -> None:
    result = validate_manifest(keep(fault(small)), store)
    assert names(result["failed"]) == expected
    assert not result["passed"]
    assert not result["errored"]
    assert not result["warned"]


def test_a_manifest_without_fault_passes(
    small: pd.DataFrame, keep: Keep, store: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: calls.append(address))
    manifest = keep(small)
    result = validate_manifest(manifest, store)
    out, err = capfd.readouterr()
    assert result["passed"]
    assert not result["failed"] + result["errored"] + result["warned"]
    assert result["manifest"] == manifest
    assert result["validation"].startswith("validation-")
    assert not calls
    assert out == ""
    assert err == "validating 12 images of made-up with Great Expectations\n"
    meta = store.meta(result["validation"])
    assert [(one["name"], one["severity"]) for one in meta["checks"]] == [
        (c.name, c.severity) for c in build_suite(False)
    ]
    assert all(one["success"] for one in meta["checks"])


def test_another_size_is_a_warning_and_passes(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    result = validate_manifest(keep(with_values(small, 3, width=224, height=224)), store)
    assert result["passed"]
    (warned,) = result["warned"]
    assert warned["name"] == "image_sizes"
    assert warned["unexpected"] == 1
    assert warned["observed"] == "1 of 12 rows"
    assert warned["rows"] == [{"path": small.loc[3, "path"], "width": 224, "height": 224}]
    assert "warning from image_sizes" in Path(result["docs"].removeprefix("file://")).read_text()


def test_a_finding_names_the_first_rows_by_path(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    (failed,) = validate_manifest(keep(small.assign(seq=9)), store)["failed"]
    assert failed["name"] == "names_agree"
    assert failed["unexpected"] == 12
    assert [one["path"] for one in failed["rows"]] == list(small["path"][:5])
    assert failed["rows"][0]["seq"] == 9
    assert failed["sentence"].startswith("Label, subtype, slide")


def test_a_missing_column_fails_the_schema_and_what_needs_it_is_errored(
    small: pd.DataFrame, keep: Keep, store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    result = validate_manifest(keep(small.drop(columns="width")), store)
    assert names(result["failed"]) == {"schema"}
    assert result["failed"][0]["observed"] == "columns missing: width"
    assert names(result["errored"]) == {"not_null", "image_sizes"}
    assert all("width" in one["observed"] for one in result["errored"])
    assert not result["passed"]
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_crash_is_errored_blocks_and_is_not_remembered(
    small: pd.DataFrame, keep: Keep, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ml.data.validation import expectations

    def crash(*_: Any) -> bool:
        raise RuntimeError("out of paper")

    manifest = keep(small)
    with monkeypatch.context() as patch:
        patch.setattr(expectations, "_agrees", crash)
        crashed = validate_manifest(manifest, store)
    assert not crashed["passed"]
    assert not crashed["failed"]
    assert names(crashed["errored"]) == {"names_agree"}
    assert "out of paper" in crashed["errored"][0]["observed"]
    assert "names_agree crashed" in Path(crashed["docs"].removeprefix("file://")).read_text()

    again = validate_manifest(manifest, store)
    assert again["passed"]
    assert again["validation"] != crashed["validation"]


def test_the_answer_is_remembered_and_great_expectations_not_even_imported(
    small: pd.DataFrame, keep: Keep, store: Store
) -> None:
    manifest = keep(small.assign(seq=9))
    first = validate_manifest(manifest, store)
    program = (
        "import json, sys\n"
        "from ml.core.store import Store\n"
        "from ml.data.validation import validate_manifest\n"
        "result = validate_manifest(sys.argv[1], Store(sys.argv[2]))\n"
        "print(json.dumps([result, 'great_expectations' in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, manifest, store.root], capture_output=True, check=True)
    assert json.loads(done.stdout) == [first, False]
    assert done.stderr == b""


def test_the_validation_is_named_by_what_was_found(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    manifest = keep(small)
    first = validate_manifest(manifest, store)["validation"]
    for memo in (Path(store.root.removeprefix("file://")) / "objects/memos/validate").iterdir():
        memo.unlink()
    assert validate_manifest(manifest, store)["validation"] == first


@pytest.mark.parametrize("oid", ["manifest-000000000000", "nonsense"])
def test_an_unknown_manifest_is_an_error(oid: str, store: Store) -> None:
    with pytest.raises(StoreError, match=oid):
        validate_manifest(oid, store)


def earlier(frame: pd.DataFrame, store: Store) -> str:
    """A manifest as it was made before cohorts, trust and demands were told."""
    return store.create(
        "manifest", 1, {"source": "made-up"}, lambda folder: frame.to_parquet(folder / "manifest.parquet")
    )


def test_a_manifest_of_an_earlier_release_is_an_error(small: pd.DataFrame, store: Store) -> None:
    old = earlier(small, store)
    with pytest.raises(StoreError, match="made by an earlier release; run: breakhis manifest made-up"):
        validate_manifest(old, store)


def test_what_an_earlier_release_published_is_replaced(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    old = earlier(small, store)
    store.put_json("refs/sources/made-up.json", {"manifest": old, "version": "version-1", "validation": "validation-1"})
    again = publish_manifest(keep(small), store)
    assert (again["changed"], again["diff"]) == (True, {"added": 0, "removed": 0, "relabelled": 0})


def test_an_object_of_another_kind_is_an_error(store: Store) -> None:
    raw = store.create("raw", [], {"source": "made-up"})
    with pytest.raises(StoreError, match="is no manifest"):
        validate_manifest(raw, store)


# --- the inventory ----------------------------------------------------------------------------------------------


@pytest.fixture
def split_off(whole: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Whole BreakHis as a manifest has it: the slide that stands under DC and LC is in quarantine."""
    doubtful = whole["slide"] == DUPLICATED_SLIDE
    reason = "slide_with_two_subtypes"
    in_quarantine = [quarantined(one, reason) for one in whole[doubtful].to_dict("records")]  # type: ignore[arg-type]
    return whole[~doubtful].reset_index(drop=True), in_quarantine


def inventory_finding(frame: pd.DataFrame, quarantine: list[dict[str, Any]], tmp_path: Path) -> Any:
    """What became of the inventory check alone."""
    from ml.data.validation.suite import run_suite

    (check,) = (one for one in build_suite(True) if one.name == "inventory")
    only = {ONLY_IN_QUARANTINE: count_only_in_quarantine(frame, quarantine_table(quarantine))}
    ((outcome,), _) = run_suite((check,), frame, only, "manifest-0", tmp_path)
    return outcome


def test_whole_breakhis_passes_with_the_doubtful_slide_in_quarantine(
    split_off: tuple[pd.DataFrame, list[dict[str, Any]]], keep: Keep, store: Store
) -> None:
    frame, quarantine = split_off
    assert len(frame) + len(quarantine) == 7909
    result = validate_manifest(keep(frame, quarantine, inventory=True), store)
    assert result["passed"]
    assert not result["failed"] + result["errored"] + result["warned"]
    observed = {one["name"]: one["observed"] for one in store.meta(result["validation"])["checks"]}
    assert observed["inventory"] == "7,909 images"
    assert observed["quarantine_rate"] == "246 of 7,909 files, 3.1% (at most 10.0%)"


def test_all_published_names_at_once_fail_only_for_the_slide_with_two_subtypes(
    whole: pd.DataFrame, keep: Keep, store: Store
) -> None:
    result = validate_manifest(keep(whole, inventory=True), store)
    (failed,) = result["failed"]
    assert failed["name"] == "subtype_per_slide"
    assert failed["unexpected"] == 246
    assert {one["slide"] for one in failed["rows"]} == {DUPLICATED_SLIDE}


def test_one_image_less_fails_and_names_the_cell(whole: pd.DataFrame, keep: Keep, store: Store) -> None:
    missing = whole.index[whole["path"].str.endswith("SOB_M_PC-15-190EF-100-003.png")]
    result = validate_manifest(keep(whole.drop(index=missing), inventory=True), store)
    assert not result["passed"]
    (failed,) = (one for one in result["failed"] if one["name"] == "inventory")
    published = int(((whole["slide"] == "15-190EF") & (whole["magnification"] == 100)).sum())
    slide = f"{published - 1} of {published}"
    assert failed["observed"] == f"PC at 100X: expected 142, found 141 (slide 15-190EF: {slide})"
    assert failed["unexpected"] == 1
    assert failed["rows"] == [
        {"subtype": "PC", "magnification": 100, "expected": 142, "found": 141, "slides": {"15-190EF": slide}}
    ]
    page = next(Path(result["docs"].removeprefix("file://")).parent.glob("validations/**/*.html")).read_text()
    assert failed["observed"] in page


def test_without_the_claim_a_part_of_breakhis_passes(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    assert validate_manifest(keep(small, inventory=False), store)["passed"]
    claimed = validate_manifest(keep(small, inventory=True), store)
    (failed,) = claimed["failed"]
    assert failed["name"] == "inventory"
    assert len(failed["rows"]) == failed["unexpected"] == 32


def test_quarantined_images_count_once_by_name(whole: pd.DataFrame, tmp_path: Path) -> None:
    taken, frame = whole.iloc[:3], whole.iloc[3:]
    images = taken.to_dict("records")
    twice = [quarantined(one, folder=folder) for one in images for folder in ("a/", "b/")]  # type: ignore[arg-type]
    also_good = [quarantined(whole.iloc[10].to_dict(), folder="c/")]  # type: ignore[arg-type]
    quarantine = [*twice, *also_good, named_wrongly("d/IMG_1.png")]
    assert inventory_finding(frame, quarantine, tmp_path).status == "held"
    less = inventory_finding(frame, quarantine[2:], tmp_path)
    assert less.status == "failed"
    assert less.observed == "A at 40X: expected 114, found 113 (slide 14-22549AB: 28 of 29)"


def test_an_image_too_many_does_not_hide_one_that_is_missing(whole: pd.DataFrame, tmp_path: Path) -> None:
    frame = whole[whole["path"] != whole.loc[0, "path"]]
    frame = manifest_table([*frame.to_dict("records"), row("A", "14-22549CD", 40, 999)])  # type: ignore[list-item]
    finding = inventory_finding(frame, [], tmp_path)
    assert finding.observed.startswith("A at 40X: expected 114, found 114 (slide 14-22549AB: 28 of 29, 14-22549CD: ")


# --- the pages --------------------------------------------------------------------------------------------------


def test_the_pages_lead_to_each_other_and_need_no_network(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    evil = f"<script>alert(1)</script>/<b>bold</b>/{small.loc[3, 'path']}"
    manifest = keep(
        with_values(small, 3, path=evil, seq=9),
        [quarantined(small.iloc[0].to_dict(), folder="<u>x</u>/"), named_wrongly("IMG_1.png")],  # type: ignore[arg-type]
    )
    result = validate_manifest(manifest, store)
    index = Path(result["docs"].removeprefix("file://"))
    pages = sorted(index.parent.rglob("*.html"))
    assert len(pages) == 4
    assert {path.suffix for path in index.parent.rglob("*") if path.is_file()} == {".html"}
    for page in pages:
        html = page.read_text()
        assert manifest in html
        assert "names_agree failed" in html
        assert not re.search(r"<script|<link|<img|src=|<b>bold|<u>x|url\(", html)
        assert "default-src 'none'" in html
        targets = [link for link in re.findall(r'href="([^"]+)"', html) if not link.startswith(("#", "http"))]
        assert all((page.parent / target.partition("#")[0]).is_file() for target in targets)
    front = index.read_text()
    assert 'href="validations/' in front
    assert 'href="quarantine.html"' in front
    assert "2 (name: 1, truncated: 1)" in front
    assert "&lt;u&gt;x&lt;/u&gt;" in front
    assert all(check.name in front and check.severity in front for check in build_suite(False))
    results = next(index.parent.glob("validations/**/*.html")).read_text()
    assert "Label, subtype, slide, case, magnification and number in the table are those of the file name." in results
    assert "&lt;b&gt;bold&lt;/b&gt;" in results


def test_result_json_has_every_offending_row(small: pd.DataFrame, keep: Keep, store: Store) -> None:
    result = validate_manifest(keep(small.assign(seq=9)), store)
    kept = json.loads(store.file(result["validation"], "result.json").read_text())
    assert kept["failed"] == result["failed"]
    failed = [one for one in kept["great_expectations"]["results"] if not one["success"]]
    assert [len(one["result"]["unexpected_index_list"]) for one in failed] == [12]
