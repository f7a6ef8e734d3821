import os
import re
import socket
import subprocess
import sys
import threading

import pytest

from ml.core.errors import ConfigError
from ml.core.result_files import check_result_uri, write_result


def test_a_result_is_written_to_a_path_and_a_uri(tmp_path, any_store):
    for uri in (str(tmp_path / "r" / "result.json"), (tmp_path / "r" / "a%20b.json").as_uri()):
        write_result(uri, {"a": 1})
    assert {file.name for file in (tmp_path / "r").iterdir()} == {"result.json", "a%20b.json"}
    assert (tmp_path / "r" / "result.json").read_text().strip().startswith("{")
    write_result(any_store.uri("jobs/r.json"), {"a": 1})
    assert any_store.read("jobs/r.json")[0] == {"a": 1}


@pytest.mark.parametrize(
    "uri",
    [
        "http://host/r.json",
        "ftp://me:planted@host/r",
        "gs://b/r",
        "file:/r",
        "file://r",
        "s3://",
        "s3://b",
        "s3://b/",
        "a/",
    ],
)
def test_other_addresses_are_refused(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--result .*; give the path of a file") as error:
        check_result_uri(uri)
    assert "word" not in str(error.value)
    with pytest.raises(ConfigError):
        write_result(uri, {})
    assert not list(tmp_path.iterdir())


def test_a_folder_and_a_socket_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=f"{re.escape(str(tmp_path))}.*it is a folder"):
        check_result_uri(str(tmp_path))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="it is a socket"):
            check_result_uri(str(tmp_path / "s"))


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_result(str(pipe), {"a": 1})
    reader.join(60)
    assert read == ['{\n "a": 1\n}\n']
    assert pipe.is_fifo()


@pytest.mark.parametrize("place", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("is_file", [True, False])
def test_the_output_of_this_process_can_be_named(tmp_path, place, is_file):
    program = f"from ml.core.result_files import write_result; print(1); write_result({place!r}, {{}}); print(2)"
    with (tmp_path / "out").open("wb") as file:
        ended = subprocess.run(
            [sys.executable, "-c", program], stdout=file if is_file else subprocess.PIPE, text=True, check=True
        )
    assert ((tmp_path / "out").read_text() if is_file else ended.stdout) == "1\n{}\n2\n"
    assert os.path.islink("/dev/stdout")  # noqa: PTH114


def test_a_full_device_and_a_reader_that_has_gone_are_told(tmp_path):
    write_result("/dev/null", {})
    with pytest.raises(ConfigError, match="the disk is full"):
        write_result("/dev/full", {})
    out, into = os.pipe()
    os.close(out)
    try:
        with pytest.raises(ConfigError, match="has gone"):
            write_result(f"/dev/fd/{into}", {})
    finally:
        os.close(into)
