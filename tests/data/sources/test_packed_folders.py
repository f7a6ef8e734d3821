"""A clinic's folder with a table, packed in the ways that people pack one: all of them are the same source."""

import hashlib
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ml.core.errors import SourceError
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.manifest import make_manifest, read_manifest
from ml.data.sources import SourceSpec, fetch_source
from tests.helpers.made_up import png

NAMES = [f"{folder}/{number}.png" for folder in "ab" for number in range(1, 7)]
ROWS = [f"{name},P{name[0]}{int(name[2]) // 2},{'F' if name[0] == 'a' else 'DC'},40x" for name in NAMES]
TABLE = {"path": "Image", "patient": "PatientID", "subtype": "Diagnosis", "magnification": "Objective"}
FILES = {name: png(number) for number, name in enumerate(NAMES)}
FILES["cases.csv"] = "\n".join(["Image,PatientID,Diagnosis,Objective", *ROWS]).encode()
TWINS = {path.replace("/", "/._"): b"\0\5\x16\7" for path in NAMES}


def pack_tar(files: dict[str, bytes], form: int = tarfile.PAX_FORMAT, **headers: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=form) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = len(data), headers
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pack_tar_of_dot(files: dict[str, bytes]) -> bytes:
    """Packs as ``tar czf set.tar.gz -C folder .`` does."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name in (".", "./a", "./b"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def pack_zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in files.items():
            file.writestr(name, data)
    return buffer.getvalue()


WAYS: dict[str, Callable[[], bytes]] = {
    "the oldest tar": lambda: pack_tar(FILES, tarfile.USTAR_FORMAT),
    "a tar of .": lambda: pack_tar_of_dot(FILES),
    "a zip": lambda: pack_zip(FILES),
    "a zip with backslashes": lambda: pack_zip({name.replace("/", "\\"): data for name, data in FILES.items()}),
    "a Mac's zip": lambda: pack_zip(FILES | {f"__MACOSX/{name}": data for name, data in TWINS.items()}),
    "a Mac's tar": lambda: pack_tar(FILES | TWINS | {".DS_Store": b""}, **{"SCHILY.xattr.com.apple": "x" * 20_000}),
    "with a notebook's checkpoints": lambda: pack_zip(FILES | {"a/.ipynb_checkpoints/1-checkpoint.png": png(1)}),
}


@pytest.fixture
def deliver(declare: Callable[..., SourceSpec], settings: Settings) -> Callable[[bytes], SourceSpec]:
    """Declares a source whose archive is downloaded already."""

    def write(data: bytes, **more: Any) -> SourceSpec:
        sha256 = hashlib.sha256(data).hexdigest()
        path = settings.cache / "http" / sha256 / "archive"
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        table = {"file": "cases.csv", **TABLE}
        return declare("clinic", kind="http", url="http://clinic/set", sha256=sha256, layout="table", table=table)

    return write


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_pack_a_folder_gives_the_same_manifest(
    way: str, deliver: Callable[[bytes], SourceSpec], store: Store, settings: Settings
) -> None:
    expected = fetch_source(deliver(pack_tar(FILES, comment="the same files")), store, settings)
    spec = deliver(WAYS[way]())
    fetched = fetch_source(spec, store, settings)
    assert fetched["version"] == expected["version"]
    made = make_manifest(spec, store, 0)["manifest"]
    rows = read_manifest(made, store)
    assert list(rows["path"]) == NAMES
    assert list(rows["patient"].unique()) == [f"clinic:P{folder}{number}" for folder in "ab" for number in range(4)]
    assert pd.read_parquet(store.file(made, "quarantine.parquet")).empty


def test_what_was_left_aside_is_counted_and_told(
    deliver: Callable[[bytes], SourceSpec], store: Store, settings: Settings, capsys: Any
) -> None:
    fetched = fetch_source(deliver(WAYS["a Mac's tar"]()), store, settings)
    assert (fetched["files"], fetched["skipped"]) == (13, 13)
    assert "clinic: 13 other files left aside, such as .DS_Store, a/._1.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            {"archive_entries": 5},
            "more than the 5 files and folders allowed; leave out .* or raise BREAKHIS_ARCHIVE",
        ),
        ({"archive_size": 1}, "unpacks to more than the 1 MB allowed; pack less, or raise BREAKHIS_ARCHIVE_SIZE"),
    ],
)
@pytest.mark.parametrize("pack", [pack_tar, pack_zip])
def test_beyond_a_limit_nothing_is_stored(
    limit: dict[str, int],
    message: str,
    pack: Callable[[dict[str, bytes]], bytes],
    deliver: Callable[[bytes], SourceSpec],
    store: Store,
    settings: Settings,
) -> None:
    spec = deliver(pack(FILES | {"z.csv": bytes(1_000_001)}))
    where = r"clinic\.yaml: the archive of http://clinic/set cannot be used: "
    with pytest.raises(SourceError, match=rf"{where}.*{message}.*the download was removed"):
        fetch_source(spec, store, settings.model_copy(update=limit))
    root = Path(store.root.removeprefix("file://"))
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert not (settings.cache / "http" / spec.model_dump()["sha256"] / "archive").exists()
