"""The sources that the documentation shows: each can be read, and gives what it says it gives."""

import hashlib
import io
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pandas as pd
import pytest
import requests

from ml.core.settings import PROJECT, Settings
from ml.core.store import Store
from ml.data.manifest import make_manifest, read_manifest
from ml.data.source_versions import publish_manifest
from ml.data.sources import SOURCE_KINDS, S3Source, SourceSpec, fetch_source, load_source
from ml.data.sources.spec import S3_KEY_VARIABLES
from tests.helpers.made_up import name, png, write_tree

EXAMPLES = PROJECT / "docs" / "examples" / "sources"
FILES = sorted(EXAMPLES.glob("*.yaml"))
IMAGES = {f"2026/{name('DC', f'14-{k}')}": png(k) for k in range(1, 6)}


@pytest.fixture
def use(settings: Settings) -> Callable[..., SourceSpec]:
    """Copy an example to the sources as its reader does, with something of it replaced."""

    def copied(example: str, **changed: str) -> SourceSpec:
        folder = settings.conf / "sources"
        text = (EXAMPLES / f"{example}.yaml").read_text()
        for key, value in changed.items():
            text, count = re.subn(rf"(?m)^{key}: \S+", f"{key}: {value}", text)
            assert count == 1
        (folder / f"{example}.yaml").write_text(text)
        if (EXAMPLES / example).is_dir():
            shutil.copytree(EXAMPLES / example, folder / example)
        return load_source(example, settings.conf)

    return copied


def ingested(spec: SourceSpec, store: Store, settings: Settings) -> pd.DataFrame:
    """The rows that are published."""
    made = make_manifest(spec, store, 0, fetch_source(spec, store, settings)["version"])
    assert made["quarantined"] == {}
    assert publish_manifest(made["manifest"], store)["changed"]
    return read_manifest(made["manifest"], store)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_can_be_read_and_is_linked(file: Path, tmp_path: Path) -> None:
    spec = load_source(file, tmp_path)
    assert spec.description
    assert f"(examples/sources/{file.name})" in (PROJECT / "docs" / "sources.md").read_text()


def test_there_is_one_of_each_kind_that_takes_explaining() -> None:
    kinds = {load_source(file, PROJECT).kind for file in FILES}
    assert kinds == SOURCE_KINDS.keys() - {"demo", "kaggle"}  # those are shipped


def test_the_table(use: Any, store: Store, settings: Settings) -> None:
    spec = use("clinic-table")
    table = pd.read_csv(EXAMPLES / "clinic-table" / "cases.csv")
    for k, image in enumerate(table["Image"]):
        write_tree(spec.path / "scans", {Path(image).name: png(k)})
    rows = ingested(spec, store, settings)
    assert len(rows) == len(table) == 8
    assert rows["patient"].tolist()[:4] == ["clinic-table:4711"] * 3 + ["clinic-table:4712"]
    assert rows["slide"].nunique() == table["SlideNo"].nunique() == 5
    assert rows["subtype"].tolist() == ["DC", "DC", "DC", "F", "F", "LC", "LC", "A"]
    assert rows["magnification"].tolist() == [20, 40, 20, 20, 40, 20, 40, 20]


@pytest.mark.integration
def test_the_bucket(
    use: Any, store: Store, settings: Settings, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in S3_KEY_VARIABLES:
        monkeypatch.setenv(variable, "source")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    spec = use("clinic-s3", endpoint=s3_endpoint)
    assert isinstance(spec, S3Source)
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name=spec.region
    )
    client.create_bucket(Bucket=spec.bucket)
    client.put_object(Bucket=spec.bucket, Key="elsewhere/1.png", Body=b"of no concern")
    for path, data in IMAGES.items():
        client.put_object(Bucket=spec.bucket, Key=f"breakhis/{path}", Body=data)
    assert set(ingested(spec, store, settings)["path"]) == set(IMAGES)


@pytest.mark.integration
def test_the_archive(
    use: Any, store: Store, settings: Settings, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, data in IMAGES.items():
            archive.writestr(path, data)
    data = packed.getvalue()
    # An S3 server is a web server, too, of what everybody may read.
    requests.put(f"{s3_endpoint}/open-data", timeout=10).raise_for_status()
    where = f"{s3_endpoint}/open-data/all.zip"
    requests.put(where, data=data, headers={"x-amz-acl": "public-read"}, timeout=10).raise_for_status()
    spec = use("clinic-archive", url=where, sha256=hashlib.sha256(data).hexdigest())
    assert set(ingested(spec, store, settings)["path"]) == set(IMAGES)
