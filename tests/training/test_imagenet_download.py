"""The download of the ImageNet weights from servers that are silent, send too much, or something else."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import Timeout

from ml.core.errors import EXIT_TRY_AGAIN, ConfigError
from ml.training import imagenet_download
from ml.training.imagenet_download import DownloadError, fetch_imagenet_file, imagenet_cache_file
from tests.helpers.dripping import drip, lowered_limit

WEIGHTS = b"weights" * 1_000

Answer = Callable[[BaseHTTPRequestHandler], object]


@contextmanager
def serve(answer: Answer) -> Iterator[str]:
    """Serves one answer to every request, at the address that it yields."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/weights.h5"
        server.shutdown()


def send(data: bytes, status: int = 200, length: int | None = None) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        if length != -1:
            request.send_header("Content-Length", str(len(data) if length is None else length))
        request.end_headers()
        request.wfile.write(data)

    return answer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(imagenet_download, "_MD5", hashlib.md5(WEIGHTS, usedforsecurity=False).hexdigest())
    monkeypatch.setattr(imagenet_download, "_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(imagenet_download, "_MAX_BYTES", 10_000)
    return tmp_path / "models"


def test_the_file_is_downloaded_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(send(WEIGHTS)) as url:
        monkeypatch.setattr(imagenet_download, "IMAGENET_URL", url)
        assert fetch_imagenet_file() == imagenet_cache_file()
    assert imagenet_cache_file().read_bytes() == WEIGHTS
    assert fetch_imagenet_file() == imagenet_cache_file()  # the server is gone
    assert [file.name for file in cache.iterdir()] == ["efficientnetb0_notop.h5"]


def wait(request: BaseHTTPRequestHandler) -> None:
    send(b"wei", length=len(WEIGHTS))(request)
    request.wfile.flush()
    threading.Event().wait(2)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (wait, "timed out"),
        (send(WEIGHTS * 2), "the file is 14,000 bytes, more than the 10,000 that may come"),
        (send(WEIGHTS * 2, length=-1), "the file sends more than the 10,000 bytes that may come"),
        (send(b"<html>Please log in</html>"), "what came is another file or not all of it: 26 bytes with MD5 "),
        (send(WEIGHTS[:-1], length=-1), "what came is another file or not all of it: 6,999 bytes with MD5 "),
        (send(WEIGHTS[:-1], length=7_000), "IncompleteRead|broke|bytes"),
        (send(b"", 503), "it answers 503"),
        (send(b"", 404), "it answers 404"),
    ],
)
def test_what_is_not_the_file_is_told_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str
) -> None:
    with serve(answer) as url:
        monkeypatch.setattr(imagenet_download, "IMAGENET_URL", url)
        with pytest.raises(DownloadError, match=words) as caught:
            fetch_imagenet_file()
    assert "set BREAKHIS_WEIGHTS to its path or URI" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_server_that_drips_is_given_up_and_worth_another_try(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        send(b"wei", length=len(WEIGHTS))(request)
        drip(request.wfile.write, WEIGHTS[3:])

    with serve(answer) as url:
        monkeypatch.setattr(imagenet_download, "IMAGENET_URL", url)
        with lowered_limit(), pytest.raises(DownloadError, match="sends less than 1,000 bytes a second") as caught:
            fetch_imagenet_file()
    assert caught.value.exit_code == EXIT_TRY_AGAIN
    assert list(cache.iterdir()) == []


def test_a_damaged_file_in_the_cache_is_replaced(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    imagenet_cache_file().write_bytes(WEIGHTS[:-1])
    with serve(send(WEIGHTS)) as url:
        monkeypatch.setattr(imagenet_download, "IMAGENET_URL", url)
        assert fetch_imagenet_file().read_bytes() == WEIGHTS


def test_a_full_disk_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_up(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imagenet_download, "write_with_progress", fill_up)
    with serve(send(WEIGHTS)) as url:
        monkeypatch.setattr(imagenet_download, "IMAGENET_URL", url)
        with pytest.raises(ConfigError, match="the disk is full"):
            fetch_imagenet_file()


def test_one_process_at_a_time_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(file: Path) -> None:
        with pytest.raises(Timeout):
            imagenet_download.download_lock().acquire(timeout=0)
        file.write_bytes(WEIGHTS)

    monkeypatch.setattr(imagenet_download, "_download", download)
    assert fetch_imagenet_file().read_bytes() == WEIGHTS


def test_a_cache_that_cannot_be_written_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(imagenet_download, "_download", lambda file: file.write_bytes(WEIGHTS))
    assert fetch_imagenet_file() == tmp_path / ".keras" / "models" / "efficientnetb0_notop.h5"
