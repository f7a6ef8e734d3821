"""A patient leaves the store, on disk and in S3, and does not come back with the next delivery."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ml.core.errors import ConfigError, DataError
from ml.core.mlflow_client import connect
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.ledger import read_ledger
from ml.data.manifest import make_manifest, read_manifest
from ml.data.source_versions import publish_manifest
from ml.data.sources import fetch_source, load_source
from ml.data.splits import look_up_sides, read_split, split_dataset
from ml.data.training_sets import assemble_dataset, load_training_set, read_dataset
from ml.images.file_facts import PictureFactsCache
from ml.images.pixel_cache import PixelCache
from ml.operation.erasure import erase_patient
from ml.training.backbone_weights import FEATURE_SIZE
from ml.training.features import FeatureCache
from tests.helpers import pictures as encoded
from tests.helpers.made_up import name, png, write_tree
from tests.helpers.old_objects import drop_checksums

pytestmark = pytest.mark.integration

PATIENT = "14-7"
CASES = {"14-7": "DC", "14-8": "DC", "14-9": "F", "14-10": "F", "14-11": "PC", "14-12": "PC"}


@pytest.fixture
def world(any_store: Store, tmp_path: Path, fresh_database: Path) -> SimpleNamespace:
    """Six cases of four images each, published, split, with pixels and features; one has a damaged file, too."""
    files = {
        f"{case}/{name(subtype, f'{case}A', 40, seq)}": png(int(case[3:]) * 10 + seq)
        for case, subtype in CASES.items()
        for seq in range(1, 5)
    }
    files[f"{PATIENT}/{name('DC', f'{PATIENT}B', 100, 1)}"] = png(999)[:800]
    folder = write_tree(tmp_path / "images", files)
    conf = tmp_path / "conf"
    write_tree(
        conf,
        {
            "sources/made.yaml": f"name: made\nkind: directory\npath: {folder}\n".encode(),
            "training_sets/set.yaml": b"name: set\nsources: [made]\nledger: set\npolicy: none\npreset: demo\n",
        },
    )
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    settings = Settings(
        home=tmp_path / "home",
        store=any_store.root,
        conf=conf,
        mlflow_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
        workers=1,
    )
    made = SimpleNamespace(store=any_store, settings=settings, conf=conf, source=load_source("made", conf))
    made.manifest = ingest(made)
    made.dataset = assemble_dataset(load_training_set("set", conf), any_store, settings)["dataset"]
    made.split = split_dataset(made.dataset, any_store)["split"]
    rows = read_dataset(made.dataset, any_store)
    PixelCache(any_store).fill(rows, 1)
    hashes = rows["pixel_sha256"].tolist()
    FeatureCache(any_store, "weights-1", "openvino").write(hashes, np.ones((len(hashes), FEATURE_SIZE), np.float32))
    made.patient_rows = rows[rows["patient"] == PATIENT]
    client = connect(settings)
    experiment = client.create_experiment("set", artifact_location=(tmp_path / "artifacts").as_uri())
    tags = {"breakhis.dataset": made.dataset, "breakhis.split": made.split}
    made.run = client.create_run(experiment, tags=tags).info.run_id
    client.create_registered_model("set-binary")
    client.create_model_version("set-binary", (tmp_path / "artifacts").as_uri(), run_id=made.run)
    client.set_registered_model_alias("set-binary", "champion", "1")
    return made


def ingest(world: SimpleNamespace) -> str:
    fetch_source(world.source, world.store, world.settings)
    manifest: str = make_manifest(world.source, world.store, 0)["manifest"]
    assert publish_manifest(manifest, world.store)["changed"]
    return manifest


def erase(world: SimpleNamespace) -> dict[str, object]:
    return erase_patient(PATIENT, "breakhis", "request 12", world.store, world.settings)


def everything_in(store: Store) -> bytes:
    """The bytes of all that lies in the store, as far as it is no list of names."""
    folder = store.path("")
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join(path.read_bytes() for path in files)


def test_nothing_of_the_patient_is_left(world: SimpleNamespace) -> None:
    store, hashes = world.store, set(world.patient_rows["pixel_sha256"])
    side = read_split(world.split, store).sides[PATIENT]
    result = erase(world)
    assert (result["files"], result["pictures"]) == (5, 4)
    assert result["sources"] == ["made"]
    assert result["ledgers"] == ["set"]
    assert result["trainings"] == [
        {"run_id": world.run, "side": side, "model": "set-binary", "version": 1, "aliases": ["champion"]}
    ]
    for rows in (read_manifest(world.manifest, store), read_dataset(world.dataset, store)):
        assert len(rows) == 20
        assert PATIENT not in set(rows["patient"])
    assert not hashes & PixelCache(store).index().keys()
    assert not hashes & FeatureCache(store, "weights-1", "openvino").cached_hashes()
    assert not set(world.patient_rows["sha256"]) & PictureFactsCache(store).read().keys()
    assert not any(store.path(store.blob_key(sha256)).exists() for sha256 in world.patient_rows["sha256"])
    ledger, _ = read_ledger("set", store)
    assert ledger.sides[PATIENT] == side
    assert PATIENT in ledger.erased
    assert not any(h[:16].encode() in everything_in(store) for h in hashes)


def test_the_others_are_as_they_were(world: SimpleNamespace) -> None:
    store = world.store
    before = read_dataset(world.dataset, store)
    others = before[before["patient"] != PATIENT]
    kept = others["pixel_sha256"].tolist()
    pixels = {
        h: p for hashes, pictures in PixelCache(store).batches(kept, 8) for h, p in zip(hashes, pictures, strict=True)
    }
    erase(world)
    rows = read_dataset(world.dataset, store)
    pd.testing.assert_frame_equal(rows.reset_index(drop=True), others.reset_index(drop=True))
    assert set(look_up_sides(rows, read_split(world.split, store))) <= {"train", "validation", "test"}
    assert FeatureCache(store, "weights-1", "openvino").read(kept).shape == (20, FEATURE_SIZE)
    for hashes, pictures in PixelCache(store).batches(kept, 8):
        assert all((pixels[h] == p).all() for h, p in zip(hashes, pictures, strict=True))


def test_the_next_delivery_leaves_the_patient_out(world: SimpleNamespace) -> None:
    store = world.store
    erase(world)
    manifest = ingest(world)  # the source still has the images
    assert PATIENT not in set(read_manifest(manifest, store)["patient"])
    quarantine = pd.read_parquet(store.file(manifest, "quarantine.parquet"))
    assert quarantine["reason"].tolist() == ["erased"] * 5
    assert quarantine["sha256"].tolist() == [""] * 5
    fetch_source(world.source, store, world.settings)
    assert make_manifest(world.source, store, 0)["manifest"] == manifest
    assert not any(store.path(store.blob_key(sha256)).exists() for sha256 in world.patient_rows["sha256"])
    dataset = assemble_dataset(load_training_set("set", world.conf), store, world.settings)["dataset"]
    split = split_dataset(dataset, store)
    assert sum(split[side]["cases"] for side in ("train", "validation", "test")) == 5


def test_a_second_time_finishes_what_was_interrupted(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PixelCache, "remove_images", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            erase(world)
    again = erase(world)
    assert not set(world.patient_rows["pixel_sha256"]) & PixelCache(world.store).index().keys()
    assert PATIENT not in set(read_dataset(world.dataset, world.store)["patient"])
    last = erase(world)
    assert (last["pictures"], last["objects"]) == (0, 0)
    assert last["trainings"] == again["trainings"] != []


def test_a_deeper_picture_is_erased_with_what_was_made_of_it(any_store: Store, tmp_path: Path) -> None:
    """Also where a table names the patient, so that the file's own name tells nothing."""
    samples = np.random.default_rng(0).integers(0, 4096, (3, 40, 40, 3), dtype=np.uint16)
    delivered = [encoded.png(picture) for picture in samples]
    rows = ["file,patient,type,power", "a.png,1,DC,40", "b.png,1,DC,40", "c.png,2,F,40"]
    files = dict(zip(("a.png", "b.png", "c.png"), delivered, strict=True)) | {"t.csv": "\n".join(rows).encode()}
    lines = [
        "name: cam",
        "kind: directory",
        f"path: {write_tree(tmp_path / 'deep', files)}",
        "layout: table",
        "table: {file: t.csv, path: file, patient: patient, subtype: type, magnification: power}",
        "significant_bits: 12",
    ]
    write_tree(tmp_path / "conf", {"sources/cam.yaml": "\n".join(lines).encode()})
    settings = Settings(home=tmp_path / "home", store=any_store.root, conf=tmp_path / "conf", workers=1)
    source = load_source("cam", settings.conf)
    fetch_source(source, any_store, settings)
    manifest = read_manifest(make_manifest(source, any_store, 0)["manifest"], any_store)
    gone, kept = manifest[manifest["patient"] == "cam:1"], manifest[manifest["patient"] == "cam:2"]
    result = erase_patient("cam:1", "cam", "request 12", any_store, settings)
    assert (len(gone), result["files"], result["pictures"]) == (2, 4, 2)

    def is_there(sha256: str) -> bool:
        return any_store.path(any_store.blob_key(sha256)).exists()

    hashes = [hashlib.sha256(content).hexdigest() for content in delivered]
    assert [is_there(sha256) for sha256 in hashes] == [False, False, True]
    assert not any(map(is_there, gone["sha256"]))
    assert all(map(is_there, kept["sha256"]))
    assert not set(hashes[:2]) & PictureFactsCache(any_store, 12).read().keys()


def test_an_unknown_patient_is_an_error(world: SimpleNamespace) -> None:
    with pytest.raises(
        DataError, match=r"no image of a patient '14-99' in cohort 'breakhis'; cohorts with images: break"
    ):
        erase_patient("14-99", "breakhis", "why", world.store, world.settings)
    with pytest.raises(DataError, match="in cohort 'other'"):
        erase_patient(PATIENT, "other", "why", world.store, world.settings)
    for cohort in ("9" * 5_000, "../ledgers", "Break His"):
        with pytest.raises(DataError, match="is no name of a cohort, such as breakhis"):
            erase_patient(PATIENT, cohort, "why", world.store, world.settings)


@pytest.mark.parametrize("any_store", ["file"], indirect=True)
def test_the_command_asks_before_it_erases(world: SimpleNamespace) -> None:
    command = [
        sys.executable,
        "-c",
        "from ml.cli import main; main()",
        "erase",
        PATIENT,
        "--why",
        "request 12",
        "--json",
    ]
    environment = {
        "PATH": "/usr/bin:/bin",
        "BREAKHIS_HOME": str(world.settings.home),
        "BREAKHIS_STORE": world.store.root,
        "MLFLOW_TRACKING_URI": world.settings.mlflow_uri,
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    asked = subprocess.run(command, env=environment, input="n\n", capture_output=True, text=True, check=False)
    assert asked.returncode == 130
    assert len(read_manifest(world.manifest, world.store)) == 24
    done = subprocess.run([*command, "--yes"], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["files"] == 5


@pytest.mark.parametrize("any_store", ["file"], indirect=True)
def test_without_mlflow_it_says_what_to_do(world: SimpleNamespace) -> None:
    elsewhere = world.settings.model_copy(update={"mlflow_uri": "databricks-nowhere://x"})
    with pytest.raises(
        ConfigError, match=r"MLflow cannot be asked by .* cannot tell which trainings took part\. .*; call this again"
    ):
        erase_patient(PATIENT, "breakhis", "why", world.store, elsewhere)
    assert erase(world)["pictures"] == 4


# --- patients of a table, and the names that early releases gave them ------------------------------------------------

PATIENTS = pd.Series([1000, 1000, 1001, 1001, 1002, 1002])


@pytest.fixture
def clinic(tmp_path: Path, fresh_database: Path) -> SimpleNamespace:
    """A clinic whose table has numbers for patients; ``deliver`` writes it with them as they are given."""
    folder = write_tree(tmp_path / "images", {f"{k}.png": png(k) for k in range(len(PATIENTS))})
    declared = {
        **{"name": "clinic", "kind": "directory", "path": str(folder), "layout": "table"},
        "table": {"file": "t.parquet", "path": "Image", "patient": "Who", "subtype": "Dx", "magnification": "Zoom"},
    }
    write_tree(tmp_path / "conf", {"sources/clinic.yaml": json.dumps(declared).encode()})
    shutil.copy(fresh_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    settings = Settings(home=tmp_path / "home", conf=tmp_path / "conf", mlflow_uri=uri, workers=1)
    made = SimpleNamespace(store=Store((tmp_path / "store").as_uri()), settings=settings)
    made.source = load_source("clinic", tmp_path / "conf")

    def deliver(patients: "pd.Series[float]") -> tuple[str, pd.DataFrame]:
        images = [f"{k}.png" for k in range(len(patients))]
        for k in range(len(PATIENTS), len(patients)):
            (folder / images[k]).write_bytes(png(k))
        pd.DataFrame({"Image": images, "Who": patients, "Dx": "DC", "Zoom": 40}).to_parquet(folder / "t.parquet")
        fetch_source(made.source, made.store, settings)
        manifest: str = make_manifest(made.source, made.store, 0)["manifest"]
        return manifest, pd.read_parquet(made.store.file(manifest, "quarantine.parquet"))

    made.deliver = deliver
    return made


def write_as_early_release(manifest: str, store: Store) -> None:
    """Gives the patients of a manifest the names that an early release gave floating-point numbers."""
    rows = read_manifest(manifest, store)
    rows = rows.assign(patient=rows["patient"] + ".0", slide=rows["slide"] + ".0")
    rows.to_parquet(store.path(f"{store.object_key(manifest)}/manifest.parquet"))
    drop_checksums(store, manifest)


def test_an_erased_patient_stays_erased_when_numbers_become_floats(clinic: SimpleNamespace) -> None:
    first, _ = clinic.deliver(PATIENTS)
    erase_patient("clinic:1001", "clinic", "request 1", clinic.store, clinic.settings)
    second, quarantine = clinic.deliver(pd.Series([*PATIENTS, np.nan]))
    names = {"clinic:1000", "clinic:1002"}
    assert set(read_manifest(first, clinic.store)["patient"]) == names
    assert set(read_manifest(second, clinic.store)["patient"]) == names
    assert sorted(quarantine["reason"]) == ["erased", "erased", "row"]


@pytest.mark.parametrize("spelling", ['="{}"', "'{}", "{}\u200b", "\ufeff{}", '"{}"'])
def test_an_erased_patient_stays_erased_however_a_spreadsheet_disguises_the_number(
    clinic: SimpleNamespace, spelling: str
) -> None:
    clinic.deliver(PATIENTS)
    erase_patient(f"clinic:{spelling.format(1001)}", "clinic", "request 1", clinic.store, clinic.settings)
    manifest, quarantine = clinic.deliver(pd.Series([spelling.format(number) for number in PATIENTS]))
    assert set(read_manifest(manifest, clinic.store)["patient"]) == {"clinic:1000", "clinic:1002"}
    assert quarantine["reason"].tolist() == ["erased", "erased"]


@pytest.mark.parametrize("name", ["clinic:1001", "clinic:1001.0"])
def test_what_an_early_release_called_otherwise_is_erased_with_the_patient(clinic: SimpleNamespace, name: str) -> None:
    first, _ = clinic.deliver(PATIENTS)
    write_as_early_release(first, clinic.store)
    result = erase_patient(name, "clinic", "request 1", clinic.store, clinic.settings)
    assert (result["patient"], result["files"], result["pictures"]) == ("clinic:1001", 2, 2)
    assert set(read_manifest(first, clinic.store)["patient"]) == {"clinic:1000.0", "clinic:1002.0"}
    second, quarantine = clinic.deliver(PATIENTS)
    assert set(read_manifest(second, clinic.store)["patient"]) == {"clinic:1000", "clinic:1002"}
    assert quarantine["reason"].tolist() == ["erased", "erased"]


def test_who_was_erased_under_an_early_name_does_not_come_back(clinic: SimpleNamespace) -> None:
    entry = {"why": "request 1", "when": "2026-01-01T00:00:00+00:00", "datasets": [], "slides": []}
    clinic.store.put_json("refs/erased/clinic.json", {"clinic:1001.0": entry})
    manifest, quarantine = clinic.deliver(PATIENTS)
    assert set(read_manifest(manifest, clinic.store)["patient"]) == {"clinic:1000", "clinic:1002"}
    assert quarantine["reason"].tolist() == ["erased", "erased"]
    erase_patient("clinic:1001", "clinic", "again", clinic.store, clinic.settings)
    erased, _ = clinic.store.read("refs/erased/clinic.json")
    assert erased
    assert erased.keys() == {"clinic:1001.0"}
