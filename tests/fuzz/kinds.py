"""The kinds of input: what each starts from, and how it reaches the product."""

import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pandas as pd
from PIL import Image

from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.core.taxonomy import SUBTYPES
from ml.core.yaml_files import read_yaml
from ml.data.ledger import Ledger, read_ledger
from ml.data.sources.spec import DirectorySource, load_source
from ml.data.sources.tables import read_table
from ml.data.training_sets import load_training_set
from ml.images.decoding import decode
from ml.images.deep_pictures import decode_scaled
from ml.promotion.audit_log import AuditLog, find_chain_faults, read_decisions, read_unverified_records
from ml.promotion.gates import judge_evidence
from ml.promotion.policies import load_policy
from ml.promotion.review_texts import format_review_body
from ml.training.presets import Preset
from tests.fuzz import airflow_kinds, command_kinds, server_kinds, store_kinds
from tests.fuzz.airflow_kinds import ROOT, copy_conf, name_made, write_mutated
from tests.fuzz.archives import prepare_archives, use_archive
from tests.fuzz.harness import Kind
from tests.fuzz.mutation import ODD_TEXTS, dump_json, mutate_bytes, mutate_json, mutate_text
from tests.helpers.made_up import evidence

# --- YAML ---------------------------------------------------------------------------------------------------------


class _YamlFiles(NamedTuple):
    texts: list[str]
    file: Path
    conf: Path


def _prepare_yaml(folder: str, *examples: str) -> Callable[[Path], _YamlFiles]:
    def prepare(scratch: Path) -> _YamlFiles:
        conf = copy_conf(scratch)
        texts = [file.read_text() for example in examples for file in sorted(ROOT.glob(example))]
        assert texts
        texts = texts if folder == "presets" else [name_made(text) for text in texts]  # presets keep their own names
        (conf / folder).mkdir(exist_ok=True)
        return _YamlFiles(texts, conf / folder / "made.yaml", conf)

    return prepare


def _use_yaml(read: Callable[[_YamlFiles], object]) -> Callable[[_YamlFiles, random.Random], None]:
    def use(files: _YamlFiles, rng: random.Random) -> None:
        write_mutated(files.file, rng.choice(files.texts), rng)
        read(files)

    return use


# --- tables, pictures -----------------------------------------------------------------------------------

_COLUMNS = {"path": "file", "patient": "patient", "subtype": "kind", "magnification": "zoom"}
_PATHS = [f"P{number // 3}/image_{number}.png" for number in range(12)]


def _prepare_table(scratch: Path) -> tuple[pd.DataFrame, Path]:
    rows = [(path, 1001 + number // 3, SUBTYPES[number % 8], "40x") for number, path in enumerate(_PATHS)]
    return pd.DataFrame(rows, columns=list(_COLUMNS.values())), scratch


def _use_table(prepared: tuple[pd.DataFrame, Path], rng: random.Random) -> None:
    frame, scratch = prepared[0].copy(), prepared[1]
    is_parquet = rng.random() < 0.4
    table = {"file": "cases.parquet" if is_parquet else "cases.csv", **_COLUMNS}
    facts = {"kind": "directory", "path": str(scratch), "layout": "table", "table": table, "name": "made"}
    spec = DirectorySource.model_validate(facts, context={"path": scratch / "made.yaml"})
    if is_parquet:
        buffer = io.BytesIO()
        _change_columns(frame, rng).to_parquet(buffer)
        data = mutate_bytes(buffer.getvalue(), rng) if rng.random() < 0.5 else buffer.getvalue()
    else:
        data = mutate_text(frame.to_csv(index=False).replace(",", rng.choice(",,,,;\t")), rng)
    if rng.random() < 0.05:  # another format, under the name of this one
        data = rng.choice((gzip.compress(data), _zip_workbook(data), b"PAR1" + data, b"\xd0\xcf\x11\xe0" + data))
    read_table(spec, data, _PATHS)


def _zip_workbook(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("xl/workbook.xml", data)
    return buffer.getvalue()


def _change_columns(frame: pd.DataFrame, rng: random.Random) -> pd.DataFrame:
    """Returns a table with a column of another type, or with odd cells."""
    column = rng.choice(list(frame.columns))
    cells: list[Any] = list(frame[column])
    kind = rng.randrange(7)
    if kind == 0:
        cells = [str(cell).encode() for cell in cells]
    elif kind == 1:
        cells = list(np.arange(len(cells)) * 0.5)
    elif kind == 2:
        cells = [None if rng.random() < 0.3 else cell for cell in cells]
    elif kind == 3:
        cells = [[cell] for cell in cells]
    elif kind == 4:
        cells = list(pd.date_range("2024-01-02", periods=len(cells)))
    elif kind == 5:
        cells = [{"cell": cell} for cell in cells]
    else:
        texts = [text for text in ODD_TEXTS if text.isprintable()]
        cells = [rng.choice(texts) for _ in cells]
    return frame.assign(**{column: cells})


def _make_picture(format_: str, mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format_)
    return buffer.getvalue()


def _prepare_pictures(_: Path) -> list[bytes]:
    import imagecodecs
    import tifffile

    pictures = [_make_picture(name) for name in ("PNG", "JPEG", "TIFF", "BMP")]
    pictures += [_make_picture("PNG", mode) for mode in ("L", "P", "RGBA", "1", "LA")]
    pictures += [_make_picture("JPEG", mode) for mode in ("L", "CMYK")]
    pictures += [_make_picture("TIFF", mode) for mode in ("L", "CMYK", "RGBA", "F", "I;16", "LAB", "YCbCr")]
    for compression in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4"):
        buffer = io.BytesIO()
        image = Image.open(io.BytesIO(pictures[0]))
        image.convert("1" if compression == "group4" else "RGB").save(buffer, "TIFF", compression=compression)
        pictures.append(buffer.getvalue())
    deep = np.random.default_rng(1).integers(0, 4096, (24, 32, 3), dtype=np.uint16)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, deep, photometric="rgb")
    pictures += [buffer.getvalue(), imagecodecs.png_encode(deep)]
    return [*pictures, *(_make_picture(name) for name in ("GIF", "WEBP", "PPM", "ICO", "TGA"))]


def _use_picture(pictures: list[bytes], rng: random.Random) -> None:
    data = mutate_bytes(rng.choice(pictures), rng)
    if rng.random() < 0.3:
        decode_scaled(data, rng.choice((10, 12, 16)))
    else:
        decode(data, strict=rng.random() < 0.5)


# --- JSON of the store --------------------------------------------------------------------------------------------


def _prepare_store(scratch: Path) -> Store:
    return Store((scratch / "store").as_uri())


class _StoredObject(NamedTuple):
    store: Store
    oid: str
    content: Json
    file: Path


def _prepare_object(scratch: Path) -> _StoredObject:
    store = _prepare_store(scratch)
    content = evidence()
    oid = store.create("evidence", content, content)
    file = store.local(f"{store.object_key(oid)}/object.json")
    return _StoredObject(store, oid, json.loads(file.read_bytes()), file)


def _use_object(stored: _StoredObject, rng: random.Random) -> None:
    from ml.promotion.evidence import read_verified_object

    stored.file.write_bytes(dump_json(mutate_json(stored.content, rng), rng))
    read_verified_object(stored.oid, stored.store)


class _StoredLedger(NamedTuple):
    store: Store
    content: Json
    file: Path


def _prepare_ledger(scratch: Path) -> _StoredLedger:
    ledger = Ledger("made")
    for number in range(3):
        added = {f"made:{number}-{side}": side for side in ("train", "validation", "test")}
        images = {group: [f"{number}{side}"] for side, group in enumerate(added)}
        ledger = ledger.append(added, images, dataset=f"dataset-{number}", seed=1)
    store = _prepare_store(scratch)
    file = scratch / "store" / "ledgers" / "made.json"
    file.parent.mkdir(parents=True)
    return _StoredLedger(store, ledger.to_json(), file)


def _use_ledger(stored: _StoredLedger, rng: random.Random) -> None:
    stored.file.write_bytes(dump_json(mutate_json(stored.content, rng), rng))
    read_ledger("made", stored.store)


class _StoredLog(NamedTuple):
    store: Store
    log: AuditLog
    records: dict[Path, Json]


def _prepare_log(scratch: Path) -> _StoredLog:
    store = _prepare_store(scratch)
    log = AuditLog(store, Settings(home=scratch, store=store.root, audit_key="key"))
    for number in (1, 2, 3):
        log.append("approved", "made-binary", version=number, by="reviewer", reason="fine", champion=None, evidence="e")
        log.append("carried out", "made-binary", of=[2 * number - 1], champion=number, previous=None)
    files = sorted((scratch / "store" / "audit" / "log").glob("*.json"))
    return _StoredLog(store, log, {file: json.loads(file.read_bytes()) for file in files})


def _use_log(stored: _StoredLog, rng: random.Random) -> None:
    for file, record in stored.records.items():
        file.write_text(json.dumps(record))
    file = rng.choice(list(stored.records))
    file.write_bytes(dump_json(mutate_json(stored.records[file], rng), rng))
    find_chain_faults(stored.store)
    stored.log.verify({"made-binary": "6:x"})
    read_decisions(stored.store, log=stored.log)
    read_unverified_records(stored.store, "made-binary")


# --- gates and reviews --------------------------------------------------------------------------------------------


_STORABLE = [text for text in ODD_TEXTS if "\ud800" not in text]
"""Texts that JSON in the store can hold."""


def _prepare_verdict(_: Path) -> Any:
    return load_policy("demo", ROOT / "dags")


def _use_verdict(policy: Any, rng: random.Random) -> None:
    """Judges evidence with values of the right types and any content, and writes the review of it."""
    made = evidence(absent_classes=rng.sample(SUBTYPES, rng.randrange(4)))
    for name in made["metrics"]:
        made["metrics"][name] = rng.choice((0.0, 1.0, 0.5, rng.random()))
    for key in ("set", "preset", "dataset", "split", "ledger", "model"):
        if rng.random() < 0.3:
            made[key] = rng.choice(_STORABLE)
    verdict = judge_evidence(made, policy)
    bundle = {"evidence_id": "evidence-0", "evidence": made, "champion": None, "comparison": None, **verdict}
    format_review_body(bundle, "bundle-0", {rng.choice(_STORABLE): "http://127.0.0.1/"})


_SOURCE_NAMES = r"made\.yaml|'made'|http://127\.0\.0\.1"
_SOURCES = ("dags/sources/*.yaml", "docs/examples/sources/*.yaml")

KINDS = [
    Kind(
        "sources' YAML",
        _prepare_yaml("sources", *_SOURCES),
        _use_yaml(lambda files: load_source(files.file, files.conf)),
        r"made\.yaml",
    ),
    Kind(
        "training sets' YAML",
        _prepare_yaml("training_sets", "dags/training_sets/*.yaml"),
        _use_yaml(lambda files: load_training_set("made", files.conf)),
        r"made\.yaml",
    ),
    Kind(
        "policies' YAML",
        _prepare_yaml("policies", "dags/policies/*.yaml"),
        _use_yaml(lambda files: load_policy("made", files.conf)),
        r"made\.yaml",
    ),
    Kind(
        "presets' YAML",
        _prepare_yaml("presets", "ml/training/presets/*.yaml"),
        _use_yaml(lambda files: read_yaml(files.file, Preset)),
        r"made\.yaml",
    ),
    Kind("tables", _prepare_table, _use_table, r"made\.yaml|cases\.(csv|parquet)"),
    Kind("archives", prepare_archives, use_archive),
    Kind("pictures", _prepare_pictures, _use_picture),
    Kind("objects of the store", _prepare_object, _use_object, "evidence-[0-9a-f]{12}"),
    Kind("other JSON of the store", store_kinds.prepare_files, store_kinds.use_file, r"/store/|-[0-9a-f]{12}|made"),
    Kind("ledgers", _prepare_ledger, _use_ledger, r"ledgers/made\.json|'made'"),
    Kind("audit records", _prepare_log, _use_log, "audit/log"),
    Kind("evidence in gates and reviews", _prepare_verdict, _use_verdict, "made-binary"),
    Kind("tags and metrics of runs", server_kinds.prepare_run, server_kinds.use_run, "made-binary version 1"),
    Kind("answers of web archives", server_kinds.prepare_http, server_kinds.use_source, _SOURCE_NAMES),
    Kind(
        "answers of Kaggle",
        server_kinds.prepare_kaggle,
        server_kinds.use_source,
        f"{_SOURCE_NAMES}|Kaggle|waseemalastal/",
    ),
    Kind("answers of S3", server_kinds.prepare_s3, server_kinds.use_source, f"{_SOURCE_NAMES}|s3://bucket"),
    Kind(
        "sources in DAG files",
        airflow_kinds.prepare_dag_file(
            "ingest", "sources/made.yaml", "dags/sources/*.yaml", "docs/examples/sources/*.yaml"
        ),
        airflow_kinds.use_dag_file,
        r"made\.yaml",
    ),
    Kind(
        "training sets in DAG files",
        airflow_kinds.prepare_dag_file("retrain", "training_sets/made.yaml", "dags/training_sets/*.yaml"),
        airflow_kinds.use_dag_file,
        r"made\.yaml",
    ),
    Kind(
        "notifications' YAML",
        airflow_kinds.prepare_dag_file("notifications", "notifications.yaml"),
        airflow_kinds.use_dag_file,
        r"notifications\.yaml",
    ),
    Kind("confs of DAG runs", airflow_kinds.prepare_confs, airflow_kinds.use_conf, "conf|Airflow|breakhis "),
    Kind(
        "answers of Airflow",
        airflow_kinds.prepare_answers,
        airflow_kinds.use_answers,
        r"http://127\.0\.0\.1:1|Airflow (does not let|answered)|run r2? of the DAG promote",
    ),
    Kind("web pages", airflow_kinds.prepare_pages, airflow_kinds.use_page),
    Kind(
        "command lines",
        command_kinds.prepare_commands,
        command_kinds.use_command,
        refusals=(click.ClickException, click.Abort, click.exceptions.Exit),
    ),
    Kind("settings", command_kinds.prepare_settings, command_kinds.use_settings, "BREAKHIS_"),
]
