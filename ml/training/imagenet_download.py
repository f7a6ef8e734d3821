"""The file of ImageNet weights: where Keras keeps it, and its download, bounded in size, silence and slowness."""

import hashlib
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import requests
from filelock import FileLock

from ml.core.errors import TryAgain, WeightsError
from ml.core.messages import cut_text
from ml.core.progress import say
from ml.data.sources.downloads import (
    SourceTooLarge,
    count_downloaded_bytes,
    open_partial,
    read_length,
    write_with_progress,
)
from ml.data.sources.speed_limit import TooSlow, limit_speed

IMAGENET_URL = "https://storage.googleapis.com/keras-applications/efficientnetb0_notop.h5"
"""The address from which Keras downloads the ImageNet weights."""

_HOST = urlsplit(IMAGENET_URL).netloc
_FILE = IMAGENET_URL.rpartition("/")[2]
_MD5 = "50bc09e76180e00e4465e1a485ddc09d"  # as Keras' own application states it
_MAX_BYTES = 64 * 2**20  # it has 17 MB
_SILENCE_SECONDS = 30.0
_CHUNK = 1 << 16


class DownloadError(WeightsError):
    """The ImageNet weights cannot be downloaded."""

    def __init__(self, error: object) -> None:
        super().__init__(
            f"ImageNet weights cannot be downloaded from {_HOST} ({cut_text(error)}). Without access to it, put "
            f"Keras' {_FILE} on disk or in the store and set BREAKHIS_WEIGHTS to its path or URI, or set it "
            "to 'random' to try the workflow."
        )
        if isinstance(error, TryAgain):
            self.exit_code = error.exit_code


def imagenet_cache_file() -> Path:
    """Returns the path where Keras keeps the ImageNet weights that it has downloaded."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models" / _FILE


def check_download() -> None:
    """Fails at once if the weights cannot be downloaded, rather than after TensorFlow's slow import.

    Raises:
        DownloadError: they are not in Keras' cache, and their host cannot be reached.
    """
    if imagenet_cache_file().is_file() or "https" in getproxies():
        return
    try:
        socket.create_connection((_HOST, 443), timeout=_SILENCE_SECONDS / 3).close()
    except OSError as error:
        raise DownloadError(error) from None


def fetch_imagenet_file() -> Path:
    """Returns the file of ImageNet weights, in Keras' cache or downloaded to it.

    Raises:
        DownloadError: their host cannot be reached, is silent or too slow, or sends something else or more than the
            weights.
        ConfigError: the disk is full or broken.
    """
    with download_lock():
        file = _find_writable_cache()
        if not (file.is_file() and _hash_file(file) == _MD5):
            _download(file)
        return file


def download_lock() -> FileLock:
    """Returns the lock of the download: another process would take a half-finished one for the file."""
    return FileLock(Path(tempfile.gettempdir()) / f"breakhis-imagenet-{os.getuid()}.lock")


def _find_writable_cache() -> Path:
    """Returns the path in Keras' cache, or where that cannot be written, among temporary files, as Keras does."""
    file = imagenet_cache_file()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() or os.access(file.parent, os.W_OK):
        return file
    fallback = Path(tempfile.gettempdir()) / ".keras" / "models" / _FILE
    fallback.parent.mkdir(parents=True, exist_ok=True)
    return fallback


def _download(file: Path) -> None:
    part = file.with_suffix(".part")
    say(f"downloading {IMAGENET_URL}")
    limit_speed()
    try:
        with requests.get(IMAGENET_URL, stream=True, timeout=_SILENCE_SECONDS) as response:
            if not response.ok:
                raise DownloadError(f"it answers {response.status_code}")
            size = read_length(response) or 0
            with open_partial(part, resume=False) as target:
                write_with_progress(response.iter_content(_CHUNK), target, size, _MAX_BYTES, "the file")
        if (came := _hash_file(part)) != _MD5:
            raise DownloadError(
                f"what came is another file or not all of it: {count_downloaded_bytes(part):,} bytes with MD5 {came}"
            )
        part.replace(file)
    except (requests.RequestException, SourceTooLarge, TooSlow) as error:
        raise DownloadError(error) from None
    finally:
        part.unlink(missing_ok=True)


def _hash_file(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
