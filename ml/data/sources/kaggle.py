"""Data sets from Kaggle, by the official package and with the user's own credentials.

The package authenticates when it is imported, prints to stdout, and ends the process where credentials are missing;
all of that is kept in here. Credentials are never printed, and neither are the signed addresses that Kaggle redirects
to, which are as good as credentials for a while.
"""

import contextlib
import io
import json
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from ml.core.errors import BreakhisError, ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.progress import say, track
from ml.core.store import Json, Store
from ml.data.sources.downloads import require_space, reserved
from ml.data.sources.spec import KaggleSource

TOKEN_PAGE = "https://www.kaggle.com/settings/api"  # noqa: S105 - an address, no password

_SILENCE_SECONDS = 60.0


def find_credentials() -> str | None:
    """Where the package will find credentials, in words; None where there are none. Reads no secret, asks no server."""
    environment = os.environ
    if environment.get("KAGGLE_API_TOKEN"):
        return "KAGGLE_API_TOKEN"
    if environment.get("KAGGLE_USERNAME") and environment.get("KAGGLE_KEY"):
        return "KAGGLE_USERNAME and KAGGLE_KEY"
    home = Path.home() / ".kaggle"
    legacy = environment.get("KAGGLE_CONFIG_DIR") or (
        home if home.exists() else Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"
    )
    files = (home / "access_token", home / "access_token.txt", Path(legacy) / "kaggle.json", home / "credentials.json")
    return next((str(file) for file in files if file.is_file()), None)


@contextmanager
def ask(spec: KaggleSource) -> Iterator["Remote"]:
    """Ask Kaggle for a data set's archive; what it answers can be looked at before anything is downloaded.

    Raises:
        CredentialsError: no credentials, refused ones, or terms that the account has not accepted.
        SourceError: there is no such data set or version.
        TryAgain: too many requests, a fault at Kaggle's, or no network.
    """
    found = find_credentials()
    if not found:
        half = next((name for name in ("KAGGLE_USERNAME", "KAGGLE_KEY") if os.environ.get(name)), None)
        raise CredentialsError(
            f"{spec.file}: no Kaggle credentials{f' ({half} alone is only half)' if half else ''}; make a token at "
            f"{TOKEN_PAGE} and set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or save ~/.kaggle/kaggle.json"
        )
    with contextlib.ExitStack() as stack:
        with _explained(spec, found), contextlib.redirect_stdout(sys.stderr):
            api = _authenticated(found)
            client = stack.enter_context(api.build_kaggle_client())
            session = client.http_client()._session  # the package sets no time limit on it
            session.mount("https://", _Impatient())
            session.mount("http://", _Impatient())
            response = client.datasets.dataset_api_client.download_dataset(_request(spec))
            stack.callback(response.close)
        yield Remote(spec, found, api, client, response)


@dataclass(frozen=True)
class Remote:
    """A data set's archive as Kaggle offers it now. Made by :func:`ask`."""

    spec: KaggleSource
    credentials: str
    api: Any
    client: Any
    response: requests.Response

    @property
    def size(self) -> int | None:
        """The archive's size in bytes, if Kaggle says."""
        length = self.response.headers.get("Content-Length")
        return int(length) if length else None

    @property
    def identity(self) -> Json | None:
        """What tells this archive from another version of it without reading it; None if nothing does."""
        mark = self.response.headers.get("ETag") or self.response.headers.get("Last-Modified")
        if not mark and self.spec.version is None:
            return None
        name = f"{self.spec.owner}/{self.spec.slug}"
        return {"dataset": name, "version": self.spec.version, "mark": mark, "bytes": self.size}

    @contextmanager
    def reserved(self, cache: Path) -> Iterator[Path]:
        """This data set's folder below ``cache``, one a version, held by this process alone.

        Raises:
            TryAgain: another process is fetching the same version.
        """
        folder = cache / f"{self.spec.owner}__{self.spec.slug}" / str(self.spec.version or "latest")
        with reserved(folder, self.spec.dataset):
            yield folder

    def download(self, folder: Path, store: Store) -> Path:
        """Download the archive into ``folder``, going on where an earlier try broke off; returns its path.

        Raises:
            ConfigError: not enough space for the archive and for what is in it, or the folder cannot be written.
            TryAgain: the download broke off; what came of it is kept.
        """
        path = folder / f"{self.spec.slug}.zip"
        # The package's own `download_needed` takes half of a larger, older archive for the whole of a smaller one.
        whole, identity = folder / "whole.json", json.dumps(self.identity)
        if self.identity and path.exists() and whole.exists() and whole.read_text() == identity:
            return path
        whole.unlink(missing_ok=True)
        size = self.size or 0
        have = path.stat().st_size if path.exists() else 0
        # Images do not shrink in a zip: the store will take about as much again.
        require_space([(folder, max(0, size - have)), (store.path(""), size)])
        say(f"{self.spec.name}: downloading {self.spec.dataset} from Kaggle, {size / 1e6:,.0f} MB")
        with _explained(self.spec, self.credentials), _watched(path, size), contextlib.redirect_stdout(sys.stderr):
            try:
                self.api.download_file(self.response, str(path), self.client.http_client(), quiet=True, resume=True)
            except requests.RequestException:
                raise  # is a kind of OSError, and explained by the block around
            except OSError as error:
                raise ConfigError(
                    f"{path}: cannot be written ({error.strerror}); see to the disk, fetch again"
                ) from None
            except ValueError:  # the package found another length than was announced
                path.unlink(missing_ok=True)
                raise TryAgain(f"{self.spec.dataset}: the download has not the announced length; try again") from None
        whole.write_text(identity)
        return path


def _authenticated(found: str) -> Any:
    talk = io.StringIO()  # the package prints its help to stdout, which is for results
    try:
        with contextlib.redirect_stdout(talk):
            package = _imported()
            talk.seek(0)
            talk.truncate()  # importing tries to log in too; what that said will be said again
            api = package.KaggleApi()
            api.authenticate()
    except SystemExit:
        raise CredentialsError(
            f"Kaggle does not accept the credentials in {found}; make new ones at {TOKEN_PAGE}"
        ) from None
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename}: Kaggle's package wants to make this folder and may not; set KAGGLE_CONFIG_DIR to a "
            "folder that can be written"
        ) from None
    for line in talk.getvalue().splitlines():
        say(line)  # such as a warning that others may read kaggle.json
    return api


def _imported() -> Any:
    # With VERBOSE in the environment the package prints every header, the credentials among them, and makes every
    # library log its addresses, the signed ones among them. It looks once, when it is imported.
    talkative = {name: os.environ.pop(name) for name in ("VERBOSE", "VERBOSE_OUTPUT") if name in os.environ}
    try:
        from kaggle.api import kaggle_api_extended
    finally:
        os.environ.update(talkative)
    return kaggle_api_extended


def _request(spec: KaggleSource) -> Any:
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug = spec.owner
    request.dataset_slug = spec.slug
    request.dataset_version_number = spec.version
    return request


class _Impatient(HTTPAdapter):
    """Gives up on a server that says nothing for a minute; without it a lost connection is waited for forever."""

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = kwargs.get("timeout") or _SILENCE_SECONDS
        return super().send(*args, **kwargs)


@contextmanager
def _explained(spec: KaggleSource, found: str) -> Iterator[None]:
    """Turn the package's exceptions into ours."""
    try:
        yield
    except requests.HTTPError as error:
        raise _refusal(error, spec, found) from None
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        reason = re.sub(r"\?[^\s'\")]*", "?…", str(error))  # the query of a redirect is a key to the archive
        raise TryAgain(f"{spec.dataset}: Kaggle cannot be reached or broke off ({reason}); try again later") from None


def _refusal(error: requests.HTTPError, spec: KaggleSource, found: str) -> BreakhisError:
    response = error.response
    status = response.status_code
    page = f"https://www.kaggle.com/datasets/{spec.owner}/{spec.slug}"
    wait = response.headers.get("Retry-After")
    answers = {
        401: CredentialsError(f"Kaggle does not accept the credentials in {found}; make new ones at {TOKEN_PAGE}"),
        403: CredentialsError(
            f"{spec.dataset}: Kaggle does not let the account of {found} download this; open {page}, accept its terms, "
            f"or use another account ({spec.file})"
        ),
        404: SourceError(f"{spec.file}: Kaggle has no data set or version {spec.dataset!r}; look at {page}"),
        429: TryAgain(f"Kaggle has had too many requests; try again {f'in {wait} s' if wait else 'later'}"),
    }
    if response.history:  # Kaggle sent us on; what refused is the storage behind it
        return TryAgain(f"{spec.dataset}: Kaggle's storage answered with status {status}; try again")
    if status >= 500:
        return TryAgain(f"Kaggle has a fault of its own (status {status}); try again later")
    return answers.get(status) or SourceError(f"{spec.dataset}: Kaggle answered with status {status}")


@contextmanager
def _watched(path: Path, size: int) -> Iterator[None]:
    """Show the progress of a download in megabytes, from the growth of its file.

    The package's own bar writes no line that would show in a log.
    """
    done = threading.Event()

    def megabytes() -> Iterator[None]:
        seen = 0
        finished = False
        while not finished:
            finished = done.wait(0.5)
            now = path.stat().st_size // 2**20 if path.exists() else 0
            yield from [None] * (now - seen)
            seen = max(seen, now)

    bar = threading.Thread(
        target=lambda: deque(track(megabytes(), total=size // 2**20, what="downloading, MB"), maxlen=0), daemon=True
    )
    bar.start()
    try:
        yield
    finally:
        done.set()
        bar.join()
