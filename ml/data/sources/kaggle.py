"""Data sets from Kaggle, downloaded by the official package with the user's own credentials.

Never printed are the signed addresses that Kaggle redirects to, which grant access for a while.
"""

import contextlib
import json
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from ml.core.disks import explain_os_error
from ml.core.errors import BreakhisError, ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.messages import cut_text, hide_access
from ml.core.progress import say, track
from ml.core.store import Json, Store
from ml.core.tls_and_proxies import explain_connection
from ml.data.sources.downloads import (
    SourceTooLarge,
    advise_when,
    count_downloaded_bytes,
    find_limit,
    is_passing,
    open_partial,
    read_length,
    require_allowed,
    require_space,
    reserve_folder,
    write_with_progress,
)
from ml.data.sources.kaggle_login import TOKEN_PAGE, find_credentials, log_in
from ml.data.sources.spec import KaggleSource
from ml.data.sources.speed_limit import TooSlow

_CHUNK = 1 << 16
_HTTP_DATE = "%a, %d %b %Y %H:%M:%S %Z"
_SILENCE_SECONDS = 60.0


@contextmanager
def request_archive(spec: KaggleSource) -> Iterator["RemoteArchive"]:
    """Requests a data set's archive from Kaggle; the answer's headers are known before anything is downloaded.

    Raises:
        CredentialsError: no credentials, refused ones, or terms that the account has not accepted.
        SourceError: there is no such data set or version.
        TryAgain: there were too many requests, Kaggle has an internal error, or the network is down or too slow.
    """
    place = find_credentials()
    if not place:
        half = next((name for name in ("KAGGLE_USERNAME", "KAGGLE_KEY") if os.environ.get(name)), None)
        raise CredentialsError(
            f"{spec.file}: no Kaggle credentials{f' ({half} alone is only half)' if half else ''}; make a token at "
            f"{TOKEN_PAGE} and set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and KAGGLE_KEY, or save ~/.kaggle/kaggle.json"
        )
    with contextlib.ExitStack() as stack:
        with _translated_errors(spec, place), contextlib.redirect_stdout(sys.stderr):
            api = log_in(place)
            client = stack.enter_context(api.build_kaggle_client())
            session = client.http_client()._session  # the package sets no time limit on it
            session.mount("https://", _TimeoutAdapter())
            session.mount("http://", _TimeoutAdapter())
            response = client.datasets.dataset_api_client.download_dataset(_build_request(spec))
            stack.callback(response.close)
            _drop_odd_headers(response)
        yield RemoteArchive(spec, place, api, client, response)


@dataclass(frozen=True)
class RemoteArchive:
    """A data set's archive as Kaggle offers it now. Made by :func:`request_archive`."""

    spec: KaggleSource
    credentials: str
    api: Any
    client: Any
    response: requests.Response

    @property
    def size(self) -> int | None:
        """The archive's size in bytes; None if Kaggle does not say."""
        return read_length(self.response)

    @property
    def identity(self) -> Json | None:
        """What differs from another version of the archive and is known without reading it; None if nothing is."""
        mark = self.response.headers.get("ETag") or self.response.headers.get("Last-Modified")
        if not mark and self.spec.version is None:
            return None
        name = f"{self.spec.owner}/{self.spec.slug}"
        return {"dataset": name, "version": self.spec.version, "mark": mark, "bytes": self.size}

    @contextmanager
    def reserve_folder(self, cache: Path) -> Iterator[Path]:
        """Locks this data set's folder below ``cache`` for this process; each version has its own folder.

        Raises:
            TryAgain: another process is fetching the same version.
        """
        folder = cache / f"{self.spec.owner}__{self.spec.slug}" / str(self.spec.version or "latest")
        with reserve_folder(folder, self.spec.dataset):
            yield folder

    def download(self, folder: Path, store: Store) -> Path:
        """Downloads the archive into ``folder``, resuming an interrupted download; returns its path.

        Raises:
            ConfigError: there is not enough space for the archive and its content, or the folder cannot be written.
            SourceTooLarge: it is more than ``max_bytes``, or than the disk has room for; nothing of it is kept.
            TryAgain: the download broke off; the partial download is kept, if it can be resumed.
        """
        path = folder / f"{self.spec.slug}.zip"
        # The package's own `download_needed` mistakes part of a larger, older archive for the whole of a smaller one.
        complete, identity = folder / "whole.json", json.dumps(self.identity)
        if self.identity and path.exists() and complete.exists() and complete.read_text() == identity:
            return path
        complete.unlink(missing_ok=True)
        size = self.size
        say(f"{self.spec.name}: downloading {self.spec.dataset} from Kaggle, {(size or 0) / 1e6:,.0f} MB")
        try:
            if size is None:
                self._download_once(path)
            else:
                require_allowed(size, self.spec.max_bytes, self._origin)
                # Zipping does not make images smaller, so the store needs about as much space again.
                require_space([(folder, max(0, size - count_downloaded_bytes(path))), (store.path(""), size)])
                self._download_or_resume(path, size)
        except SourceTooLarge:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.kaggle-partial").unlink(missing_ok=True)
            raise
        complete.write_text(identity)
        return path

    @property
    def _origin(self) -> str:
        return f"{self.spec.file}: {self.spec.dataset}"

    def _download_once(self, path: Path) -> None:
        """Downloads an archive of unknown size, of which a part could not be told from the whole: none is kept."""
        limit = find_limit(self.spec.max_bytes, path.parent)
        try:
            with _translated_errors(self.spec, self.credentials), open_partial(path, resume=False) as file:
                write_with_progress(self.response.iter_content(_CHUNK), file, 0, limit, self._origin)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _download_or_resume(self, path: Path, size: int) -> None:
        """Has the package download the archive, or what an earlier try has left of it to do."""
        with (
            _translated_errors(self.spec, self.credentials),
            _shown_progress(path, size),
            contextlib.redirect_stdout(sys.stderr),
        ):
            try:
                self.api.download_file(
                    self.response, str(path), self.client.http_client(), quiet=True, resume=True, chunk_size=_CHUNK
                )
            except requests.RequestException:
                raise  # a kind of OSError, which the outer block translates
            except OSError as error:
                raise explain_os_error(error, path.parent) or ConfigError(
                    f"{path}: cannot be written ({error.strerror}); see to the disk, fetch again"
                ) from None
            except ValueError:  # the package found another length than Kaggle announced
                path.unlink(missing_ok=True)
                raise TryAgain(f"{self.spec.dataset}: the download has not the announced length; try again") from None


def _drop_odd_headers(response: requests.Response) -> None:
    """Drops a length that is no number and a date that is none: the package fails on them with bare ValueErrors."""
    if read_length(response) is None:
        response.headers.pop("Content-Length", None)
    try:
        datetime.strptime(response.headers.get("Last-Modified", ""), _HTTP_DATE)
    except ValueError:
        response.headers.pop("Last-Modified", None)


def _build_request(spec: KaggleSource) -> Any:
    """Builds the package's request for a data set's archive."""
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

    request = ApiDownloadDatasetRequest()
    request.owner_slug = spec.owner
    request.dataset_slug = spec.slug
    request.dataset_version_number = spec.version
    return request


class _TimeoutAdapter(HTTPAdapter):
    """Sets a time limit of a minute on a silent server; without it, a lost connection would block forever."""

    def send(self, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs["timeout"] = kwargs.get("timeout") or _SILENCE_SECONDS
        return super().send(*args, **kwargs)


@contextmanager
def _translated_errors(spec: KaggleSource, place: str) -> Iterator[None]:
    """Turns the package's exceptions into ours."""
    try:
        yield
    except (json.JSONDecodeError, RecursionError):  # requests' own is a RequestException, too
        raise _explain_other_answer(spec) from None
    except TooSlow as error:
        raise TryAgain(f"{spec.dataset}: Kaggle {error}; try again later") from None
    except requests.HTTPError as error:
        raise _translate_status(error, spec, place) from None
    except (OSError, urllib3.exceptions.HTTPError) as error:  # requests raises OSErrors about a file of certificates
        if explained := explain_connection(error, "Kaggle"):
            raise ConfigError(f"{spec.dataset}: {explained}") from None
        if not isinstance(error, requests.RequestException | urllib3.exceptions.HTTPError):
            raise
        reason = cut_text(hide_access(error))
        if isinstance(error, ValueError):
            raise _explain_other_address(spec, reason) from None
        raise TryAgain(f"{spec.dataset}: Kaggle cannot be reached or broke off ({reason}); try again later") from None
    except ValueError as error:  # bytes that are no text, an address or a version of the package that is none
        if re.search(r"\b(Port|URL)\b", str(error)):  # urllib.parse's own
            raise _explain_other_address(spec, cut_text(error)) from None
        raise _explain_other_answer(spec) from None


def _explain_other_address(spec: KaggleSource, reason: str) -> SourceError:
    return SourceError(
        f"{spec.dataset}: Kaggle's address leads to what is no address of the web ({reason}); ask who runs this "
        "network whether something answers in Kaggle's place"
    )


def _explain_other_answer(spec: KaggleSource) -> TryAgain:
    return TryAgain(
        f"{spec.dataset}: Kaggle's address answered with something else than Kaggle does, such as a page to log in at; "
        "see to that, and try again"
    )


def _translate_status(error: requests.HTTPError, spec: KaggleSource, place: str) -> BreakhisError:
    """Returns our exception for a refusal of Kaggle's; ``place`` is the place of the credentials."""
    response = error.response
    status = response.status_code
    page = f"https://www.kaggle.com/datasets/{spec.owner}/{spec.slug}"
    answers = {
        401: CredentialsError(f"Kaggle does not accept the credentials in {place}; make new ones at {TOKEN_PAGE}"),
        403: CredentialsError(
            f"{spec.dataset}: Kaggle does not let the account of {place} download this; open {page}, accept its terms, "
            f"or use another account ({spec.file})"
        ),
        404: SourceError(f"{spec.file}: Kaggle has no data set or version {spec.dataset!r}; look at {page}"),
        429: TryAgain(f"Kaggle has had too many requests; {advise_when(response)}"),
        408: TryAgain(f"Kaggle has waited too long for the request; {advise_when(response)}"),
    }
    if response.history:  # Kaggle redirected us, so its storage refused
        return TryAgain(f"{spec.dataset}: Kaggle's storage answered with status {status}; try again")
    if status in answers:
        return answers[status]
    if is_passing(status):
        return TryAgain(f"Kaggle has a fault of its own (status {status}); try again later")
    return SourceError(f"{spec.dataset}: Kaggle answered with status {status}")


@contextmanager
def _shown_progress(path: Path, size: int) -> Iterator[None]:
    """Shows the progress of a download in megabytes, by the growth of its file.

    The package's own progress bar writes no lines that would show in a log.
    """
    done = threading.Event()

    def megabytes() -> Iterator[None]:
        reported = 0
        finished = False
        while not finished:
            finished = done.wait(0.5)
            now = path.stat().st_size // 2**20 if path.exists() else 0
            yield from [None] * (now - reported)
            reported = max(reported, now)

    bar = threading.Thread(
        target=lambda: deque(track(megabytes(), total=size // 2**20, what="downloading, MB"), maxlen=0), daemon=True
    )
    bar.start()
    try:
        yield
    finally:
        done.set()
        bar.join()
