"""Sources in S3, against an S3 server of this process."""

import io
import shutil
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from boto3.s3.transfer import TransferConfig
from kaggle_server import mirror_zip, noise_png, some_names
from s3_proxy import Proxy

from ml.core.errors import ConfigError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import fetch_source, s3

pytestmark = pytest.mark.integration


def left_in(settings: Settings) -> list[str]:
    return [path.name for path in (settings.cache / "s3").rglob("*") if path.is_file() and path.name != "lock"]


def big_zip(seed: str, megabytes: int = 11) -> bytes:
    """Noise does not shrink: an archive of two parts of a multipart upload, and a bit."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(megabytes):
            archive.writestr(f"{number}.png", noise_png(f"{seed}-{number}", side=592))
    return packed.getvalue()


def test_images_below_a_prefix(s3_source: Any, bucket: Any, store: Store, settings: Settings, capsys: Any) -> None:
    spec = s3_source(prefix="images/")
    first = fetch_source(spec, store, settings)
    assert (first["files"], first["bytes"], first["skipped"]) == (2, 6, 1)
    assert "nothing to download" not in capsys.readouterr().err
    assert fetch_source(spec, store, settings) == first
    assert "nothing has changed there; nothing to download" in capsys.readouterr().err
    bucket.put_object(Key="images/3.png", Body=b"three")
    second = fetch_source(spec, store, settings)
    assert second["files"] == 3
    assert second["version"] != first["version"]


def test_the_same_bytes_are_the_same_version_from_wherever(
    s3_source: Any, store: Store, settings: Settings, declare: Any, tmp_path: Any
) -> None:
    there = fetch_source(s3_source(prefix="images/"), store, settings)
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(b"one")
    (folder / "2.PNG").write_bytes(b"two")
    assert fetch_source(declare(kind="directory", path=str(folder)), store, settings)["version"] == there["version"]


def test_keys_that_would_be_one_name_cost_one_of_them(
    s3_source: Any, bucket: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object(Key="images//2.PNG", Body=b"another")
    bucket.put_object(Key="images/large.png", Body=b"x" * 21)
    monkeypatch.setattr(s3, "MAX_FILE_BYTES", 20)
    result = fetch_source(s3_source(prefix="images/"), store, settings)
    assert (result["files"], result["rejected"]) == (2, 2)
    twin, large = pd.read_parquet(store.file(result["version"], "rejected.parquet")).itertuples(index=False)
    assert twin[:2] == ("2.PNG", "name")
    assert "'images//2.PNG' and 'images/2.PNG' differ in slashes alone" in twin.detail
    assert large[:2] == ("large.png", "size")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive(s3_source: Any, bucket: Any, store: Store, settings: Settings, kind: str, capsys: Any) -> None:
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
    spec = s3_source(archive=f"all.{kind}")
    first = fetch_source(spec, store, settings)
    assert first["files"] == images
    assert left_in(settings) == []
    assert fetch_source(spec, store, settings) == first
    assert "nothing to download" in capsys.readouterr().err


def test_a_broken_archive_leaves_nothing(s3_source: Any, bucket: Any, store: Store, settings: Settings) -> None:
    bucket.put_object(Key="all.zip", Body=mirror_zip(some_names())[:-100])
    with pytest.raises(SourceError, match=r"not a whole zip archive .*was removed"):
        fetch_source(s3_source(archive="all.zip"), store, settings)
    assert left_in(settings) == []
    assert store.read("refs/raw/mine.json") == (None, None)


def test_more_objects_than_a_page_of_the_listing_holds(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings, capsys: Any
) -> None:

    def put(number: int) -> None:
        bucket.put_object(Key=f"many/{number % 7}/{number:04}.png", Body=b"%d" % (number % 50))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(1_010)))
    spec = s3_source(prefix="many/", endpoint=proxy.url)
    first = fetch_source(spec, store, settings)
    assert (first["files"], proxy.listings) == (1_010, 2)
    assert len(proxy.gets) == 1_010
    listing = pd.read_parquet(store.file(first["version"], "files.parquet"))
    assert listing["path"].tolist() == sorted(f"{number % 7}/{number:04}.png" for number in range(1_010))
    assert listing["sha256"].nunique() == 50

    proxy.gets.clear()
    assert fetch_source(spec, store, settings) == first
    assert "nothing has changed there; nothing to download" in capsys.readouterr().err
    assert proxy.gets == []

    bucket.put_object(Key="many/3/0003.png", Body=b"changed")
    bucket.put_object(Key="many/new.png", Body=b"new")
    bucket.delete_objects(Delete={"Objects": [{"Key": "many/0/0000.png"}]})
    second = fetch_source(spec, store, settings)
    assert sorted(proxy.gets) == [("many/3/0003.png", None), ("many/new.png", None)]
    assert second["files"] == 1_010
    assert second["version"] != first["version"]


def test_a_fetch_of_objects_that_breaks_off_goes_on_with_those_that_are_missing(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    for number in range(60):
        bucket.put_object(Key=f"some/{number:02}.png", Body=b"%d" % number * 1000)
    spec = s3_source(prefix="some/", endpoint=proxy.url)
    proxy.cut = [10_000_000] * 40 + [100]
    with pytest.raises(TryAgain, match=r"ended after \d+ of the [\d,]+ bytes that were listed; try again"):
        fetch_source(spec, store, settings)
    assert store.read("refs/raw/mine.json") == (None, None)
    asked = {key for key, _ in proxy.gets}
    proxy.gets.clear()
    assert fetch_source(spec, store, settings)["files"] == 60
    missing = {key for key, _ in proxy.gets}
    assert len(missing) <= 30
    assert {f"some/{number:02}.png" for number in range(60)} == asked | missing


def test_what_was_erased_from_the_store_is_fetched_again(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    spec = s3_source(prefix="images/", endpoint=proxy.url)
    fetch_source(spec, store, settings)
    for path in store.path("objects/blobs").rglob("*"):
        if path.is_file() and path.read_bytes() == b"one":
            path.unlink()
    bucket.put_object(Key="images/3.png", Body=b"three")
    proxy.gets.clear()
    assert fetch_source(spec, store, settings)["files"] == 3
    assert sorted(key for key, _ in proxy.gets) == ["images/3.png", "images/a/1.png"]


def test_an_object_that_is_replaced_meanwhile_is_not_taken_for_the_one_in_the_listing(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    spec = s3_source(prefix="images/", endpoint=proxy.url)
    proxy.before_get = lambda: [bucket.put_object(Key=key, Body=b"new") for key in ("images/a/1.png", "images/2.PNG")]
    with pytest.raises(TryAgain, match=r"was replaced while it was being fetched; try again"):
        fetch_source(spec, store, settings)
    assert fetch_source(spec, store, settings)["bytes"] == 6


def test_an_archive_that_was_uploaded_in_parts(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings, capsys: Any
) -> None:
    data = big_zip("parts")
    limits = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    bucket.upload_fileobj(io.BytesIO(data), "all.zip", Config=limits)
    assert bucket.Object("all.zip").e_tag.endswith('-3"')  # no hash of the content
    spec = s3_source(archive="all.zip", endpoint=proxy.url)
    first = fetch_source(spec, store, settings)
    assert first["files"] == 11
    assert store.meta(first["version"])["origin"]["mark"].endswith('-3"')
    assert fetch_source(spec, store, settings) == first
    assert "nothing to download" in capsys.readouterr().err
    assert proxy.gets == [("all.zip", None)]
    bucket.put_object(Key="all.zip", Body=data)  # the same in one part: another ETag, the same version
    assert fetch_source(spec, store, settings)["version"] == first["version"]


def test_a_download_that_breaks_off_goes_on_where_it_was(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    bucket.put_object(Key="all.zip", Body=big_zip("one", 3))
    spec = s3_source(archive="all.zip", endpoint=proxy.url)
    proxy.cut = [1_000_000, 1_500_000]
    for _ in range(2):
        with pytest.raises(TryAgain, match=r"mine\.yaml: http.* cannot be reached or broke off"):
            fetch_source(spec, store, settings)
    assert len(left_in(settings)) == 1
    assert store.keys("objects") == []
    assert fetch_source(spec, store, settings)["files"] == 3
    begins = [int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0 for _, asked in proxy.gets]
    assert begins[0] == 0
    assert 900_000 < begins[1] <= 1_000_000
    assert begins[1] + 1_400_000 < begins[2] <= begins[1] + 1_500_000
    assert left_in(settings) == []


def test_a_disk_without_room(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object(Key="all.zip", Body=big_zip("one", 3))
    spec = s3_source(archive="all.zip", endpoint=proxy.url)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000_000))
        with pytest.raises(ConfigError, match=r"GB free, 0\.3 GB needed; free some space, or move the store"):
            fetch_source(spec, store, settings)
    assert proxy.gets == []
    proxy.cut = [1_000_000]
    with pytest.raises(TryAgain):
        fetch_source(spec, store, settings)
    [part] = settings.cache.rglob("*.part")
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"MB free\): the disk is full; free some space"):
        fetch_source(spec, store, settings)


def test_two_states_of_an_archive_are_never_put_together(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings
) -> None:
    bucket.put_object(Key="all.zip", Body=big_zip("one", 3))
    spec = s3_source(archive="all.zip", endpoint=proxy.url)
    proxy.cut = [1_000_000]
    with pytest.raises(TryAgain, match="broke off"):
        fetch_source(spec, store, settings)

    # Replaced between asking for its ETag and going on with it.
    proxy.before_get = lambda: bucket.put_object(Key="all.zip", Body=big_zip("two", 2))
    with pytest.raises(TryAgain, match=r"all\.zip was replaced while it was being fetched; try again"):
        fetch_source(spec, store, settings)

    # The next try begins anew and throws the old part away.
    assert fetch_source(spec, store, settings)["files"] == 2
    assert proxy.gets[-1] == ("all.zip", None)
    assert left_in(settings) == []


def test_an_archive_that_a_crash_left_is_not_downloaded_again(
    s3_source: Any, bucket: Any, proxy: Proxy, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object(Key="all.zip", Body=mirror_zip(some_names()))
    spec = s3_source(archive="all.zip", endpoint=proxy.url)
    with monkeypatch.context() as patch:
        patch.setattr(store, "put_blob", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            fetch_source(spec, store, settings)
    assert fetch_source(spec, store, settings)["files"] == 164
    assert proxy.gets == [("all.zip", None)]
    assert left_in(settings) == []


def test_the_number_of_objects_is_limited_by_a_setting(s3_source: Any, bucket: Any, store: Store) -> None:
    for number in range(3):
        bucket.put_object(Key=f"images/{number}.txt", Body=b"")
    spec = s3_source(prefix="images/")
    many = r"mine\.yaml: s3://.*/images/: more than the 6 files and folders allowed; .* raise BREAKHIS_ARCHIVE_ENTRIES"
    with pytest.raises(SourceError, match=many):
        fetch_source(spec, store, Settings(archive_entries=6))
    assert fetch_source(spec, store, Settings(archive_entries=7))["files"] == 2
