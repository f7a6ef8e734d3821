"""Odd answers of an S3 server: listings cut short, bodies of another length than was announced, silence."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import botocore.config
import pytest
from botocore.response import StreamingBody
from kaggle_server import mirror_zip, some_names
from s3_proxy import Proxy
from urllib3.exceptions import ProtocolError

from ml.core.errors import BreakhisError, ConfigError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import downloads, fetch_source, s3
from tests.helpers.dripping import lowered_limit

pytestmark = pytest.mark.integration

ZIP = mirror_zip(some_names())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """boto3 waits longer and longer between its tries."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def archive(s3_source: Any, bucket: Any, proxy: Proxy) -> Any:
    """Declares a source that is one archive behind the proxy."""
    bucket.put_object(Key="all.zip", Body=ZIP)
    return lambda **fields: s3_source(endpoint=proxy.url, archive="all.zip", **fields)


@pytest.fixture
def images(s3_source: Any, proxy: Proxy) -> Any:
    """Declares a source of two images behind the proxy, which has a listing of them."""
    return lambda **fields: s3_source(endpoint=proxy.url, prefix="images/", **fields)


def parts_in(settings: Settings) -> list[Path]:
    return list(settings.cache.rglob("*.part"))


@pytest.mark.parametrize(
    ("pattern", "replacement", "error", "message"),
    [
        (rb"<IsTruncated>false", b"<IsTruncated>true", TryAgain, "listing breaks off .*; try again"),
        (rb"(?s)<Contents>.*", b"", TryAgain, "answers 500 for s3://.*; try again"),
        (rb"(?s)</Contents>.*", b"</Conten", TryAgain, "answers 500 for s3://.*; try again"),
        (rb"<Size>\d+</Size>", b"", SourceError, "does not answer as an S3 server"),
        (rb"<Size>\d+<", b"<Size>many<", SourceError, "does not answer as an S3 server"),
        (rb"<Size>\d+<", b"<Size>-5<", SourceError, "does not answer as an S3 server"),
        (rb"<Key>[^<]+</Key>", b"", SourceError, "does not answer as an S3 server"),
        (rb"<ETag>[^<]+</ETag>", b"", SourceError, "does not answer as an S3 server"),
    ],
)
def test_a_listing_that_is_not_whole(
    images: Any,
    proxy: Proxy,
    store: Store,
    settings: Settings,
    pattern: bytes,
    replacement: bytes,
    error: type[BreakhisError],
    message: str,
) -> None:
    proxy.alter_listing = lambda data: re.sub(pattern, replacement, data)
    with pytest.raises(error, match=rf"mine\.yaml: http.*{message}") as caught:
        fetch_source(images(), store, settings)
    assert type(caught.value) is error
    assert store.keys("objects") == []
    proxy.alter_listing = None
    assert fetch_source(images(), store, settings)["files"] == 2


@pytest.mark.parametrize("content", [b"ones", b"on", b"", b"x" * 2**20])
@pytest.mark.parametrize("length", [None, ""])
def test_an_object_of_another_length_than_was_listed(
    images: Any, proxy: Proxy, store: Store, settings: Settings, content: bytes, length: str | None
) -> None:
    proxy.alter_object = lambda _: content
    if length is not None:
        proxy.headers = {"Content-Length": length}
    with pytest.raises(TryAgain, match=r"s3://.*/images/.* (ended after \d of|sends more than) the \d bytes that were"):
        fetch_source(images(), store, settings)


@pytest.mark.parametrize("announced", ["", "many", "-5"])
def test_an_archive_without_a_length(
    archive: Any, proxy: Proxy, store: Store, settings: Settings, announced: str
) -> None:
    proxy.headers = {"Content-Length": announced}
    with pytest.raises(SourceError, match=r"mine\.yaml: http.* does not answer as an S3 server"):
        fetch_source(archive(), store, settings)


def test_a_server_that_falls_silent_is_asked_for_the_rest_the_next_time(
    archive: Any, proxy: Proxy, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = botocore.config.Config
    monkeypatch.setattr(botocore.config, "Config", lambda **given: config(read_timeout=0.3, **given))
    monkeypatch.setattr(s3, "_CHUNK", 1000)
    proxy.silent_after = 5000
    with pytest.raises(TryAgain, match=r"cannot be reached or broke off .*Read timeout"):
        fetch_source(archive(), store, settings)
    [part] = parts_in(settings)
    assert part.stat().st_size == 5000
    proxy.silent_after = None
    assert fetch_source(archive(), store, settings)["files"] == 164
    assert proxy.gets[-1] == ("all.zip", "bytes=5000-")


def test_a_server_that_drips_is_given_up_and_asked_for_the_rest_the_next_time(
    archive: Any, proxy: Proxy, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_CHUNK", 1000)
    proxy.drips_after = 5000
    message = r"mine\.yaml: http://127.* sends less than 1,000 bytes a second, .* of s3://.*/all\.zip; try again"
    with lowered_limit(), pytest.raises(TryAgain, match=message):
        fetch_source(archive(), store, settings)
    [part] = parts_in(settings)
    have = part.stat().st_size
    assert 5000 <= have < 7000
    proxy.drips_after = None
    assert fetch_source(archive(), store, settings)["files"] == 164
    assert proxy.gets[-1] == ("all.zip", f"bytes={have}-")


def test_an_object_whose_content_breaks_off_is_asked_for_another_time(
    images: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """boto3 leaves such an error as urllib3 raised it."""

    def break_off(*_: object) -> None:
        raise ProtocolError("Connection broken: InvalidChunkLength")

    monkeypatch.setattr(StreamingBody, "__enter__", break_off)
    with pytest.raises(TryAgain, match=r"broke off s3://.*Connection broken: InvalidChunkLength.*; try again"):
        fetch_source(images(), store, settings)


def test_a_server_that_drips_an_object_is_given_up(
    images: Any, proxy: Proxy, store: Store, settings: Settings, bucket: Any
) -> None:
    bucket.put_object(Key="images/large.png", Body=b"x" * 2**16)
    proxy.drips_after = 0
    with lowered_limit(), pytest.raises(TryAgain, match=r"sends less than .* of s3://.*/images/large\.png; try again"):
        fetch_source(images(), store, settings)


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(
    archive: Any, proxy: Proxy, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_CHUNK", 1000)
    proxy.cut, proxy.ignores_ranges = [5000], True
    with pytest.raises(TryAgain, match="broke off"):
        fetch_source(archive(), store, settings)
    assert parts_in(settings)
    assert fetch_source(archive(), store, settings)["files"] == 164


def test_an_archive_that_ends_early_is_gone_on_with(
    archive: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    proxy.alter_object = lambda data: data[:5000]
    with pytest.raises(TryAgain, match=r"s3://.*/all\.zip ended after 5,000 of 347,0\d\d bytes; try again"):
        fetch_source(archive(), store, settings)
    [part] = parts_in(settings)
    assert part.stat().st_size == 5000
    proxy.alter_object = None
    assert fetch_source(archive(), store, settings)["files"] == 164
    assert proxy.gets[-1] == ("all.zip", "bytes=5000-")


def test_an_archive_that_does_not_end_leaves_nothing(
    archive: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    proxy.alter_object = lambda data: data + b"more"
    with pytest.raises(SourceError, match=r"mine\.yaml: s3://.*/all\.zip sends more than the 347,0\d\d bytes"):
        fetch_source(archive(), store, settings)
    assert parts_in(settings) == []


def test_an_archive_that_is_damaged_on_the_way_leaves_nothing(
    archive: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    proxy.headers = {"x-amz-checksum-crc32": "AAAAAA=="}
    with pytest.raises(TryAgain, match=r"broke off \(Expected checksum .*; try again"):
        fetch_source(archive(), store, settings)
    assert parts_in(settings) == []


def test_what_is_larger_than_the_yaml_allows_is_not_taken(
    archive: Any, images: Any, store: Store, settings: Settings, proxy: Proxy
) -> None:
    with pytest.raises(SourceError, match=rf"mine\.yaml: s3://.*/all\.zip is .* bytes, more than the {len(ZIP) - 1:,}"):
        fetch_source(archive(max_bytes=len(ZIP) - 1), store, settings)
    with pytest.raises(SourceError, match=r"mine\.yaml: s3://.*/images/ is 6 bytes, more than the 5 "):
        fetch_source(images(max_bytes=5), store, settings)
    assert proxy.gets == []
    assert fetch_source(archive(max_bytes=len(ZIP)), store, settings)["files"] == 164
    assert fetch_source(images(max_bytes=6), store, settings)["files"] == 2


def test_images_without_room_on_the_disk_are_noticed_before(
    images: Any, store: Store, settings: Settings, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = downloads._SPARE_BYTES + 5
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(ConfigError, match=r"GB free, 0\.3 GB needed; free some space, or move the store"):
        fetch_source(images(), store, settings)
    assert proxy.gets == []
