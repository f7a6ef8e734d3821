"""A lower limit on the speed of downloads: a server that sends a byte now and then would hold one forever.

Limits on silence, which the libraries have, begin anew with each byte, and no limit on a whole download fits both small
and large ones. So the limit is that of curl's ``--speed-limit`` and ``--speed-time``.
"""

import http.client
import io
import time
from typing import Any

from ml.core.errors import TryAgain

BYTES_PER_SECOND = 1_000
"""Mean speed below which a server is given up."""

SECONDS = 300.0
"""How long a server may be slower than that."""


class TooSlow(TryAgain):
    """A server sends less than the lower limit; the message begins with a verb, for the server's name before it."""


def limit_speed() -> None:
    """Has every answer to an HTTP request of this process fail with :class:`TooSlow` where it is sent too slowly.

    Headers count, too. None of requests, boto3 and Kaggle's package (which resumes in sessions of its own) has such a
    limit or a place to pass one in, but all of them read answers by the response class of Python's HTTP client.
    """
    http.client.HTTPConnection.response_class = _MeteredResponse


class _MeteredResponse(http.client.HTTPResponse):
    """An answer whose bytes are counted as they come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fp = io.BufferedReader(_Meter(self.fp.detach()))


class _Meter(io.RawIOBase):
    """Reads from a socket's file, and raises :class:`TooSlow`. Time in which nobody reads does not count."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._waited = 0.0
        self._came = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        begin = time.monotonic()
        count: int | None = self._raw.readinto(buffer)
        self._waited += time.monotonic() - begin
        self._came += count or 0
        if count and self._waited >= SECONDS:
            if self._came < BYTES_PER_SECOND * self._waited:
                raise TooSlow(f"sends less than {BYTES_PER_SECOND:,} bytes a second, for {SECONDS:,.0f} s now")
            self._waited, self._came = 0.0, 0
        return count

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._raw.close()
