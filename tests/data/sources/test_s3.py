"""Sources in S3, against an S3 server of this process."""

import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import boto3
import pandas as pd
import pytest
import requests
from boto3.s3.transfer import TransferConfig
from kaggle_server import mirror_zip, noise_png, some_names

from ml.core.errors import BreakhisError, ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store, digest
from ml.data.sources import SourceSpec, fetch_source
from ml.data.sources.spec import S3_KEY_VARIABLES

pytestmark = pytest.mark.integration


@pytest.fixture
def bucket(s3_endpoint: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bucket with two images and a text below images/; the source's key is in the environment."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in S3_KEY_VARIABLES:
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


@dataclass
class Way:
    """The way to the S3 server: what came along it, and what becomes of what comes next."""

    url: str = ""
    cut: list[int] = field(default_factory=list)
    """The connection breaks after so many bytes of the body of the n-th GET of an object."""
    answer: tuple[int, bytes] | None = None
    """Every request is answered with this, and does not reach the server."""
    before_get: Callable[[], Any] | None = None
    """Called once, before the next GET of an object."""
    gets: list[tuple[str, str | None]] = field(default_factory=list)
    """The objects that were asked for, and their ranges."""
    listings: int = 0


@pytest.fixture
def way(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Way()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, _, key = urlsplit(self.path).path.lstrip("/").partition("/")
            cut = None
            if self.command == "GET" and key:
                made.gets.append((key, self.headers["Range"]))
                cut = made.cut.pop(0) if made.cut else None
                if made.before_get:
                    act, made.before_get = made.before_get, None
                    act()
            elif self.command == "GET":
                made.listings += 1
            if made.answer:
                status, headers, data = made.answer[0], [("Content-Type", "application/xml")], made.answer[1]
            else:
                server = HTTPConnection(urlsplit(s3_endpoint).netloc)
                server.request(self.command, self.path, headers=dict(self.headers))
                response = server.getresponse()
                status, headers, data = response.status, response.getheaders(), response.read()
                server.close()
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[:cut])
            self.close_connection = cut is not None

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up in the middle is no news."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def left_in(settings: Settings) -> list[str]:
    return [path.name for path in (settings.cache / "s3").rglob("*") if path.is_file() and path.name != "lock"]


def big_zip(seed: str, megabytes: int = 11) -> bytes:
    """Noise does not shrink: an archive of two parts of a multipart upload, and a bit."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(megabytes):
            archive.writestr(f"{number}.png", noise_png(f"{seed}-{number}", side=592))
    return packed.getvalue()


def test_images_below_a_prefix(source: Any, bucket: Any, store: Store, settings: Settings, capsys: Any) -> None:
    spec = source(prefix="images/")
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
    source: Any, store: Store, settings: Settings, declare: Any, tmp_path: Any
) -> None:
    there = fetch_source(source(prefix="images/"), store, settings)
    folder = tmp_path / "images"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "1.png").write_bytes(b"one")
    (folder / "2.PNG").write_bytes(b"two")
    assert fetch_source(declare(kind="directory", path=str(folder)), store, settings)["version"] == there["version"]


def test_keys_that_would_be_one_name_are_refused(source: Any, bucket: Any, store: Store, settings: Settings) -> None:
    bucket.put_object(Key="images//2.PNG", Body=b"another")
    with pytest.raises(SourceError, match=r"'images//2\.PNG' and 'images/2\.PNG' differ in slashes alone"):
        fetch_source(source(prefix="images/"), store, settings)


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
    first = fetch_source(spec, store, settings)
    assert first["files"] == images
    assert left_in(settings) == []
    assert fetch_source(spec, store, settings) == first
    assert "nothing to download" in capsys.readouterr().err


def test_a_broken_archive_leaves_nothing(source: Any, bucket: Any, store: Store, settings: Settings) -> None:
    bucket.put_object(Key="all.zip", Body=mirror_zip(some_names())[:-100])
    with pytest.raises(SourceError, match=r"not a whole zip archive .*was removed"):
        fetch_source(source(archive="all.zip"), store, settings)
    assert left_in(settings) == []
    assert store.read("refs/raw/mine.json") == (None, None)


def test_more_objects_than_a_page_of_the_listing_holds(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings, capsys: Any
) -> None:

    def put(number: int) -> None:
        bucket.put_object(Key=f"many/{number % 7}/{number:04}.png", Body=b"%d" % (number % 50))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(1_010)))
    spec = source(prefix="many/", endpoint=way.url)
    first = fetch_source(spec, store, settings)
    assert (first["files"], way.listings) == (1_010, 2)
    assert len(way.gets) == 1_010
    listing = pd.read_parquet(store.file(first["version"], "files.parquet"))
    assert listing["path"].tolist() == sorted(f"{number % 7}/{number:04}.png" for number in range(1_010))
    assert listing["sha256"].nunique() == 50

    way.gets.clear()
    assert fetch_source(spec, store, settings) == first
    assert "nothing has changed there; nothing to download" in capsys.readouterr().err
    assert way.gets == []

    bucket.put_object(Key="many/3/0003.png", Body=b"changed")
    bucket.put_object(Key="many/new.png", Body=b"new")
    bucket.delete_objects(Delete={"Objects": [{"Key": "many/0/0000.png"}]})
    second = fetch_source(spec, store, settings)
    assert sorted(way.gets) == [("many/3/0003.png", None), ("many/new.png", None)]
    assert second["files"] == 1_010
    assert second["version"] != first["version"]


def test_a_fetch_of_objects_that_breaks_off_goes_on_with_those_that_are_missing(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings
) -> None:
    for number in range(60):
        bucket.put_object(Key=f"some/{number:02}.png", Body=b"%d" % number * 1000)
    spec = source(prefix="some/", endpoint=way.url)
    way.cut = [10_000_000] * 40 + [100]
    with pytest.raises(TryAgain, match="broke off"):
        fetch_source(spec, store, settings)
    assert store.read("refs/raw/mine.json") == (None, None)
    asked = {key for key, _ in way.gets}
    way.gets.clear()
    assert fetch_source(spec, store, settings)["files"] == 60
    missing = {key for key, _ in way.gets}
    assert len(missing) <= 30
    assert {f"some/{number:02}.png" for number in range(60)} == asked | missing


def test_what_was_erased_from_the_store_is_fetched_again(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings
) -> None:
    spec = source(prefix="images/", endpoint=way.url)
    fetch_source(spec, store, settings)
    for path in store.path("objects/blobs").rglob("*"):
        if path.is_file() and path.read_bytes() == b"one":
            path.unlink()
    bucket.put_object(Key="images/3.png", Body=b"three")
    way.gets.clear()
    assert fetch_source(spec, store, settings)["files"] == 3
    assert sorted(key for key, _ in way.gets) == ["images/3.png", "images/a/1.png"]


def test_an_object_that_is_replaced_meanwhile_is_not_taken_for_the_one_in_the_listing(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings
) -> None:
    spec = source(prefix="images/", endpoint=way.url)
    way.before_get = lambda: [bucket.put_object(Key=key, Body=b"new") for key in ("images/a/1.png", "images/2.PNG")]
    with pytest.raises(TryAgain, match=r"was replaced while it was being fetched; try again"):
        fetch_source(spec, store, settings)
    assert fetch_source(spec, store, settings)["bytes"] == 6


def test_an_archive_that_was_uploaded_in_parts(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings, capsys: Any
) -> None:
    data = big_zip("parts")
    limits = TransferConfig(multipart_threshold=5 * 2**20, multipart_chunksize=5 * 2**20)
    bucket.upload_fileobj(io.BytesIO(data), "all.zip", Config=limits)
    assert bucket.Object("all.zip").e_tag.endswith('-3"')  # no hash of the content
    spec = source(archive="all.zip", endpoint=way.url)
    first = fetch_source(spec, store, settings)
    assert first["files"] == 11
    assert store.meta(first["version"])["origin"]["mark"].endswith('-3"')
    assert fetch_source(spec, store, settings) == first
    assert "nothing to download" in capsys.readouterr().err
    assert way.gets == [("all.zip", None)]
    bucket.put_object(Key="all.zip", Body=data)  # the same in one part: another ETag, the same version
    assert fetch_source(spec, store, settings)["version"] == first["version"]


def test_a_download_that_breaks_off_goes_on_where_it_was(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings
) -> None:
    bucket.put_object(Key="all.zip", Body=big_zip("one", 3))
    spec = source(archive="all.zip", endpoint=way.url)
    way.cut = [1_000_000, 1_500_000]
    for _ in range(2):
        with pytest.raises(TryAgain, match=r"mine\.yaml: http.* cannot be reached or broke off"):
            fetch_source(spec, store, settings)
    assert len(left_in(settings)) == 1
    assert store.keys("objects") == []
    assert fetch_source(spec, store, settings)["files"] == 3
    begins = [int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0 for _, asked in way.gets]
    assert begins[0] == 0
    assert 900_000 < begins[1] <= 1_000_000
    assert begins[1] + 1_400_000 < begins[2] <= begins[1] + 1_500_000
    assert left_in(settings) == []


def test_a_disk_without_room(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object(Key="all.zip", Body=big_zip("one", 3))
    spec = source(archive="all.zip", endpoint=way.url)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000_000))
        with pytest.raises(ConfigError, match=r"GB free, 0\.3 GB needed; free some space, or move the store"):
            fetch_source(spec, store, settings)
    assert way.gets == []
    way.cut = [1_000_000]
    with pytest.raises(TryAgain):
        fetch_source(spec, store, settings)
    [part] = settings.cache.rglob("*.part")
    part.unlink()
    part.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"\.part: cannot be written \(No space left on device\); see to the disk"):
        fetch_source(spec, store, settings)


def test_two_states_of_an_archive_are_never_put_together(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings
) -> None:
    bucket.put_object(Key="all.zip", Body=big_zip("one", 3))
    spec = source(archive="all.zip", endpoint=way.url)
    way.cut = [1_000_000]
    with pytest.raises(TryAgain, match="broke off"):
        fetch_source(spec, store, settings)

    # Replaced between asking for its ETag and going on with it.
    way.before_get = lambda: bucket.put_object(Key="all.zip", Body=big_zip("two", 2))
    with pytest.raises(TryAgain, match=r"all\.zip was replaced while it was being fetched; try again"):
        fetch_source(spec, store, settings)

    # The next try begins anew and throws the old part away.
    assert fetch_source(spec, store, settings)["files"] == 2
    assert way.gets[-1] == ("all.zip", None)
    assert left_in(settings) == []


def test_an_archive_that_a_crash_left_is_not_downloaded_again(
    source: Any, bucket: Any, way: Way, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object(Key="all.zip", Body=mirror_zip(some_names()))
    spec = source(archive="all.zip", endpoint=way.url)
    with monkeypatch.context() as patch:
        patch.setattr(store, "put_blob", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            fetch_source(spec, store, settings)
    assert fetch_source(spec, store, settings)["files"] == 164
    assert way.gets == [("all.zip", None)]
    assert left_in(settings) == []


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
        fetch_source(source(**fields), store, settings)


def refusal(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>says why</Message></Error>".encode()


@pytest.mark.parametrize("fields", [{"prefix": "images/"}, {"archive": "all.zip"}])
@pytest.mark.parametrize(
    ("status", "code", "error", "message"),
    [
        (403, "AccessDenied", CredentialsError, "does not let this key read s3://"),
        (400, "ExpiredToken", CredentialsError, "does not let this key read s3://"),
        (400, "AuthorizationHeaderMalformed", SourceError, "'us-east-1' .*; correct 'region'"),
        (301, "PermanentRedirect", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        (405, "MethodNotAllowed", SourceError, "answers .* for s3://"),
        (429, "TooManyRequests", TryAgain, "try again later"),
        (500, "InternalError", TryAgain, "try again later"),
        (503, "SlowDown", TryAgain, "try again later"),
    ],
)
def test_what_the_server_refuses_is_told_apart(
    source: Any,
    way: Way,
    store: Store,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fields: Any,
    status: int,
    code: str,
    error: type[BreakhisError],
    message: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # boto3 tries again a few times, waiting longer and longer
    way.answer = (status, refusal(code))
    if status == 400 and "archive" in fields:  # the answer to a HEAD has no body that could tell them apart
        error, message = SourceError, "answers 400 for s3://"
    with pytest.raises(error, match=rf"mine\.yaml: http.*{message}") as caught:
        fetch_source(source(endpoint=way.url, **fields), store, settings)
    assert type(caught.value) is error
    assert store.keys("objects") == []


@pytest.mark.parametrize(
    ("fields", "data", "error", "message"),
    [
        ({"prefix": "images/"}, b"<a/>", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        ({"archive": "all.zip"}, b"<a/>", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        ({"archive": "all.zip"}, b"{}", SourceError, "does not answer as an S3 server; correct 'endpoint'"),
        # boto3 takes it for a fault of an S3 server.
        ({"prefix": "images/"}, b"<html><p>Hello<br>", TryAgain, "see whether 'endpoint' is an S3 server"),
    ],
)
def test_a_web_server_of_another_kind_is_told_from_s3(
    source: Any,
    way: Way,
    store: Store,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    fields: Any,
    data: bytes,
    error: type[BreakhisError],
    message: str,
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    way.answer = (200, data)
    with pytest.raises(error, match=message):
        fetch_source(source(endpoint=way.url, **fields), store, settings)


@pytest.fixture
def guarded(s3_endpoint: str) -> Iterator[Callable[[str], tuple[str, str]]]:
    """The server checks keys from now on. Call it with an action for the key and secret of a user who may do that."""
    iam = boto3.client(
        "iam", endpoint_url=s3_endpoint, aws_access_key_id="x", aws_secret_access_key="x", region_name="us-east-1"
    )

    def user(action: str) -> tuple[str, str]:
        iam.create_user(UserName="fetcher")
        statement = {"Effect": "Allow", "Action": action, "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName="fetcher", PolicyName="may", PolicyDocument=policy)
        key = iam.create_access_key(UserName="fetcher")["AccessKey"]
        requests.post(f"{s3_endpoint}/moto-api/reset-auth", data=b"0", timeout=10)
        return key["AccessKeyId"], key["SecretAccessKey"]

    yield user
    requests.post(f"{s3_endpoint}/moto-api/reset-auth", data=b"inf", timeout=10)
    for key in iam.list_access_keys(UserName="fetcher")["AccessKeyMetadata"]:
        iam.delete_access_key(UserName="fetcher", AccessKeyId=key["AccessKeyId"])
    iam.delete_user_policy(UserName="fetcher", PolicyName="may")
    iam.delete_user(UserName="fetcher")


def test_a_server_that_checks_keys(
    source: Any, guarded: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = guarded("s3:*")

    def use(*pair: str) -> None:
        for name, value in zip(S3_KEY_VARIABLES, pair, strict=True):
            monkeypatch.setenv(name, value)

    for pair, code in (((key, "wrong-secret"), "SignatureDoesNotMatch"), (("AKIAUNKNOWN", secret), "InvalidAccessKey")):
        use(*pair)
        with pytest.raises(CredentialsError, match=rf"does not let this key read s3://.* \({code}") as error:
            fetch_source(source(prefix="images/"), store, settings)
        assert pair[1] not in str(error.value)
    use(key, secret)
    assert fetch_source(source(prefix="images/"), store, settings)["files"] == 2


def test_a_key_that_may_list_and_not_read(
    source: Any, guarded: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(S3_KEY_VARIABLES, guarded("s3:ListBucket"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(CredentialsError, match=r"does not let this key read s3://.*/images/.* \(AccessDenied"):
        fetch_source(source(prefix="images/"), store, settings)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({S3_KEY_VARIABLES[0]: "half"}, "no key for s3://"),
        ({"AWS_PROFILE": "nobody"}, r"no key for s3://.*\(nobody\)"),
        ({S3_KEY_VARIABLES[0]: "a key\n", S3_KEY_VARIABLES[1]: "secret"}, "the key for s3://.* has a blank"),
        ({S3_KEY_VARIABLES[0]: "key", S3_KEY_VARIABLES[1]: "se cret"}, "the key for s3://.* has a blank"),
    ],
)
def test_credentials_that_cannot_be_right(
    source: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, variables: Any, message: str
) -> None:
    for name in S3_KEY_VARIABLES:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CredentialsError, match=rf"mine\.yaml: {message}"):
        fetch_source(source(), store, settings)


def test_no_key(source: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in S3_KEY_VARIABLES:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(CredentialsError, match=r"no key for s3://.* set BREAKHIS_SOURCE_KEY and"):
        fetch_source(source(), store, settings)


def test_a_prefix_and_an_archive_are_one_too_many(source: Any) -> None:
    with pytest.raises(ConfigError, match="'prefix' and 'archive' are both given"):
        source(prefix="images/", archive="all.zip")
