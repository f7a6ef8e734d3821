"""A stand-in for Kaggle: the API as the official package calls it, and the storage it redirects to.

    POST /v1/security.OAuthService/IntrospectToken          {"token"} -> {"active", "username"}
    POST /v1/datasets.DatasetApiService/DownloadDataset     -> 302 to a signed address in the storage
    GET  /storage/<owner>/<slug>/<version>.zip?X-Goog-Signature=…    ranges, If-Range, ETag, Last-Modified

The API listens as ``localhost`` and the storage as ``127.0.0.1``, so that a client which sends its credentials on to
the storage is noticed, as with the real thing. Run as a script it serves a mirror of BreakHis until interrupted.
"""

import base64
import hashlib
import io
import json
import os
import random
import re
import secrets
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from ml.core.taxonomy import DUPLICATED_SLIDE, SUBTYPE_NAMES, ImageName, label_of, read_inventory
from tests.helpers.dripping import drip

SITE = Path(__file__).resolve().with_name("site")
"""On PYTHONPATH it makes the package of that process use STANDIN_KAGGLE_URL."""
TOKEN = "KGAT_0123456789abcdef-not-a-real-token"
USER, KEY = "pathologist", "fedcba9876543210-not-a-real-key"
MIRROR = "waseemalastal/breakhis-breast-cancer-histopathological-dataset"


class Call(NamedTuple):
    """One request as the server saw it."""

    method: str
    path: str
    range: str | None
    authorized: bool
    body: Any


@dataclass
class KaggleServer:
    """What the server offers, how it misbehaves, and what it was asked."""

    url: str = ""
    storage_url: str = ""
    archives: dict[str, list[bytes]] = field(default_factory=dict)
    """owner/slug -> the archives of versions 1, 2, …"""

    refuse: int | None = None
    """The API answers every request with this status."""
    refusals: list[int] = field(default_factory=list)
    """The API answers the n-th request with this status."""
    storage_refuses: int | None = None
    cut: list[int] = field(default_factory=list)
    """The storage breaks the n-th download off after so many bytes."""
    retry_after: str | None = None
    page: bytes = b""
    """The API answers every request with this page."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the storage that replace its own; an empty one is left out."""
    redirects_with: dict[str, str] = field(default_factory=dict)
    """Headers of the API's redirection to the storage that replace or join its own."""
    in_circles: bool = False
    """The storage redirects to itself."""
    silent_seconds: float = 0
    """The storage says nothing for so long."""
    drips_after: int | None = None
    """The storage sends what follows so many bytes a few at a time."""

    calls: list[Call] = field(default_factory=list)
    signatures: set[str] = field(default_factory=set)

    def downloads(self) -> list[Call]:
        """The requests that reached the storage."""
        return [call for call in self.calls if call.path.startswith("/storage/")]


@contextmanager
def serve() -> Iterator[KaggleServer]:
    """A running server on a free port; it stops at the end of the block."""
    state = KaggleServer()

    class Handler(_Handler):
        server_state = state

    httpd = _Httpd(("127.0.0.1", 0), Handler)
    state.url = f"http://localhost:{httpd.server_port}"
    state.storage_url = f"http://127.0.0.1:{httpd.server_port}/storage"
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def environment(server: KaggleServer, home: Path) -> dict[str, str]:
    """Variables that make the unmodified package in another process use ``server`` and a home folder of its own."""
    return {
        "HOME": str(home),
        "NO_PROXY": "localhost,127.0.0.1",
        "PYTHONPATH": os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "STANDIN_KAGGLE_URL": server.url,
    }


class _Httpd(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up in the middle is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: KaggleServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._note(body)
        state = self.server_state
        if state.page:
            self._answer(200, state.page, {"Content-Type": "text/html"})
        elif refused := state.refusals.pop(0) if state.refusals else state.refuse:
            self._json(refused, {"code": refused, "message": f"refused with {refused}"})
        elif self.path == "/v1/security.OAuthService/IntrospectToken":
            self._json(200, {"active": True, "username": USER} if body["token"] == TOKEN else {"active": False})
        elif not self._authorized():
            self._json(401, {"code": 401, "message": "Unauthenticated"})
        elif self.path == "/v1/datasets.DatasetApiService/DownloadDataset":
            self._redirect(body)
        else:
            self._json(404, {"code": 404, "message": f"no method {self.path}"})

    def do_GET(self) -> None:
        self._note(None)
        state = self.server_state
        threading.Event().wait(state.silent_seconds)
        if state.in_circles:
            self._answer(302, b"", {"Location": self.path})
            return
        parts = urlsplit(self.path)
        match = re.fullmatch(r"/storage/([^/]+/[^/]+)/(\d+)\.zip", parts.path)
        signature = parse_qs(parts.query).get("X-Goog-Signature", [""])[0]
        if state.storage_refuses or not match or signature not in state.signatures:
            status = state.storage_refuses or 403
            self._answer(status, b"<?xml version='1.0'?><Error/>", {"Content-Type": "application/xml"})
            return
        data = state.archives[match[1]][int(match[2]) - 1]
        headers = {
            "Content-Type": "application/zip",
            "Accept-Ranges": "bytes",
            "ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"',
            "Last-Modified": formatdate(1_600_000_000 + int(match[2]), usegmt=True),
        }
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted and self.headers.get("If-Range") in (None, headers["ETag"], headers["Last-Modified"]):
            start = int(wanted[1])
            if start >= len(data):
                self._answer(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
                return
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers |= state.headers
        if state.drips_after is not None:
            self._answer(status, data[start:], headers, cut=state.drips_after)
            drip(self.wfile.write, data[start + state.drips_after :])
            return
        self._answer(status, data[start:], headers, cut=state.cut.pop(0) if state.cut else None)

    def _redirect(self, body: dict[str, Any]) -> None:
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        versions = self.server_state.archives.get(name, [])
        version = body.get("datasetVersionNumber") or len(versions)
        if not 1 <= version <= len(versions):
            self._json(404, {"code": 404, "message": "Not found"})
            return
        signature = secrets.token_hex(16)
        self.server_state.signatures.add(signature)
        target = f"{self.server_state.storage_url}/{name}/{version}.zip?X-Goog-Signature={signature}"
        self._answer(302, b"", {"Location": target} | self.server_state.redirects_with)

    def _authorized(self) -> bool:
        basic = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Basic {basic}")

    def _note(self, body: Any) -> None:
        authorized = self.headers.get("Authorization") is not None
        self.server_state.calls.append(Call(self.command, self.path, self.headers.get("Range"), authorized, body))

    def _json(self, status: int, value: object) -> None:
        headers = {"Content-Type": "application/json"}
        if self.server_state.retry_after:
            headers["Retry-After"] = self.server_state.retry_after
        self._answer(status, json.dumps(value).encode(), headers)

    def _answer(self, status: int, data: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        # The package prints a warning to stdout where it is older than this.
        all_headers = {"X-Kaggle-APIVersion": "99.0.0", "Content-Length": str(len(data)), **headers}
        for name, value in all_headers.items():
            if value:
                self.send_header(name, value)
        self.close_connection = not all_headers["Content-Length"].isdecimal()
        self.end_headers()
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True


def mirror_zip(names: Iterable[ImageName], *, side: int = 24) -> bytes:
    """A zip in the layout of the Kaggle mirror: every picture twice, once in each tree, without slide folders.

    The slide that BreakHis has under two labels has the same pictures under both names here, too.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            same = name.slide == DUPLICATED_SLIDE
            seed = f"{name.slide}-{name.magnification}-{name.seq}" if same else str(name)
            png = noise_png(seed, side)
            root = "dataset_cancer_v1/dataset_cancer_v1"
            zoom = f"{name.magnification}X"
            archive.writestr(f"{root}/classificacao_binaria/{zoom}/{name.label}/{name}", png)
            archive.writestr(f"{root}/classificacao_multiclasse/{zoom}/{SUBTYPE_NAMES[name.subtype]}/{name}", png)
        archive.writestr("dataset_cancer_v1/dataset_cancer_v1/leia-me.txt", "BreakHis")
    return buffer.getvalue()


def noise_png(seed: str, side: int = 24) -> bytes:
    """A small PNG that no other seed gives."""
    pixels = random.Random(seed).randbytes(side * side * 3)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def some_names() -> list[ImageName]:
    """The first image of every slide at 100X: 82 names."""
    return [_name(row.subtype, row.slide, 100, 1) for row in read_inventory() if row.magnification == 100]


def all_names() -> list[ImageName]:
    """As many names per slide and magnification as the published data set has: 7,909."""
    return [
        _name(row.subtype, row.slide, row.magnification, seq)
        for row in read_inventory()
        for seq in range(1, row.images + 1)
    ]


def _name(subtype: str, slide: str, magnification: int, seq: int) -> ImageName:
    return ImageName(subtype=subtype, slide=slide, magnification=magnification, seq=seq, label=label_of(subtype))


if __name__ == "__main__":
    with serve() as running, tempfile.TemporaryDirectory() as folder:
        running.archives[MIRROR] = [mirror_zip(all_names() if "--all" in sys.argv else some_names())]
        for variable, value in {**environment(running, Path(folder)), "KAGGLE_API_TOKEN": TOKEN}.items():
            print(f"export {variable}={value}", flush=True)
        threading.Event().wait()
