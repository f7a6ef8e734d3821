"""Functions that all downloads share, and the source kind http: an archive at a web address, known by its SHA-256."""

import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import requests
from filelock import FileLock, Timeout

from ml.core.disks import LARGER_DISK, explained_os_errors
from ml.core.errors import BreakhisError, ConfigError, CredentialsError, SourceError, TryAgain
from ml.core.hashes import hash_file
from ml.core.messages import cut_text, hide_access
from ml.core.progress import say, track
from ml.core.tls_and_proxies import explain_connection
from ml.data.sources.spec import HttpSource
from ml.data.sources.speed_limit import TooSlow

_CHUNK = 1 << 16
_SILENCE_SECONDS = 60.0
_DIGITS = 16  # of a length that can be one
_SPARE_BYTES = 256 * 2**20  # a full disk would break more than this fetch


class SourceTooLarge(SourceError):
    """More would be downloaded than ``max_bytes`` or the disk allow."""


@contextmanager
def reserve_folder(folder: Path, what: str) -> Iterator[None]:
    """Makes a folder to download into and locks it for this process.

    Args:
        folder: the folder.
        what: what is downloaded there, for the message.

    Raises:
        TryAgain: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise TryAgain(f"{what} is being fetched by another process; try again when it is done") from None


def require_space(needs: list[tuple[Any, int]]) -> None:
    """Checks that each disk has enough free space.

    Args:
        needs: places and the bytes needed at each; those on one disk are added up. Places in S3 are not checked.

    Raises:
        ConfigError: names the place, the free space and the space needed.
    """
    wanted: dict[int, tuple[Path, int]] = {}
    for place, size in needs:
        if isinstance(place, Path):
            folder = next(p for p in (place, *place.parents) if p.exists())
            device = folder.stat().st_dev
            wanted[device] = (folder, size + (wanted[device][1] if device in wanted else _SPARE_BYTES))
    for folder, size in wanted.values():
        free = shutil.disk_usage(folder).free
        if free < size:
            raise ConfigError(
                f"{folder}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB needed; free some space, or {LARGER_DISK}"
            )


def count_downloaded_bytes(part: Path) -> int:
    """Returns how many bytes an earlier, interrupted download has left."""
    return part.stat().st_size if part.exists() else 0


@contextmanager
def open_partial(part: Path, *, resume: bool) -> Iterator[IO[bytes]]:
    """Opens the file of a partial download, to resume it or to begin anew.

    Raises:
        ConfigError: the disk is full or broken.
    """
    try:
        with explained_os_errors(part.parent), part.open("ab" if resume else "wb") as file:
            yield file
    except OSError as error:
        if error.errno is None:  # a network error, which requests makes a kind of OSError
            raise
        raise ConfigError(f"{part}: cannot be written ({error.strerror}); see to the disk, fetch again") from None


def require_allowed(size: int, limit: int | None, origin: str) -> None:
    """Checks that what is announced is not larger than what may come; None: as much as there is.

    Raises:
        SourceTooLarge: names ``origin`` and both.
    """
    if limit is not None and size > limit:
        raise SourceTooLarge(f"{origin} is {size:,} bytes, more than the {limit:,} that may come; it was not taken")


def write_with_progress(chunks: Iterable[bytes], file: IO[bytes], size: int, limit: int, origin: str) -> None:
    """Writes a download as it arrives, and shows its progress in megabytes.

    Args:
        chunks: what arrives.
        file: where it is written.
        size: how many bytes are announced; 0 if unknown.
        limit: how many bytes may come, whatever was announced.
        origin: the file and address that are at fault if more come.

    Raises:
        SourceTooLarge: more than ``limit`` bytes are announced, or came.
    """
    require_allowed(size, limit, origin)

    def megabytes() -> Iterator[None]:
        done = 0
        for chunk in chunks:
            if done + len(chunk) > limit:
                raise SourceTooLarge(f"{origin} sends more than the {limit:,} bytes that may come; it was not taken")
            file.write(chunk)
            yield from [None] * ((done + len(chunk)) // 2**20 - done // 2**20)
            done += len(chunk)

    deque(track(megabytes(), total=size // 2**20 or None, what="downloading, MB"), maxlen=0)


def download_archive(spec: HttpSource, target: Path) -> None:
    """Downloads the archive to ``target``, resuming an interrupted download.

    Raises:
        SourceError: there is nothing at that address, or not the archive with the YAML's SHA-256, or more than
            ``max_bytes`` or the disk allow; then no partial download is kept.
        CredentialsError: the server requires a login.
        TryAgain: the server cannot be reached, is busy or too slow, or broke off; the partial download is kept for the
            next try.
        ConfigError: not enough space for it, or the disk is broken.
    """
    part = target.with_suffix(".part")
    have = count_downloaded_bytes(part)
    sha256 = _download_rest(spec, part, have)
    if sha256 != spec.sha256 and have:  # the archive was replaced in between, so this is a mixture
        part.unlink()
        sha256 = _download_rest(spec, part, 0)
    if sha256 != spec.sha256:
        size, page = part.stat().st_size, "is a web page and " if _is_web_page(part) else ""
        part.unlink()
        raise SourceError(
            f"{spec.file}: what lies at {spec.shown_url} {page}has the SHA-256 {sha256} ({size:,} bytes), "
            f"not the {spec.sha256} of 'sha256'. It was removed. Take the new one over only if its publisher names it"
        )
    part.replace(target)


def _is_web_page(file: Path) -> bool:
    """Says whether a file begins as a page does, such as one to log in at."""
    with file.open("rb") as content:
        return content.read(100).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _download_rest(spec: HttpSource, part: Path, have: int) -> str:
    """Downloads what follows the first ``have`` bytes; returns the SHA-256 of the whole file."""
    url = spec.shown_url
    with _translated_errors(spec, part), _request(spec, have) as response:
        # 416: the file is complete already, or longer than the archive; its hash will show which.
        if not (have and response.status_code == requests.codes.requested_range_not_satisfiable):
            if not response.ok:
                raise _translate_status(response, spec)
            resumed = response.status_code == requests.codes.partial_content
            size = read_length(response) or 0
            say(f"{spec.name}: downloading {url}, {size / 1e6:,.0f} MB{' more' if resumed else ''}")
            require_space([(part, size)])
            limit = find_limit(spec.max_bytes, part.parent, have if resumed else 0)
            with open_partial(part, resume=resumed) as file:
                write_with_progress(response.iter_content(_CHUNK), file, size, limit, f"{spec.file}: {url}")
    return hash_file(part)


def _request(spec: HttpSource, have: int) -> requests.Response:
    """Asks for what follows the first ``have`` bytes of the archive.

    Raises:
        SourceError: the address, or one that it leads to, is none.
    """
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        return requests.get(spec.url, headers=headers, stream=True, timeout=_SILENCE_SECONDS)
    except ValueError as error:  # what requests and urllib3 make of odd addresses; some of it is not requests' own
        if explained := explain_connection(error, spec.url):
            raise ConfigError(f"{spec.file}: {explained}") from None
        raise SourceError(
            f"{spec.file}: {spec.shown_url} is no address of the web, or leads to what is none "
            f"({cut_text(hide_access(error))}); correct 'url'"
        ) from None


@contextmanager
def _translated_errors(spec: HttpSource, part: Path) -> Iterator[None]:
    """Turns the exceptions of requests into ours; a partial download that nothing can complete is removed."""
    url = spec.shown_url
    try:
        yield
    except SourceTooLarge:  # it will be so the next time
        part.unlink(missing_ok=True)
        raise
    except TooSlow as error:
        raise TryAgain(f"{url} {error}; try again") from None
    except requests.TooManyRedirects:
        raise SourceError(f"{spec.file}: {url} leads in circles; correct 'url'") from None
    except requests.exceptions.ContentDecodingError:
        part.unlink(missing_ok=True)
        raise SourceError(f"{spec.file}: {url} is not packed as its server says; tell who runs it") from None
    except OSError as error:  # RequestException is one, and requests raises others about a file of certificates
        if explained := explain_connection(error, spec.url):
            raise ConfigError(f"{spec.file}: {explained}") from None
        if not isinstance(error, requests.RequestException):
            raise
        reason = cut_text(hide_access(error))
        raise TryAgain(f"{url} cannot be reached or broke off ({reason}); try again") from None


def read_length(response: requests.Response) -> int | None:
    """Returns how many bytes a server announces; None if it announces none, or no number."""
    announced = response.headers.get("Content-Length", "")
    return int(announced) if announced.isascii() and announced.isdecimal() and len(announced) < _DIGITS else None


def find_limit(max_bytes: int | None, folder: Path, have: int = 0) -> int:
    """Returns how many bytes may come after the first ``have``: what a source's ``max_bytes`` and the disk allow."""
    free = shutil.disk_usage(folder).free - _SPARE_BYTES
    return max(0, free if max_bytes is None else min(free, max_bytes - have))


def advise_when(response: requests.Response) -> str:
    """Returns when a busy server may be asked again, in words."""
    wait = response.headers.get("Retry-After", "")
    return f"try again in {wait} s" if re.fullmatch(r"[0-9]{1,6}", wait) else "try again later"


def is_passing(status: int) -> bool:
    """Says whether a server's refusal may be over the next time: it was slow, busy or has a fault of its own."""
    return status in (408, 425, 429) or status >= 500


def _translate_status(response: requests.Response, spec: HttpSource) -> BreakhisError:
    """Returns our exception for a server's refusal."""
    status, url = response.status_code, spec.shown_url
    if status in (401, 403):
        return CredentialsError(f"{spec.file}: {url} answers {status}: it is not for everybody to read")
    if status in (404, 410):
        return SourceError(f"{spec.file}: there is nothing at {url} ({status})")
    if is_passing(status):
        return TryAgain(f"{url} answers {status}; {advise_when(response)}")
    return SourceError(f"{spec.file}: {url} answers {status}")
