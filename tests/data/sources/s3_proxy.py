"""A proxy before an S3 server, which breaks connections and answers in its place."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.helpers.dripping import drip


@dataclass
class Proxy:
    """A proxy before the S3 server: it records requests, and changes what becomes of the next ones."""

    url: str = ""
    cut: list[int] = field(default_factory=list)
    """The connection breaks after so many bytes of the body of the n-th GET of an object."""
    answer: tuple[int, bytes] | None = None
    """Every request is answered with this, and does not reach the server."""
    alter_listing: Callable[[bytes], bytes] | None = None
    """Makes another listing of the server's."""
    alter_object: Callable[[bytes], bytes] | None = None
    """Makes another content of the server's, for every GET of an object."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of an object that replace the server's; an empty one is left out."""
    ignores_ranges: bool = False
    silent_after: int | None = None
    """The server says nothing more after so many bytes of an object."""
    drips_after: int | None = None
    """The server sends what follows so many bytes of an object a few at a time."""
    before_get: Callable[[], Any] | None = None
    """Called once, before the next GET of an object."""
    gets: list[tuple[str, str | None]] = field(default_factory=list)
    """The objects that were asked for, and their ranges."""
    listings: int = 0
    released: threading.Event = field(default_factory=threading.Event)
    """Lets the silent ones go on."""


@contextmanager
def serve_proxy(s3_endpoint: str) -> Iterator[Proxy]:
    """Serves a proxy before the S3 server at an address."""
    proxy = Proxy()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, _, key = urlsplit(self.path).path.lstrip("/").partition("/")
            cut = None
            if self.command == "GET" and key:
                proxy.gets.append((key, self.headers["Range"]))
                cut = proxy.cut.pop(0) if proxy.cut else None
                if proxy.before_get:
                    act, proxy.before_get = proxy.before_get, None
                    act()
            elif self.command == "GET":
                proxy.listings += 1
            if proxy.answer:
                status, headers, data = proxy.answer[0], [("Content-Type", "application/xml")], proxy.answer[1]
            else:
                server = HTTPConnection(urlsplit(s3_endpoint).netloc)
                passed = {
                    name: value
                    for name, value in self.headers.items()
                    if not (proxy.ignores_ranges and name.lower() == "range")
                }
                server.request(self.command, self.path, headers=passed)
                response = server.getresponse()
                status, headers, data = response.status, response.getheaders(), response.read()
                server.close()
            alter = proxy.alter_object if key else proxy.alter_listing
            if alter and self.command == "GET":
                data = alter(data)
                headers = [pair for pair in headers if not pair[0].lower().startswith("x-amz-checksum")]
            if key:
                changed = {name.lower() for name in proxy.headers}
                headers = [(name, value) for name, value in headers if name.lower() not in changed]
                headers += [(name, value) for name, value in proxy.headers.items() if value]
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            length = proxy.headers.get("Content-Length", length) if key else length
            if length:
                self.send_header("Content-Length", length)
            self.end_headers()
            silent = proxy.silent_after if key and self.command == "GET" else None
            if self.command == "GET" and key and proxy.drips_after is not None:
                self.wfile.write(data[: proxy.drips_after])
                drip(self.wfile.write, data[proxy.drips_after :])
            elif self.command == "GET":
                self.wfile.write(data[: cut if silent is None else silent])
            if silent is not None:
                self.wfile.flush()
                proxy.released.wait(10)
            self.close_connection = cut is not None or silent is not None or not length

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Ignores clients that hang up in the middle."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    yield proxy
    proxy.released.set()
    server.shutdown()
    thread.join()
    server.server_close()
