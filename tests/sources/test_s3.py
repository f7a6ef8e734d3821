"""Sources in S3, against an S3 server of this process."""

import io
import tarfile
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from kaggle_server import mirror_zip, some_names

from ml.errors import ConfigError, CredentialsError, SourceError, TryAgain
from ml.settings import Settings
from ml.sources import SourceSpec, fetch
from ml.sources.spec import KEY_VARIABLES
from ml.store import Store, digest

pytestmark = pytest.mark.integration


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with two images and a text below images/; the source's key is in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in KEY_VARIABLES:
        monkeypatch.setenv(name, "source")
    name = f"bucket-{digest(str(tmp_path))[:20]}"
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )
    client.create_bucket(Bucket=name)
    made = boto3.resource(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    ).Bucket(name)
    for key, data in {"images/": b"", "images/a/1.png": b"one", "images/2.PNG": b"two", "images/t.txt": b"t"}.items():
        made.put_object(Key=key, Body=data)
    return made


@pytest.fixture
def source(declare: Callable[..., SourceSpec], bucket: Any, s3_endpoint: str) -> Callable[..., SourceSpec]:
    return lambda **fields: declare(kind="s3", **{"bucket": bucket.name, "endpoint": s3_endpoint, **fields})


def test_images_below_a_prefix(source: Any, bucket: Any, store: Store, settings: Settings, capsys: Any) -> None:
    spec = source(prefix="images/")
    first = fetch(spec, store, settings)
    assert (first["files"], first["bytes"], first["skipped"]) == (2, 6, 1)
    assert "nothing to download" not in capsys.readouterr().err
    assert fetch(spec, store, settings) == first
    assert "nothing has changed there; nothing to download" in capsys.readouterr().err
    bucket.put_object(Key="images/3.png", Body=b"three")
    second = fetch(spec, store, settings)
    assert second["files"] == 3
    assert second["version"] != first["version"]


def test_the_same_bytes_are_the_same_version_from_wherever(
    source: Any, store: Store, settings: Settings, declare: Any, tmp_path: Any
) -> None:
    there = fetch(source(prefix="images/"), store, settings)
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(b"one")
    (folder / "2.PNG").write_bytes(b"two")
    assert fetch(declare(kind="directory", path=str(folder)), store, settings)["version"] == there["version"]


def test_keys_that_would_be_one_name_are_refused(source: Any, bucket: Any, store: Store, settings: Settings) -> None:
    bucket.put_object(Key="images//2.PNG", Body=b"another")
    with pytest.raises(SourceError, match=r"'images//2\.PNG' and 'images/2\.PNG' differ in slashes alone"):
        fetch(source(prefix="images/"), store, settings)


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive(source: Any, bucket: Any, store: Store, settings: Settings, kind: str, capsys: Any) -> None:
    if kind == "zip":
        data, images = mirror_zip(some_names()), 164
    else:
        packed, images = io.BytesIO(), 1
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            entry = tarfile.TarInfo("x/1.png")
            entry.size = 3
            tar.addfile(entry, io.BytesIO(b"one"))
        data = packed.getvalue()
    bucket.put_object(Key=f"all.{kind}", Body=data)
    spec = source(archive=f"all.{kind}")
    first = fetch(spec, store, settings)
    assert first["files"] == images
    assert not [path for path in (settings.cache / "s3").rglob("*") if path.is_file() and path.name != "lock"]
    assert fetch(spec, store, settings) == first
    assert "nothing to download" in capsys.readouterr().err


def test_a_broken_archive_leaves_nothing(source: Any, bucket: Any, store: Store, settings: Settings) -> None:
    bucket.put_object(Key="all.zip", Body=mirror_zip(some_names())[:-100])
    with pytest.raises(SourceError, match=r"not a whole zip archive .*was removed"):
        fetch(source(archive="all.zip"), store, settings)
    assert not [path for path in (settings.cache / "s3").rglob("*") if path.is_file() and path.name != "lock"]
    assert store.read("refs/raw/mine.json") == (None, None)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"bucket": "no-such-bucket"}, SourceError, r"mine\.yaml: http.* has no s3://no-such-bucket/ \(NoSuchBucket\)"),
        ({"archive": "no.zip"}, SourceError, r"has no s3://.*/no\.zip"),
        ({"prefix": "elsewhere/"}, SourceError, "no image files below"),
        ({"endpoint": "http://127.0.0.1:9"}, TryAgain, "cannot be reached"),
    ],
)
def test_what_is_not_there(
    source: Any, store: Store, settings: Settings, fields: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fetch(source(**fields), store, settings)


def test_no_key(source: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(CredentialsError, match=r"no key for s3://.* set BREAKHIS_SOURCE_KEY and"):
        fetch(source(), store, settings)


def test_a_prefix_and_an_archive_are_one_too_many(source: Any) -> None:
    with pytest.raises(ConfigError, match="'prefix' and 'archive' are both given"):
        source(prefix="images/", archive="all.zip")
