"""Archives at a web address, from a server of this process."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from kaggle_server import mirror_zip, some_names

from ml.core.errors import ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import SourceSpec, downloads, fetch_source
from tests.helpers.dripping import drip, lowered_limit

DATA = mirror_zip(some_names())


@dataclass
class Site:
    """What the server does next, and what it was asked."""

    url: str = ""
    status: int = 200
    cut_at: int | None = None
    data: bytes = DATA
    ignores_ranges: bool = False
    announced: str | None = None
    """The Content-Length, if not the right one; empty: none."""
    leads_to: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of the answer."""
    silent_after: int | None = None
    """The server says nothing more after so many bytes, and keeps the connection."""
    drips_after: int | None = None
    """The server sends what follows so many bytes a few at a time."""
    drips_headers: bool = False
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made, released = Site(), Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            made.ranges.append(asked)
            if made.drips_headers:
                drip(self.wfile.write, b"HTTP/1.0 200 OK\r\nX-Slow: " + b"x" * 2**16)
                return
            if made.status != 200:
                self.send_response(made.status)
                for name, value in made.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                return
            if made.leads_to:
                self.send_response(302)
                self.send_header("Location", made.leads_to)
                self.end_headers()
                return
            begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and not made.ignores_ranges else 0
            if begin and begin >= len(made.data):
                self.send_error(416)
                return
            self.send_response(206 if begin else 200)
            announced = str(len(made.data) - begin) if made.announced is None else made.announced
            if announced:
                self.send_header("Content-Length", announced)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if made.drips_after is not None:
                self.wfile.write(made.data[begin : begin + made.drips_after])
                drip(self.wfile.write, made.data[begin + made.drips_after :])
                return
            self.wfile.write(made.data[begin : made.cut_at if made.silent_after is None else made.silent_after])
            if made.silent_after is not None:
                self.wfile.flush()
                released.wait(10)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}/breakhis.zip"
    yield made
    released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def source(declare: Callable[..., SourceSpec], site: Site) -> Callable[..., SourceSpec]:
    sha256 = hashlib.sha256(DATA).hexdigest()
    return lambda **fields: declare(kind="http", **{"url": site.url, "sha256": sha256, **fields})


def test_an_archive_is_downloaded_once(source: Any, site: Site, store: Store, settings: Settings) -> None:
    first = fetch_source(source(), store, settings)
    assert first["files"] == 164
    assert fetch_source(source(), store, settings) == first
    assert site.ranges == [None]


def test_a_broken_download_goes_on_where_it_was(
    source: Any, site: Site, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_CHUNK", 1000)
    site.cut_at = 5000
    with pytest.raises(TryAgain, match="broke off"):
        fetch_source(source(), store, settings)
    site.cut_at = None
    assert fetch_source(source(), store, settings)["files"] == 164
    [_, asked] = site.ranges
    assert asked
    assert 0 < int(asked.removeprefix("bytes=").rstrip("-")) <= 5000


@pytest.mark.parametrize("before", [b"older and shorter", DATA[::-1], DATA + b"and longer"])
def test_an_archive_that_is_replaced_in_between_is_downloaded_anew(
    source: Any, site: Site, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    monkeypatch.setattr(downloads, "_CHUNK", 10)
    site.data, site.cut_at = before, len(before) - 1
    with pytest.raises(TryAgain, match="broke off"):
        fetch_source(source(), store, settings)
    site.data, site.cut_at = DATA, None
    assert fetch_source(source(), store, settings)["files"] == 164
    assert [bool(asked) for asked in site.ranges] == [False, True, False]


def test_a_disk_without_room_is_noticed_before(
    source: Any, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=200_000_000))
    with pytest.raises(ConfigError, match=r"GB free, 0\.3 GB needed; free some space, or move the store"):
        fetch_source(source(), store, settings)
    assert not list(settings.cache.rglob("*.part"))


def test_a_disk_that_is_full_is_named(source: Any, store: Store, settings: Settings) -> None:
    part = settings.cache / "http" / hashlib.sha256(DATA).hexdigest() / "archive.part"
    part.parent.mkdir(parents=True)
    part.symlink_to("/dev/full")
    with pytest.raises(ConfigError, match=r"MB free\): the disk is full; free some space, or"):
        fetch_source(source(), store, settings)


def test_a_server_without_ranges(source: Any, site: Site, store: Store, settings: Settings) -> None:
    site.ignores_ranges, site.cut_at = True, 100_000
    with pytest.raises(TryAgain, match="broke off"):
        fetch_source(source(), store, settings)
    site.cut_at = None
    assert fetch_source(source(), store, settings)["files"] == 164


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("http://127.0.0.1:9/all.zip", TryAgain, "cannot be reached or broke off"),
        ("http://*nowhere/all.zip", SourceError, r"mine\.yaml: .* is no address .*; correct 'url'"),
    ],
)
def test_nobody_there(
    source: Any, store: Store, settings: Settings, url: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fetch_source(source(url=url), store, settings)


def test_another_archive_than_was_named_is_removed(source: Any, store: Store, settings: Settings) -> None:
    with pytest.raises(SourceError, match=rf"mine\.yaml: .* has the SHA-256 {hashlib.sha256(DATA).hexdigest()}"):
        fetch_source(source(sha256="0" * 64), store, settings)
    assert not [path for path in settings.cache.rglob("*") if path.is_file() and path.name != "lock"]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        *[(401, CredentialsError), (404, SourceError), (408, TryAgain), (425, TryAgain), (429, TryAgain)],
        *[(503, TryAgain), (418, SourceError), (416, SourceError)],
    ],
)
def test_refusals(
    source: Any, site: Site, store: Store, settings: Settings, status: int, error: type[Exception]
) -> None:
    site.status = status
    with pytest.raises(error, match=str(status)):
        fetch_source(source(), store, settings)


@pytest.mark.parametrize("announced", ["", "many", "-5", "1e9", "\xb2"])
def test_a_length_that_is_no_number_is_no_length(
    source: Any, site: Site, store: Store, settings: Settings, announced: str
) -> None:
    site.announced = announced
    assert fetch_source(source(), store, settings)["files"] == 164


@pytest.mark.parametrize(("announced", "message"), [(None, "bytes, more than the"), ("", "sends more than the")])
def test_what_is_larger_than_the_yaml_allows_is_not_taken(
    source: Any, site: Site, store: Store, settings: Settings, announced: str | None, message: str
) -> None:
    site.announced = announced
    with pytest.raises(SourceError, match=rf"mine\.yaml: http.* {message} {len(DATA) - 1:,}"):
        fetch_source(source(max_bytes=len(DATA) - 1), store, settings)
    assert not list(settings.cache.rglob("*.part"))
    assert fetch_source(source(max_bytes=len(DATA)), store, settings)["files"] == 164


def test_what_does_not_fit_on_the_disk_is_not_taken(
    source: Any, site: Site, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server announces no length, so the lack of room shows only while the archive comes."""
    site.announced = ""
    free = downloads._SPARE_BYTES + len(DATA) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(SourceError, match="sends more than"):
        fetch_source(source(), store, settings)
    assert not list(settings.cache.rglob("*.part"))


def test_an_address_that_leads_in_circles(source: Any, site: Site, store: Store, settings: Settings) -> None:
    site.leads_to = site.url
    with pytest.raises(SourceError, match=r"mine\.yaml: .* leads in circles; correct 'url'"):
        fetch_source(source(), store, settings)


def test_no_password_in_the_yaml(source: Any) -> None:
    with pytest.raises(ConfigError, match="user or password in it"):
        source(url="https://me:secret@example.org/a.zip")


@pytest.mark.parametrize(("wait", "advice"), [("7", "try again in 7 s"), ("x" * 999, "later"), ("Wed, 1 Dec", "later")])
def test_how_long_to_wait(source: Any, site: Site, store: Store, settings: Settings, wait: str, advice: str) -> None:
    site.status, site.headers = 503, {"Retry-After": wait}
    with pytest.raises(TryAgain, match=f"answers 503; .*{advice}$"):
        fetch_source(source(), store, settings)


def test_a_server_that_falls_silent_is_asked_for_the_rest_the_next_time(
    source: Any, site: Site, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(downloads, "_CHUNK", 1000)
    site.silent_after = 5000
    with pytest.raises(TryAgain, match=r"broke off .*Read timed out"):
        fetch_source(source(), store, settings)
    [part] = settings.cache.rglob("*.part")
    assert part.stat().st_size == 5000
    site.silent_after = None
    assert fetch_source(source(), store, settings)["files"] == 164
    assert site.ranges == [None, "bytes=5000-"]


def test_a_server_that_drips_is_given_up_and_asked_for_the_rest_the_next_time(
    source: Any, site: Site, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "_CHUNK", 1000)
    site.drips_after = 5000
    with lowered_limit(), pytest.raises(TryAgain, match=r"^http://127.* sends less than 1,000 bytes a second, for 0 s"):
        fetch_source(source(), store, settings)
    [part] = settings.cache.rglob("*.part")
    have = part.stat().st_size
    assert 5000 <= have < 7000
    site.drips_after = None
    assert fetch_source(source(), store, settings)["files"] == 164
    assert site.ranges == [None, f"bytes={have}-"]


def test_a_server_that_drips_its_headers_is_given_up(source: Any, site: Site, store: Store, settings: Settings) -> None:
    site.drips_headers = True
    with lowered_limit(), pytest.raises(TryAgain, match=r"^http://127.* sends less than 1,000 bytes a second, for 0 s"):
        fetch_source(source(), store, settings)


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/a.zip",
        "http://[::1",
        "http://\xff",
        f"http://{'a' * 80}.org/",
        "http://:x",
    ],
)
def test_an_address_that_leads_to_what_is_none(
    source: Any, site: Site, store: Store, settings: Settings, address: str
) -> None:
    site.leads_to = address
    with pytest.raises(SourceError, match=r"mine\.yaml: http://127.* correct 'url'"):
        fetch_source(source(), store, settings)


def test_a_packing_that_is_not_the_announced_one(source: Any, site: Site, store: Store, settings: Settings) -> None:
    site.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(SourceError, match=r"mine\.yaml: http.* is not packed as its server says"):
        fetch_source(source(), store, settings)
    assert not list(settings.cache.rglob("*.part"))


def test_a_page_instead_of_an_archive(source: Any, site: Site, store: Store, settings: Settings) -> None:
    site.data = b"\n<!DOCTYPE html><title>Log in</title>"
    with pytest.raises(SourceError, match=r"mine\.yaml: what lies at .* is a web page .* its publisher names"):
        fetch_source(source(), store, settings)
    assert not list(settings.cache.rglob("*.part"))


@pytest.mark.parametrize("trouble", ["status", "leads_to", "cut", "elsewhere"])
def test_what_an_address_grants_access_by_is_not_shown(
    source: Any, site: Site, store: Store, settings: Settings, trouble: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if trouble == "status":
        site.status = 404
    elif trouble == "leads_to":
        site.leads_to = "/again?Signature=secret-2"
    elif trouble == "cut":
        site.cut_at = 5000
    else:
        site.leads_to = f"http://me:{'secret-3'}@127.0.0.1:9/a.zip?Signature=secret-2"
    with pytest.raises((SourceError, TryAgain), match=r"http://127.*/breakhis\.zip\?…") as caught:
        fetch_source(source(url=f"{site.url}?token=secret-1"), store, settings)
    assert "secret" not in str(caught.value) + capsys.readouterr().err


def test_a_server_without_a_certificate_that_is_known(
    source: Any, site: Site, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"

    def refuse(*_: Any, **__: Any) -> None:
        raise requests.exceptions.SSLError(reason)

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(ConfigError, match=r"mine\.yaml: http.* certificate .*CERTIFICATE_VERIFY_FAILED"):
        fetch_source(source(), store, settings)


@pytest.mark.parametrize("content", ["missing", "folder", "garbage"])
def test_certificates_that_are_none(
    source: Any,
    site: Site,
    store: Store,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    content: str,
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "garbage").write_bytes(bytes(range(256)))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / content))
    with pytest.raises(ConfigError, match=r"mine\.yaml: https://127.*(REQUESTS_CA_BUNDLE names|does not speak TLS)"):
        fetch_source(source(url=site.url.replace("http:", "https:")), store, settings)


def test_an_open_server_that_is_asked_by_tls(source: Any, site: Site, store: Store, settings: Settings) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: https://127.*: the server does not speak TLS there"):
        fetch_source(source(url=site.url.replace("http:", "https:")), store, settings)


def test_a_socks_proxy(
    source: Any, site: Site, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("ALL_PROXY", "socks5://me:planted2@127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"mine\.yaml: http://127.*: ALL_PROXY names a SOCKS proxy") as error:
        fetch_source(source(), store, settings)
    assert "planted2" not in str(error.value)


@pytest.mark.parametrize("mark", ["?token=", "#", ";token="])
def test_the_store_keeps_no_access_of_an_address(
    source: Any, site: Site, store: Store, settings: Settings, mark: str, tmp_path: Any
) -> None:
    spec = source(url=f"{site.url}{mark}secret-1")
    fetch_source(spec, store, settings)
    files = [path for path in (tmp_path / "store").rglob("*.json") if path.is_file()]
    assert files
    assert not [path for path in files if "secret-1" in path.read_text()]
    assert "secret-1" not in str(spec.model_dump(mode="json"))


def test_an_archive_that_cannot_be_used_is_named_without_access(
    source: Any, site: Site, store: Store, settings: Settings
) -> None:
    site.data = b"no archive"
    sha256 = hashlib.sha256(site.data).hexdigest()
    with pytest.raises(SourceError, match="cannot be used") as caught:
        fetch_source(source(url=f"{site.url}?token=secret-1{'x' * 3000}", sha256=sha256), store, settings)
    assert "secret" not in str(caught.value)
