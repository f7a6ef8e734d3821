"""The kinds of input that servers give: answers to a source's requests, and what MLflow says of a run."""

import io
import os
import random
import shutil
import socket
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import yaml

from ml.core.settings import Settings
from ml.core.store import Json, Store
from ml.data.sources import fetch_source, load_source
from ml.promotion.review_texts import format_review_body
from ml.promotion.run_claims import check_evaluation, check_tags
from tests.fuzz.archives import pack_zip
from tests.fuzz.mutation import ODD_TEXTS, mutate_bytes, mutate_json, odd_value
from tests.helpers.made_up import evidence, png

_TOKEN = "KGAT_0123456789abcdef-not-a-real-token"
_MIRROR = "waseemalastal/breakhis-breast-cancer-histopathological-dataset"

Answer = tuple[str, dict[str, str], bytes]
"""Status line, headers and body."""

_STATUSES = ("200 OK", "206 Partial Content", "204 No Content", "301 Moved", "302 Found", "304 Not Modified")
_STATUSES += ("401 No", "403 No", "404 No", "416 No", "429 Busy", "500 Oops", "503 Busy", "999 ?", "abc", "")
_HEADERS = {
    "Content-Length": ("", "-1", "0", "1", "many", "9" * 30, "1e9", "12, 12"),
    "Content-Encoding": ("gzip", "br", "identity", "x"),
    "Transfer-Encoding": ("chunked", "gzip, chunked", "x"),
    "Content-Range": ("bytes 0-1/2", "bytes */3", "x"),
    "Content-Type": ("text/html", "application/xml", "application/json; charset=nonsense", ""),
    "Location": ("/", "", "?", "//", "ftp://127.0.0.1/x", "http://[::1", "/elsewhere", "\x7f"),
    "Retry-After": ("soon", "-1", "9" * 20, "0"),
    "Last-Modified": ("yesterday", "", "Thu, 01 Jan 1970 00:00:00 GMT"),
    "ETag": ("", '"', "W/x", "x" * 5000),
    "x-amz-bucket-region": ("", "eu-west-9", "?"),
}


class Server:
    """A server on this machine whose answers are good ones that were mutated. It closes the connection after each."""

    def __init__(self, good: Callable[[str], Answer]) -> None:
        self._good = good
        self._seed = ""
        self._asked: Counter[str] = Counter()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def begin(self, rng: random.Random) -> None:
        """Makes other answers from now on: the same ones for the same random generator."""
        self._seed, self._asked = str(rng.random()), Counter()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                connection.settimeout(2)
                try:
                    self._answer(connection)
                except OSError:  # the client has had enough
                    continue

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            received = connection.recv(65536)
            if not received:
                return
            request += received
        head, _, body = request.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        missing = (int(lengths[0].partition(b":")[2]) if lengths else 0) - len(body)
        while missing > 0:
            missing -= len(connection.recv(65536)) or missing
        path = unquote(urlsplit(head.split(b" ")[1].decode("latin-1")).path)
        self._asked[path] += 1
        rng = random.Random(f"{self._seed}/{path}/{self._asked[path]}")
        connection.sendall(_mutate_answer(self._good(path), rng))


def _mutate_answer(good: Answer, rng: random.Random) -> bytes:
    status, headers, body = good
    headers = {"Content-Length": str(len(body)), **headers, "Connection": "close"}
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        kind = rng.randrange(5)
        if kind == 0:
            status = rng.choice(_STATUSES)
        elif kind in {1, 2}:
            name = rng.choice(list(_HEADERS))
            headers[name] = rng.choice(_HEADERS[name])
        elif kind == 3:
            body = mutate_bytes(body, rng)
        else:
            body = rng.choice((b"", b"<html>Log in</html>", b"<?xml version='1.0'?><a>", b"{}", b"[]", b"\x00" * 100))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    data = f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1") + body
    return mutate_bytes(data, rng) if rng.random() < 0.1 else data


class _Source(NamedTuple):
    server: Server
    spec: Any
    scratch: Path


def _prepare_source(scratch: Path, server: Server, facts: Json) -> _Source:
    """Declares a source of that server. Waiting takes no time, and no other machine is asked."""
    conf = scratch / "conf" / "sources"
    conf.mkdir(parents=True)
    (conf / "made.yaml").write_text(yaml.safe_dump({"name": "made", **facts}))
    for name in [
        name for name in os.environ if name.startswith(("KAGGLE_", "AWS_")) or name.lower().endswith("_proxy")
    ]:
        del os.environ[name]
    os.environ |= {"NO_PROXY": "localhost,127.0.0.1", "HOME": str(scratch), "KAGGLE_CONFIG_DIR": str(scratch)}
    find = socket.getaddrinfo

    def find_here(host: Any, *arguments: Any, **options: Any) -> Any:
        if host not in {"localhost", "127.0.0.1"}:
            raise socket.gaierror(f"{host!r} is not on this machine")
        return find(host, *arguments, **options)

    patch.object(socket, "getaddrinfo", find_here).start()
    patch.object(time, "sleep", lambda _: None).start()
    return _Source(server, load_source("made", conf.parent), scratch)


def use_source(source: _Source, rng: random.Random) -> None:
    """Fetches the source, once or twice, of a server whose answers are odd; nothing was fetched before."""
    for folder in ("home", "store"):
        shutil.rmtree(source.scratch / folder, ignore_errors=True)
    settings = Settings(home=source.scratch / "home", store=(source.scratch / "store").as_uri(), workers=1)
    source.server.begin(rng)
    with redirect_stderr(io.StringIO()):
        fetch_source(source.spec, Store(settings.store), settings)
        if rng.random() < 0.3:
            fetch_source(source.spec, Store(settings.store), settings)


def _pack_pictures() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for number in range(3):
            data = png(number, (20, 20))
            info = tarfile.TarInfo(f"SOB_B_A-14-100{number}-40-001.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def prepare_http(scratch: Path) -> _Source:
    """Returns a source at a web address."""
    archive = _pack_pictures()
    server = Server(lambda _: ("200 OK", {"Content-Type": "application/gzip", "ETag": '"a"'}, archive))
    url = f"http://127.0.0.1:{server.port}/all.tar.gz"
    return _prepare_source(scratch, server, {"kind": "http", "url": url, "sha256": sha256(archive).hexdigest()})


def prepare_kaggle(scratch: Path) -> _Source:
    """Returns a source at Kaggle, which the official package asks on this machine."""
    archive = pack_zip({f"SOB_B_A-14-100{number}-40-001.png": png(number, (20, 20)) for number in range(3)})

    def answer(path: str) -> Answer:
        if path.endswith("IntrospectToken"):
            return "200 OK", {"Content-Type": "application/json"}, b'{"active": true, "username": "pathologist"}'
        if path.endswith("DownloadDataset"):
            return "302 Found", {"Location": "/storage/all.zip"}, b""
        dates = {"Last-Modified": "Sun, 13 Sep 2020 12:26:40 GMT", "ETag": '"a"', "Accept-Ranges": "bytes"}
        return "200 OK", {"Content-Type": "application/zip", "X-Kaggle-APIVersion": "99.0.0", **dates}, archive

    server = Server(answer)
    source = _prepare_source(scratch, server, {"kind": "kaggle", "dataset": _MIRROR})
    os.environ["KAGGLE_API_TOKEN"] = _TOKEN
    from kagglesdk import kaggle_env

    kaggle_env._env_to_endpoint[kaggle_env.KaggleEnv.PROD] = f"http://localhost:{server.port}"
    return source


_LISTING = """<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix>images/</Prefix>
<KeyCount>1</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>
<Contents><Key>images/a.png</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>"a"</ETag>
<Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents></ListBucketResult>"""


def prepare_s3(scratch: Path) -> _Source:
    """Returns a source of one picture in a bucket."""
    picture = png(1, (20, 20))

    def answer(path: str) -> Answer:
        if path.endswith(".png"):
            return "200 OK", {"ETag": '"a"', "Content-Type": "image/png"}, picture
        return "200 OK", {"Content-Type": "application/xml"}, _LISTING.format(size=len(picture)).encode()

    server = Server(answer)
    facts = {"kind": "s3", "bucket": "bucket", "prefix": "images/", "endpoint": f"http://127.0.0.1:{server.port}"}
    source = _prepare_source(scratch, server, facts)
    from ml.data.sources.spec import S3_KEY_VARIABLES

    os.environ.update(dict.fromkeys(S3_KEY_VARIABLES, "source"))
    return source


# --- runs in MLflow -----------------------------------------------------------------------------------------------

_TAGS = {
    **{"set": "made", "task": "binary", "ledger": "made", "preset": "demo", "seed": "7", "weights_kind": "file"},
    **{name: f"{name}-0123456789ab" for name in ("dataset", "split", "weights")},
    "dag_runs": '[["retrain_made", "manual__2026"]]',
    "code_sha256": "0" * 64,
}
_OF_A_CLASS = {"recall", "precision", "f1", "support", "cases", "recognised"}
_LISTED = ("metrics", "intervals", "interval_notes", "per_class", "absent_classes", "slices")


def prepare_run(_: Path) -> Json:
    """Returns what a run's metrics.json holds."""
    made = evidence()
    for scores in made["per_class"].values():
        scores |= {"cases": 2, "recognised": 1}
    part = {"images": 5, "cases": 2, "recognised": 1, "metrics": {"accuracy": 0.8}, "intervals": {}}
    made |= {"intervals": {"accuracy": [0.7, 0.9]}, "slices": {"magnification": {"100": part}}}
    made["interval_notes"] = {"macro_f1": "no interval: every draw of patients gives the same"}
    return {name: made[name] for name in _LISTED}


def use_run(evaluation: Json, rng: random.Random) -> None:
    """Checks a run's tags and its metrics.json; of those that pass, the review of the version is written."""
    tags = {f"breakhis.{name}": text for name, text in _TAGS.items()}
    if rng.random() < 0.5:
        name = rng.choice(list(tags))
        tags[name] = rng.choice((*ODD_TEXTS, str(odd_value(rng))))
        if rng.random() < 0.3:
            del tags[rng.choice(list(tags))]
    changed = mutate_json(evaluation, rng) if rng.random() < 0.7 else evaluation
    check_tags("made-binary version 1", tags)
    check_evaluation("made-binary version 1", changed, "binary")
    # What is missing is found when the metrics are computed again from the predictions: check_predictions.
    if not all(scores.keys() >= _OF_A_CLASS for scores in changed["per_class"].values()):
        return
    made = evidence() | {name: changed[name] for name in _LISTED if name in changed}
    gates: Json = {"gates": [], "warnings": [], "policy": "demo", "policy_hash": "0", "comparison": None}
    format_review_body({"evidence_id": "evidence-0", "evidence": made, "champion": None, **gates}, "bundle-0", {})
