import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ml.core.errors import SourceError, StoreError
from ml.core.hashes import digest
from ml.core.settings import Settings
from ml.core.store import Store
from ml.core.taxonomy import DUPLICATED_SLIDE
from ml.data.image_facts import SourceFile
from ml.data.manifest import MANIFEST_TYPES, make_manifest, read_manifest, read_ties
from ml.data.quarantine import screen_files
from ml.data.sources import fetch_source, load_source
from ml.data.sources.spec import DirectorySource
from ml.images.decoding import decode
from ml.images.file_facts import PictureFacts
from ml.images.file_facts import _decode_file as decode_file
from ml.images.pixel_formats import pixel_hash
from tests.helpers.made_up import name, png, write_tree
from tests.helpers.pictures import png as deep_png


@pytest.fixture
def store(tmp_path):
    return Store((tmp_path / "store").as_uri())


def source_of(tmp_path: Path, files: dict[str, bytes], **more):
    write_tree(tmp_path / "images", files)
    file = tmp_path / "made.yaml"
    lines = {"name": "made", "kind": "directory", "path": "./images", **more}
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return load_source(file, tmp_path)


def ingest(spec, store, tmp_path):
    fetch_source(spec, store, Settings(home=tmp_path / "home", store=store.root))
    result = make_manifest(spec, store, workers=0)
    quarantine = pd.read_parquet(store.file(result["manifest"], "quarantine.parquet"))
    return result, read_manifest(result["manifest"], store), quarantine


def test_everything_that_can_be_wrong_with_a_file_is_told(tmp_path, store):
    good = name("F", "14-1")
    spec = source_of(
        tmp_path,
        {
            f"a/{good}": png(1),
            f"b/{good}": png(1, size=(140, 92)),  # the same name again, larger
            f"c/{name('F', '14-1', 40, 2)}": png(2),
            f"c/{name('F', '14-1', 40, 3)}": png(2),  # the same pixels, the same label
            f"d/{name('DC', '14-2')}": png(4),
            f"d/{name('MC', '14-3')}": png(4),  # the same pixels, another label
            f"e/{name('DC', '14-4')}": png(5),
            f"e/{name('LC', '14-4', 100)}": png(6),  # a slide under two subtypes
            f"f/{name('PC', '14-5')}": b"no picture",
            f"f/{name('PC', '14-5', 100)}": png(7)[:900],
            "f/holiday.png": png(8),
            "f/SOB_M_F-14-9-40-001.png": png(9),  # F is benign
            f"benign/{name('DC', '14-6')}": png(10),  # in the wrong folder
        },
    )
    result, rows, quarantine = ingest(spec, store, tmp_path)
    assert rows["path"].tolist() == [f"b/{good}", f"c/{name('F', '14-1', 40, 2)}"]
    assert rows["width"].tolist() == [140, 70]
    assert result["duplicates"] == 2
    assert result["quarantined"] == {
        "conflicting_labels": 2,
        "folder": 1,
        "label": 1,
        "name": 1,
        "slide_with_two_subtypes": 2,
        "truncated": 1,
        "undecodable": 1,
    }
    by_path = quarantine.set_index("path")
    assert by_path.loc["f/holiday.png", "slide"] is None or pd.isna(by_path.loc["f/holiday.png", "slide"])
    assert "SOB_" in by_path.loc["f/holiday.png", "detail"]
    assert "14-4 stands under DC and LC" in by_path.loc[f"e/{name('DC', '14-4')}", "detail"]


def test_columns_and_types(tmp_path, store):
    spec = source_of(tmp_path, {name("F", "14-1AB"): png(1)})
    _, rows, _ = ingest(spec, store, tmp_path)
    assert list(rows.columns) == list(MANIFEST_TYPES)
    row = rows.iloc[0]
    assert (row["patient"], row["slide"], row["label"], row["width"], row["height"]) == (
        "14-1",
        "14-1AB",
        "benign",
        70,
        46,
    )
    assert row["pixel_sha256"] == pixel_hash(decode(png(1)))


def test_unchanged_files_give_the_same_manifest_without_decoding(tmp_path, store, monkeypatch):
    spec = source_of(tmp_path, {name("F", "14-1"): png(1)})
    first, _, _ = ingest(spec, store, tmp_path)
    monkeypatch.setattr("ml.data.manifest.inspect_files", None)
    assert first["decoded"] == 1
    assert ingest(spec, store, tmp_path)[0] == {**first, "decoded": 0}


def test_new_files_cost_only_their_own_decoding(tmp_path, store, monkeypatch):
    decoded = []

    def noted(file, **more):
        decoded.append(file.read())
        return decode(decoded[-1], **more)

    monkeypatch.setattr("ml.images.file_facts.decode", noted)
    files = {name("F", "14-1", 40, n): png(n) for n in range(1, 4)} | {name("F", "14-1", 40, 9): b"no picture"}
    ingest(source_of(tmp_path, files), store, tmp_path)
    assert len(decoded) == 4
    result, rows, _ = ingest(source_of(tmp_path, {name("F", "14-1", 40, 4): png(4)}), store, tmp_path)
    assert decoded[4:] == [png(4)]
    assert result["quarantined"] == {"undecodable": 1}
    assert rows["pixel_sha256"].tolist() == [pixel_hash(decode(png(n))) for n in range(1, 5)]


def test_a_slide_under_two_subtypes_where_the_source_trusts_one(tmp_path, store):
    files = {
        f"a/{name('DC', '14-4')}": png(5),
        f"b/{name('LC', '14-4')}": png(5),  # the same pixels
        f"b/{name('LC', '14-4', 100)}": png(6),
        f"b/{name('LC', '14-5')}": png(7),
    }
    result, rows, quarantine = ingest(source_of(tmp_path, files, trust="{14-4: LC}"), store, tmp_path)
    assert rows["path"].tolist() == sorted(path for path in files if path.startswith("b/"))
    assert result["quarantined"] == {"not_trusted": 1}
    assert quarantine["detail"].tolist() == ["made.yaml trusts LC for slide 14-4, and this says DC"]


def test_the_same_pixels_under_two_patients_tie_them(tmp_path, store):
    files = {name("F", "14-1A"): png(1), name("F", "14-2"): png(1), name("F", "14-1A", 40, 2): png(1)}
    result, rows, _ = ingest(source_of(tmp_path, files), store, tmp_path)
    assert (rows["patient"].tolist(), result["duplicates"]) == (["14-1"], 2)
    ties = read_ties(result["manifest"], store)
    assert ties[["patient", "slide", "kept_patient", "kept_slide"]].to_numpy().tolist() == [
        ["14-2", "14-2", "14-1", "14-1A"]
    ]


def test_a_new_tie_alone_is_a_change_of_the_content(tmp_path, store):
    before, rows, _ = ingest(source_of(tmp_path, {name("F", "14-1A"): png(1)}), store, tmp_path)
    after, again, _ = ingest(source_of(tmp_path, {name("F", "14-2"): png(1)}), store, tmp_path)
    assert again.equals(rows)
    assert store.meta(after["manifest"])["content"] != store.meta(before["manifest"])["content"]


def deep(seed: int, greatest: int = 4095) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, greatest + 1, (46, 70, 3), dtype=np.uint16)


def test_deeper_pictures_are_quarantined_or_scaled_as_the_source_says(tmp_path, store):
    files = {name("F", "14-1", 40, n): deep_png(deep(n)) for n in (1, 2)}
    files |= {name("F", "14-2"): png(1), name("F", "14-3"): deep_png(deep(3, 8000))}
    result, rows, quarantine = ingest(source_of(tmp_path, files), store, tmp_path)
    assert (len(rows), result["quarantined"]) == (1, {"mode": 3})
    assert quarantine["detail"].str.contains("'significant_bits: 12' in the source's YAML").all()

    scaled, rows, quarantine = ingest(source_of(tmp_path, files, significant_bits=12), store, tmp_path)
    assert (len(rows), scaled["quarantined"]) == (3, {"mode": 1})
    assert quarantine["detail"].str.contains("12 significant bits allow 4095 at most").all()
    assert store.meta(scaled["manifest"])["significant_bits"] == 12
    for row in rows.to_dict("records"):  # what later stages read, and any decoder
        content = store.blob(row["sha256"])
        pixels = decode(content, strict=True)
        assert pixel_hash(pixels) == row["pixel_sha256"]
        if row["patient"] == "14-1":
            assert (pixels == np.rint(deep(row["seq"]) * 255.0 / 4095).astype(np.uint8)).all()
        else:
            assert content == png(1)

    another, others, _ = ingest(source_of(tmp_path, files, significant_bits=14), store, tmp_path)
    assert len(others) == 4
    contents = {store.meta(made["manifest"])["content"] for made in (result, scaled, another)}
    assert len(contents) == 3  # each is another version


def test_the_content_is_that_of_releases_with_one_perceptual_hash(tmp_path, store):
    result, rows, _ = ingest(source_of(tmp_path, {name("F", "14-1"): png(1)}), store, tmp_path)
    (row,) = rows.to_dict("records")
    assert len(row["perceptual_hash"]) == 8 * 16
    before = {**row, "perceptual_hash": row["perceptual_hash"][:16]}
    assert store.meta(result["manifest"])["content"] == digest([[before], []])


def test_a_source_without_a_usable_image_says_why_and_leaves_no_manifest(tmp_path, store):
    spec = source_of(tmp_path, {"holiday.png": png(1), "notes.png": b"text"})
    with pytest.raises(SourceError, match=r"none of its 2 image file\(s\) can be used: {'name': 2}"):
        ingest(spec, store, tmp_path)
    assert store.keys("objects/manifest") == []


def test_a_source_that_was_never_fetched(tmp_path, store):
    with pytest.raises(SourceError, match="breakhis fetch made"):
        make_manifest(source_of(tmp_path, {name("F", "14-1"): png(1)}), store, workers=0)


def test_a_raw_version_of_another_source_is_refused(tmp_path, store):
    spec = source_of(tmp_path, {name("F", "14-1"): png(1)})
    raw = store.create("raw", 1, {"source": "other"})
    with pytest.raises(StoreError, match="of source 'other', not of 'made'"):
        make_manifest(spec, store, workers=0, raw=raw)


names = st.builds(
    lambda subtype, slide, magnification, seq: name(subtype, f"14-{slide}", magnification, seq),
    st.sampled_from(["A", "F", "DC", "LC"]),
    st.integers(1, 4),
    st.sampled_from([40, 100]),
    st.integers(1, 3),
)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), names, st.integers(0, 9)), unique_by=lambda f: f[:2]))
def test_no_file_disappears(found):
    files = [SourceFile(f"{folder}/{base}", digest(n)) for folder, base, n in found]
    pictures = {
        digest(n): PictureFacts(digest([n]), "", 7, 4) if n else PictureFacts(reason="undecodable") for n in range(10)
    }
    spec = DirectorySource(name="s", kind="directory", path="/")
    rows, quarantine, _, duplicates = screen_files(files, pictures, spec)
    assert len(rows) + len(quarantine) + duplicates == len(files)
    assert len({row["pixel_sha256"] for row in rows}) == len(rows)
    assert all(len({r["subtype"] for r in rows if r["slide"] == row["slide"]}) == 1 for row in rows)
    paths = [row["path"] for row in [*rows, *quarantine]]
    assert len(set(paths)) == len(paths)


@pytest.mark.real
def test_the_real_sample(tmp_path, store):
    file = tmp_path / "sample.yaml"
    file.write_text(f"name: sample\nkind: directory\npath: {os.environ['BREAKHIS_REAL_SAMPLE']}\n")
    result, rows, quarantine = ingest(load_source(file, tmp_path), store, tmp_path)
    assert (result["images"], result["quarantined"]) == (101, {"slide_with_two_subtypes": 4})
    assert set(quarantine["slide"]) == {DUPLICATED_SLIDE}
    assert set(quarantine["subtype"]) == {"DC", "LC"}
    sizes = rows[["slide", "width", "height"]].drop_duplicates()
    assert set(sizes[sizes["height"] == 456]["slide"]) == {"14-12465"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_what_is_not_in_colour_is_quarantined(tmp_path: Path, store: Store, mode: str) -> None:
    grey = name("F", "14-2")
    spec = source_of(tmp_path, {name("F", "14-1"): png(1), grey: png(2, mode=mode)})
    fetch_source(spec, store, Settings(store=store.root))
    made = make_manifest(spec, store, workers=0)
    assert (made["images"], made["quarantined"]) == (1, {"mode": 1})


THREE = {name("F", "14-1", 40, n): png(n) for n in range(1, 4)}
FATAL = hashlib.sha256(png(2)).hexdigest()


def kill_the_process_for_one(job):
    """Stands in for a decoder that crashes on one file."""
    if job.sha256 == FATAL:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode_file(job)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_that_kills_its_process_is_quarantined_and_tried_again_next_time(tmp_path, store, monkeypatch, workers):
    spec = source_of(tmp_path, THREE)
    fetch_source(spec, store, Settings(home=tmp_path / "home", store=store.root))
    with monkeypatch.context() as patch:
        patch.setattr("ml.images.file_facts._decode_file", kill_the_process_for_one)
        result = make_manifest(spec, store, workers)
    quarantine = pd.read_parquet(store.file(result["manifest"], "quarantine.parquet"))
    assert (result["images"], result["quarantined"]) == (2, {"crashed": 1})
    assert quarantine["path"].tolist() == [name("F", "14-1", 40, 2)]
    assert "killed the process" in quarantine["detail"].item()
    again = make_manifest(spec, store, 0)
    assert (again["images"], again["quarantined"], again["decoded"]) == (3, {}, 1)


def compute_forever_for_one(job):
    """Stands in for a decoder that does not come to an end with one file."""
    while job.sha256 == FATAL:
        pass
    return decode_file(job)


def test_a_picture_that_takes_too_long_is_quarantined_and_the_rest_goes_on(tmp_path, store, monkeypatch):
    spec = source_of(tmp_path, THREE)
    fetch_source(spec, store, Settings(home=tmp_path / "home", store=store.root))
    with monkeypatch.context() as patch:
        patch.setattr("ml.images.file_facts._decode_file", compute_forever_for_one)
        result = make_manifest(spec, store, 2, cpu_seconds=5.0)  # the first picture's includes some imports
    quarantine = pd.read_parquet(store.file(result["manifest"], "quarantine.parquet"))
    assert (result["images"], result["quarantined"]) == (2, {"time": 1})
    assert quarantine["path"].tolist() == [name("F", "14-1", 40, 2)]
    assert "takes more than 5 s of a core" in quarantine["detail"].item()
    for limit in (5.0, 4.0):  # it is remembered, whatever a faster machine would find
        assert make_manifest(spec, store, 1, cpu_seconds=limit) == {**result, "decoded": 0}
    again = make_manifest(spec, store, 1, cpu_seconds=6.0)
    assert (again["quarantined"], again["decoded"]) == ({}, 1)
    assert make_manifest(spec, store, 1, cpu_seconds=5.0)["quarantined"] == {}


def test_a_picture_that_takes_more_memory_than_allowed_is_read_once_more_is_allowed(tmp_path, store):
    spec = source_of(tmp_path, {**THREE, name("F", "14-1", 40, 9): png(9, size=(2000, 1500))})
    fetch_source(spec, store, Settings(home=tmp_path / "home", store=store.root))
    result = make_manifest(spec, store, 0, memory=16_000_000)
    assert (result["images"], result["quarantined"]) == (3, {"memory": 1})
    assert make_manifest(spec, store, 0, memory=16_000_000) == {**result, "decoded": 1}
    assert make_manifest(spec, store, 0, memory=32_000_000)["quarantined"] == {}


def test_a_disk_that_fails_is_not_taken_for_a_damaged_picture(tmp_path, store, monkeypatch):
    spec = source_of(tmp_path, THREE)
    fetch_source(spec, store, Settings(home=tmp_path / "home", store=store.root))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Store, "blob", fail)
    with pytest.raises(OSError, match="Input/output"):
        make_manifest(spec, store, 0)
