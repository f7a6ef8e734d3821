import os
import signal
from pathlib import Path

import pytest

from ml.core.errors import ImageError
from ml.images import local_pictures
from ml.images.decoding import MEMORY
from ml.images.local_pictures import _read as read
from ml.images.local_pictures import read_pictures
from tests.helpers.made_up import png
from tests.helpers.pictures import slow_bmp


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    contents = {"a.png": png(1), "b.bmp": slow_bmp(4_000), "c.png": b"text", "d.png": png(2)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    return [tmp_path / name for name in contents]


def test_a_picture_that_takes_too_long_is_named_with_the_limit_and_the_others_are_read(files: list[Path]) -> None:
    read = dict(read_pictures(files, None, MEMORY, 1.0))
    assert list(read) == files
    assert [read[files[0]], read[files[3]]] == [png(1), png(2)]
    slow, text = read[files[1]], read[files[2]]
    assert isinstance(slow, ImageError)
    assert isinstance(text, ImageError)
    assert str(slow).startswith(f"time: {files[1]}: reading it takes more than 1 s of a core, which no ordinary")
    assert str(slow).endswith("or raise BREAKHIS_DECODING_SECONDS")
    assert text.reason == "undecodable"


def test_with_more_time_it_is_read(files: list[Path]) -> None:
    [(_, content)] = read_pictures(files[1:2], None, MEMORY, 120.0)
    assert content == files[1].read_bytes()


def kill_the_process_for_b(job):
    """Stands in for a decoder that crashes on one file."""
    if job.file.name == "b.bmp":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(job)


def test_a_picture_that_crashes_the_decoder_is_named(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_pictures, "_read", kill_the_process_for_b)
    found = dict(read_pictures(files, None, MEMORY, 120.0))
    assert str(found[files[1]]).startswith(f"crashed: {files[1]}: reading it killed the process that did")
    assert found[files[3]] == png(2)
