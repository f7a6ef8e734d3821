"""When a server counts as too slow. That each kind of source asks for it is tested with their servers."""

import io

import pytest

from ml.data.sources import speed_limit
from ml.data.sources.speed_limit import TooSlow, _Meter


class Server(io.RawIOBase):
    """Sends so many bytes at each read, of which each takes so many seconds of a clock of this test's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, seconds: float) -> None:
        self.count, self.seconds, self.now = count, seconds, 0.0
        monkeypatch.setattr(speed_limit.time, "monotonic", lambda: self.now)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        self.now += self.seconds
        buffer[: self.count] = bytes(self.count)
        return self.count


def test_a_byte_before_each_limit_on_silence_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, 1, 59.0)
    with pytest.raises(TooSlow, match="sends less than 1,000 bytes a second, for 300 s now"):
        io.BufferedReader(_Meter(server)).read(2**16)
    assert server.now == 354  # six bytes


def read_chunks(reader: _Meter, size: int, count: int) -> None:
    for _ in range(count):
        assert len(reader.read(size) or b"") == size


def test_a_server_just_fast_enough_is_read_for_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, 1_000, 1.0)
    reader = _Meter(server)
    read_chunks(reader, 1_000, 3_000)
    server.count = 999
    with pytest.raises(TooSlow):
        read_chunks(reader, 999, 301)


def test_a_fast_beginning_buys_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, 2**20, 1.0)
    reader = _Meter(server)
    read_chunks(reader, 2**20, 450)
    server.count = 1
    with pytest.raises(TooSlow):
        read_chunks(reader, 1, 451)


def test_time_in_which_nobody_reads_is_not_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(monkeypatch, 1, 0.0)
    reader = _Meter(server)
    for _ in range(9):
        reader.read(1)
        server.now += 3_600
