"""Answers that are not what Kaggle gives, from the stand-in: each ends in an error of ours, or does no harm."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from kaggle_server import KEY, MIRROR, TOKEN, USER, KaggleServer, mirror_zip, some_names

from ml.core.errors import ConfigError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import SourceSpec, downloads, fetch_source
from tests.helpers.dripping import lowered_limit

Declare = Callable[..., SourceSpec]
ZIP = mirror_zip(some_names())


@pytest.fixture
def cache(settings: Settings) -> Path:
    return settings.cache / "kaggle"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package waits 2, 4, … 32 seconds between its own tries."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def spec(declare: Declare, kaggle_server: KaggleServer) -> SourceSpec:
    kaggle_server.archives[MIRROR] = [ZIP]
    return declare(kind="kaggle", dataset=MIRROR)


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and path.name not in {"lock", "whole.json"}]


ODD_LENGTHS = ["", "many", "-5", "1e9"]


@pytest.mark.parametrize("announced", ODD_LENGTHS)
def test_a_length_that_is_no_number_is_no_length(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, cache: Path, announced: str
) -> None:
    kaggle_server.headers = {"Content-Length": announced}
    assert fetch_source(spec, store, settings)["files"] == 164
    assert files_in(cache) == []


def test_a_date_that_is_none_is_no_date(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.headers = {"Last-Modified": "the day before yesterday"}
    assert fetch_source(spec, store, settings)["files"] == 164


@pytest.mark.parametrize("announced", [str(len(ZIP)), *ODD_LENGTHS])
def test_what_is_larger_than_the_yaml_allows_is_not_taken(
    declare: Declare, store: Store, settings: Settings, kaggle_server: KaggleServer, cache: Path, announced: str
) -> None:
    kaggle_server.archives[MIRROR], kaggle_server.headers = [ZIP], {"Content-Length": announced}
    with pytest.raises(SourceError, match=rf"mine\.yaml: {MIRROR} .* than the {len(ZIP) - 1:,} .* may come"):
        fetch_source(declare(kind="kaggle", dataset=MIRROR, max_bytes=len(ZIP) - 1), store, settings)
    assert files_in(cache) == []
    spec = declare(kind="kaggle", dataset=MIRROR, max_bytes=len(ZIP))
    assert fetch_source(spec, store, settings)["files"] == 164


def test_an_unannounced_archive_that_does_not_fit_on_the_disk_is_not_taken(
    spec: SourceSpec,
    store: Store,
    settings: Settings,
    kaggle_server: KaggleServer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kaggle_server.headers = {"Content-Length": ""}
    free = downloads._SPARE_BYTES + len(ZIP) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(SourceError, match="sends more than"):
        fetch_source(spec, store, settings)
    assert files_in(cache) == []


def test_an_unannounced_archive_that_breaks_off_is_asked_for_anew(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.headers = {"Content-Length": ""}
    kaggle_server.cut = [1000]
    with pytest.raises(SourceError, match=r"not a whole zip archive .* the download was removed"):
        fetch_source(spec, store, settings)
    assert fetch_source(spec, store, settings)["files"] == 164


@pytest.mark.parametrize("announced", [None, ""])
def test_a_storage_that_drips_is_given_up_and_asked_for_the_rest_the_next_time(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, announced: str | None
) -> None:
    kaggle_server.headers = {} if announced is None else {"Content-Length": announced}
    kaggle_server.drips_after = 200_000
    for _ in range(2):  # the package asks for the rest in a session of its own
        with lowered_limit(), pytest.raises(TryAgain, match=rf"{MIRROR}: Kaggle sends less than 1,000 bytes a second"):
            fetch_source(spec, store, settings)
        kaggle_server.drips_after = 100
    kaggle_server.drips_after = None
    assert fetch_source(spec, store, settings)["files"] == 164
    ranges = [call.range for call in kaggle_server.downloads() if call.range]
    resumed = "bytes=196608-"  # three chunks
    assert ranges == ([resumed, resumed] if announced is None else [])


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html><title>Log in</title>", b'{"active": \xff}', b"\xff\xfe{\xd8", b"5", b"[" * 99_999]
)
def test_a_page_instead_of_kaggles_answer(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, cache: Path, page: bytes
) -> None:
    """Such as that of a network that wants somebody to log in first."""
    kaggle_server.page = page
    with pytest.raises(TryAgain, match="answered with something else than Kaggle does, such as a page") as error:
        fetch_source(spec, store, settings)
    assert TOKEN not in str(error.value)
    assert files_in(cache) == []


def test_a_page_instead_of_the_archive(
    spec: SourceSpec,
    store: Store,
    settings: Settings,
    kaggle_server: KaggleServer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("KAGGLE_API_TOKEN")  # with a token the package asks for its owner first
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    kaggle_server.page = b"<!DOCTYPE html><title>Log in</title>"
    with pytest.raises(SourceError, match=r"not a whole zip or tar archive, .* the download was removed"):
        fetch_source(spec, store, settings)
    assert files_in(cache) == []


@pytest.mark.parametrize("address", ["ftp://a/x", "file:///x", "http://a:99999/x", "http://[::1"])
def test_an_address_that_is_none_of_the_web(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, cache: Path, address: str
) -> None:
    kaggle_server.redirects_with = {"Location": f"{address}?X-Goog-Signature=planted"}
    with pytest.raises(SourceError, match="Kaggle's address leads to what is no address of the web") as error:
        fetch_source(spec, store, settings)
    assert "planted" not in str(error.value)
    assert files_in(cache) == []


def test_a_proxy_whose_address_is_none(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://me:planted2@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(ConfigError, match=r"HTTP_PROXY cannot be the address of a proxy") as error:
        fetch_source(spec, store, settings)
    assert "planted2" not in str(error.value)


def test_a_request_that_took_too_long(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.refuse, kaggle_server.retry_after = 408, "7"
    with pytest.raises(TryAgain, match=r"try again in 7 s$"):
        fetch_source(spec, store, settings)


def test_a_storage_that_leads_in_circles(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.in_circles = True
    with pytest.raises(TryAgain, match="Exceeded 30 redirects") as error:
        fetch_source(spec, store, settings)
    assert "Signature" not in str(error.value)


@pytest.mark.parametrize(("wait", "advice"), [("7", "in 7 s"), ("x" * 999, "later")])
def test_how_long_to_wait(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, wait: str, advice: str
) -> None:
    kaggle_server.refuse, kaggle_server.retry_after = 429, wait
    with pytest.raises(TryAgain, match=f"try again {advice}$"):
        fetch_source(spec, store, settings)
