import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from filelock import FileLock
from kaggle_server import KEY, MIRROR, TOKEN, USER, KaggleServer, mirror_zip, some_names

from ml.core.errors import BreakhisError, ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.settings import Settings
from ml.core.store import Store
from ml.data.sources import SourceSpec, downloads, fetch_source, kaggle
from ml.data.sources.kaggle_login import find_credentials

Declare = Callable[..., SourceSpec]
ZIP = mirror_zip(some_names())
OTHER_ZIP = mirror_zip(some_names()[:40])
BIG_ZIP = mirror_zip(some_names(), side=80)  # the package writes a megabyte at a time


@pytest.fixture
def cache(settings: Settings) -> Path:
    return settings.cache / "kaggle" / MIRROR.replace("/", "__")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package waits 2, 4, … 32 seconds between its own tries."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def spec(declare: Declare, kaggle_server: KaggleServer) -> SourceSpec:
    kaggle_server.archives[MIRROR] = [OTHER_ZIP, ZIP]
    return declare(kind="kaggle", dataset=MIRROR)


def files_in(folder: Path) -> list[str]:
    ours = {"lock", "whole.json"}
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.name not in ours)


def test_a_mirror_is_fetched(
    spec: SourceSpec,
    store: Store,
    settings: Settings,
    kaggle_server: KaggleServer,
    cache: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    result = fetch_source(spec, store, settings)
    assert (result["source"], result["kind"], result["files"], result["skipped"]) == ("mine", "kaggle", 164, 1)
    listing = pd.read_parquet(store.file(result["version"], "files.parquet"))
    assert listing["sha256"].nunique() == 81  # every picture twice, and slide 14-13412 under two names
    origin = store.meta(result["version"])["origin"]
    assert origin["dataset"] == MIRROR
    assert origin["bytes"] == len(ZIP)
    assert len(origin["archive_sha256"]) == 64
    assert files_in(cache) == []  # the archive is not kept
    assert [call.authorized for call in kaggle_server.downloads()] == [False]  # credentials stay with Kaggle
    said = capfd.readouterr()
    assert said.out == ""
    assert "outdated `kaggle` version" in said.err
    assert TOKEN not in said.err


def test_an_unchanged_data_set_is_not_downloaded_again(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fetch_source(spec, store, settings)
    capsys.readouterr()
    assert fetch_source(spec, store, settings) == first
    assert "has not changed on Kaggle; nothing to download" in capsys.readouterr().err
    kaggle_server.archives[MIRROR].append(OTHER_ZIP)
    changed = fetch_source(spec, store, settings)
    assert changed["version"] != first["version"]
    assert changed["files"] == 80


@pytest.mark.parametrize("suffix", ["/1", "/versions/1"])
def test_a_version_can_be_pinned(
    declare: Declare, store: Store, settings: Settings, kaggle_server: KaggleServer, suffix: str
) -> None:
    kaggle_server.archives[MIRROR] = [OTHER_ZIP, ZIP]
    assert fetch_source(declare(kind="kaggle", dataset=MIRROR + suffix), store, settings)["files"] == 80
    assert next(call for call in kaggle_server.calls if "Download" in call.path).body["datasetVersionNumber"] == 1


def test_username_and_key_do_as_well(
    spec: SourceSpec, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    assert fetch_source(spec, store, settings)["files"] == 164


def test_without_credentials_one_line_says_what_is_missing(
    spec: SourceSpec,
    store: Store,
    settings: Settings,
    kaggle_server: KaggleServer,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    with pytest.raises(
        CredentialsError, match=r"^.*mine\.yaml: no Kaggle credentials; make a token at https.*kaggle\.json$"
    ):
        fetch_source(spec, store, settings)
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    with pytest.raises(CredentialsError, match=r"\(KAGGLE_USERNAME alone is only half\)"):
        fetch_source(spec, store, settings)
    assert kaggle_server.calls == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("given", ["token", "key"])
def test_wrong_credentials_are_refused_without_being_shown(
    spec: SourceSpec,
    store: Store,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    given: str,
) -> None:
    if given == "token":
        monkeypatch.setenv("KAGGLE_API_TOKEN", "wrong-secret")
    else:
        monkeypatch.delenv("KAGGLE_API_TOKEN")
        monkeypatch.setenv("KAGGLE_USERNAME", USER)
        monkeypatch.setenv("KAGGLE_KEY", "wrong-secret")
    with pytest.raises(
        CredentialsError, match=r"Kaggle does not accept the credentials in KAGGLE_.*settings/api"
    ) as error:
        fetch_source(spec, store, settings)
    said = capfd.readouterr()
    assert said.out == ""
    assert "wrong-secret" not in said.err + str(error.value)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, CredentialsError, "does not accept the credentials in KAGGLE_USERNAME and KAGGLE_KEY"),
        (
            403,
            CredentialsError,
            "does not let the account of KAGGLE_USERNAME and KAGGLE_KEY download this; open https://",
        ),
        (404, SourceError, r"mine\.yaml: Kaggle has no data set or version"),
        (418, SourceError, "answered with status 418"),
        (429, TryAgain, "too many requests; try again in 7 s"),
        (500, TryAgain, r"fault of its own \(status 500\)"),
        (503, TryAgain, r"fault of its own \(status 503\)"),
    ],
)
def test_what_kaggle_refuses_is_told_apart(
    spec: SourceSpec,
    store: Store,
    settings: Settings,
    kaggle_server: KaggleServer,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    kind: type[BreakhisError],
    message: str,
) -> None:
    monkeypatch.delenv("KAGGLE_API_TOKEN")  # with a token the package asks for its owner first
    monkeypatch.setenv("KAGGLE_USERNAME", USER)
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    kaggle_server.refuse, kaggle_server.retry_after = status, "7"
    with pytest.raises(kind, match=message) as error:
        fetch_source(spec, store, settings)
    assert type(error.value) is kind
    assert store.keys("objects") == []


@pytest.mark.parametrize("status", [429, 500])
def test_trouble_while_the_token_is_looked_up(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, status: int
) -> None:
    kaggle_server.refuse = status
    with pytest.raises(TryAgain):
        fetch_source(spec, store, settings)


def test_an_unknown_data_set_is_named(
    declare: Declare, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.archives[MIRROR] = [ZIP]
    for dataset in ("nobody/nothing", f"{MIRROR}/versions/9"):
        with pytest.raises(SourceError, match=rf"mine\.yaml: Kaggle has no data set or version '{dataset}'"):
            fetch_source(declare(kind="kaggle", dataset=dataset), store, settings)


def test_no_network_is_worth_another_try(
    spec: SourceSpec, store: Store, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kagglesdk import kaggle_env

    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.PROD, "http://localhost:9")
    with pytest.raises(TryAgain, match="Kaggle cannot be reached or broke off"):
        fetch_source(spec, store, settings)


def test_a_server_that_says_nothing_is_not_waited_for_forever(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kaggle, "_SILENCE_SECONDS", 0.2)
    kaggle_server.silent_seconds = 2
    with pytest.raises(TryAgain, match="Read timed out"):
        fetch_source(spec, store, settings)


def test_a_refusal_of_the_storage_is_worth_another_try_and_its_address_stays_secret(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.storage_refuses = 403
    with pytest.raises(TryAgain, match="storage answered with status 403") as error:
        fetch_source(spec, store, settings)
    assert "Signature" not in str(error.value)


def test_a_download_that_breaks_off_goes_on_where_it_stopped(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.archives[MIRROR] = [BIG_ZIP]
    kaggle_server.cut = [2 * 2**20 + 100]
    assert fetch_source(spec, store, settings)["files"] == 164
    assert [call.range for call in kaggle_server.downloads()] == [None, f"bytes={2 * 2**20}-"]


def test_a_download_that_keeps_breaking_off_goes_on_at_the_next_fetch(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, cache: Path
) -> None:
    kaggle_server.archives[MIRROR] = [BIG_ZIP]
    kaggle_server.cut = [2**20 + 100, *[0] * 5]  # the package gives up after five more
    with pytest.raises(TryAgain, match="broke off") as error:
        fetch_source(spec, store, settings)
    assert "Signature" not in str(error.value)
    name = MIRROR.partition("/")[2]
    assert files_in(cache) == [f"{name}.zip", f"{name}.zip.kaggle-partial"]
    assert store.keys("objects") == []
    kaggle_server.calls.clear()
    assert fetch_source(spec, store, settings)["files"] == 164
    assert [call.range for call in kaggle_server.downloads()] == [None, f"bytes={2**20}-"]


def test_an_archive_that_changed_meanwhile_is_not_glued_to_the_old_one(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.archives[MIRROR] = [BIG_ZIP]
    kaggle_server.cut = [2**20 + 100, *[0] * 5]
    with pytest.raises(TryAgain):
        fetch_source(spec, store, settings)
    kaggle_server.archives[MIRROR].append(OTHER_ZIP)
    assert fetch_source(spec, store, settings)["files"] == 80


def test_a_truncated_archive_is_removed_so_that_a_retry_downloads_anew(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, cache: Path
) -> None:
    kaggle_server.archives[MIRROR] = [ZIP[:-1000]]
    with pytest.raises(
        SourceError, match=r"\.zip: not a whole zip archive .*; the download was removed, so fetching again"
    ):
        fetch_source(spec, store, settings)
    assert files_in(cache) == []
    assert store.keys("objects") == []
    kaggle_server.archives[MIRROR] = [ZIP]
    assert fetch_source(spec, store, settings)["files"] == 164


def test_a_damaged_image_in_the_archive_leaves_no_raw_version(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, cache: Path
) -> None:
    middle = len(ZIP) // 2
    kaggle_server.archives[MIRROR] = [ZIP[:middle] + b"\0" * 200 + ZIP[middle + 200 :]]
    with pytest.raises(SourceError, match="in it is damaged"):
        fetch_source(spec, store, settings)
    assert store.keys("objects/raw") == []
    assert files_in(cache) == []


def test_an_archive_without_images_is_an_error(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer
) -> None:
    kaggle_server.archives[MIRROR] = [mirror_zip([])]
    with pytest.raises(
        SourceError, match=r"no image files below waseemalastal/.* \(1 other files, such as .*leia-me\.txt\)"
    ):
        fetch_source(spec, store, settings)


def test_a_full_disk_is_noticed_before_the_download(
    spec: SourceSpec, store: Store, settings: Settings, kaggle_server: KaggleServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * len(ZIP)))
    with pytest.raises(ConfigError, match=r"GB free, 0\.3 GB needed; free some space, or move the store"):
        fetch_source(spec, store, settings)
    assert all(call.range is None for call in kaggle_server.downloads())
    assert store.keys("objects") == []


def test_places_on_one_disk_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_300_000_000))
    downloads.require_space([(tmp_path, 10**9)])
    with pytest.raises(ConfigError, match=r"1\.3 GB free, 2\.3 GB needed"):
        downloads.require_space([(tmp_path, 10**9), (tmp_path / "not" / "there" / "yet", 10**9)])


def test_a_disk_that_fills_up_meanwhile_is_named(
    spec: SourceSpec, store: Store, settings: Settings, cache: Path
) -> None:
    name = f"{MIRROR.partition('/')[2]}.zip"
    (cache / "latest" / name).mkdir(parents=True)  # as good as a full disk: writing there fails
    with pytest.raises(ConfigError, match=f"{name}: it is a folder, where a file is meant"):
        fetch_source(spec, store, settings)


def test_two_fetches_of_one_version_do_not_mix(spec: SourceSpec, store: Store, settings: Settings, cache: Path) -> None:
    (cache / "latest").mkdir(parents=True)
    with FileLock(cache / "latest" / "lock"), pytest.raises(TryAgain, match="being fetched by another process"):
        fetch_source(spec, store, settings)


def test_an_archive_left_by_a_crash_is_not_downloaded_again(
    spec: SourceSpec,
    store: Store,
    settings: Settings,
    kaggle_server: KaggleServer,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    kaggle_server.archives[MIRROR] = [BIG_ZIP]

    def crash(data: bytes) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_blob", crash)
        with pytest.raises(OSError, match="No space left"):
            fetch_source(spec, store, settings)
    assert f"{MIRROR.partition('/')[2]}.zip" in files_in(cache)
    kaggle_server.cut = [0]  # whoever reads the body now is cut off, and would have to ask twice
    assert fetch_source(spec, store, settings)["files"] == 164
    assert len(kaggle_server.downloads()) == 2
    assert files_in(cache) == []


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], None),
        ([".kaggle/access_token"], ".kaggle/access_token"),
        ([".kaggle/kaggle.json"], ".kaggle/kaggle.json"),
        ([".config/kaggle/kaggle.json"], ".config/kaggle/kaggle.json"),
        ([".kaggle/credentials.json"], ".kaggle/credentials.json"),
    ],
)
def test_where_credentials_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], found: str | None
) -> None:
    for name in [name for name in os.environ if name.startswith(("KAGGLE_", "XDG_CONFIG"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("{}")
    assert find_credentials() == (found and str(tmp_path / found))
