"""Ingestion: the manifest against a bare decode loop, the validation, and what unchanged and new data cost."""

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import boto3
import numpy as np
from moto.server import ThreadedMotoServer
from PIL import Image

from tests.benchmarks.measure import Figure, Run, breakhis
from tests.benchmarks.replica import Replica

_TURNS = 2
_WORKERS = 2
_NEW = 10  # percent
_FEW = 100  # pictures


def figures(replica: Replica) -> list[Figure]:
    """All figures of this page, in a store of its own."""
    with replica.home(_WORKERS) as (home, environment):
        fetched = breakhis("fetch", "replica", environment=environment)
        bare, ours = [], []
        for _ in range(_TURNS):
            bare.append(_decode_loop(replica.folder))
            shutil.rmtree(home / "store/objects/caches", ignore_errors=True)
            shutil.rmtree(home / "store/objects/memos/manifest", ignore_errors=True)
            ours.append(breakhis("manifest", "replica", environment=environment))
        manifest = ours[-1].result["manifest"]
        validated = breakhis("validate", manifest, environment=environment)
        imports = _seconds_of([sys.executable, "-c", "import great_expectations.expectations"], environment)
        breakhis("publish", manifest, environment=environment)
        again = breakhis("ingest", "replica", environment=environment)
        new = sorted(replica.folder.rglob("*.png"))[:: 100 // _NEW]
        added = _with_new(home, replica, new, environment)
        on_disk, on_s3 = _into_folder_and_s3(home, replica, environment)
    fastest = min(run.seconds for run in ours)
    ratio = min(bare) / fastest
    per_second = f"{replica.images / fastest:.0f} images/s ({fastest:.1f} s)"
    loop = f"bare decode loop, {_WORKERS} processes: {replica.images / min(bare):.0f} images/s"
    rows = f"{replica.images:,}"
    return [
        Figure(f"fetch of {rows} images from a folder", f"{fetched.seconds:.1f} s"),
        Figure(f"manifest of {rows} images", per_second, loop, ratio, "at least 0.80", ratio >= 0.8),
        Figure("its memory, with all processes", f"{max(run.memory for run in ours) / 2**20:.0f} MiB anonymous"),
        Figure(
            f"validation of {rows} rows",
            f"{validated.seconds:.1f} s",
            f"import of Great Expectations: {imports:.1f} s",
            imports / validated.seconds,
            "under 10 s, most of it import",
            validated.seconds < 10 and imports > validated.seconds / 2,
        ),
        Figure(
            "ingestion of unchanged data",
            f"{again.result['decoded']} images decoded, {again.seconds:.1f} s",
            f"the first: {fetched.seconds + fastest + validated.seconds:.1f} s",
            again.seconds / (fetched.seconds + fastest + validated.seconds),
            "0 decoded",
            again.result["decoded"] == 0,
        ),
        Figure(
            f"manifest with {len(new)} new images ({_NEW}%)",
            f"{added.result['decoded']} images decoded, {added.seconds:.1f} s",
            f"all of them: {fastest:.1f} s",
            added.seconds / fastest,
            "the new ones alone",
            added.result["decoded"] == len(new),
        ),
        Figure(
            f"ingestion of {_FEW} images into an S3 store (moto on this machine)",
            f"{on_s3:.1f} s",
            f"into a folder: {on_disk:.1f} s",
            on_s3 / on_disk,
        ),
    ]


def _decode_loop(folder: Path) -> float:
    """How long two processes take to decode all files and do nothing else, their start counted."""
    files = sorted(folder.rglob("*.png"))
    begin = time.perf_counter()
    with get_context("spawn").Pool(_WORKERS) as pool:
        deep = sum(pool.imap_unordered(_decode, files, chunksize=8))
    assert deep == 3 * len(files)
    return time.perf_counter() - begin


def _decode(file: Path) -> int:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).shape[2]


def _with_new(home: Path, replica: Replica, new: list[Path], environment: Mapping[str, str]) -> Run:
    """The manifest of the same data and a tenth more: ``new`` again, with one pixel changed, under other names."""
    folder = home / "more"
    shutil.copytree(replica.folder, folder, copy_function=os.link)
    for number, file in enumerate(new, start=1):
        with Image.open(file) as image:
            changed = image.convert("RGB")
        changed.putpixel((0, 0), (number % 256, number // 256, 7))
        changed.save(folder / f"{file.stem.rpartition('-')[0]}-{900 + number % 100:03d}.png", compress_level=1)
    (home / "sources/replica.yaml").write_text(f"name: replica\nkind: directory\npath: {folder}\n")
    breakhis("fetch", "replica", environment=environment)
    return breakhis("manifest", "replica", environment=environment)


def _into_folder_and_s3(home: Path, replica: Replica, environment: Mapping[str, str]) -> tuple[float, float]:
    """Returns the seconds that ingesting a few pictures takes into an empty folder and into an empty bucket."""
    folder = home / "few"
    folder.mkdir()
    for file in sorted(replica.folder.rglob("*.png"))[:_FEW]:
        os.link(file, folder / file.name)
    (home / "sources/few.yaml").write_text(f"name: few\nkind: directory\npath: {folder}\n")
    seconds: dict[str, list[float]] = {"file": [], "s3": []}
    with _s3_server() as server:
        for turn in range(_TURNS):
            _make_bucket(f"few-{turn}", server)
            stores = {"file": (home / f"few-{turn}").as_uri(), "s3": f"s3://few-{turn}/store"}
            for kind, store in stores.items():
                run = breakhis("ingest", "few", environment={**environment, **server, "BREAKHIS_STORE": store})
                seconds[kind].append(run.seconds)
    return min(seconds["file"]), min(seconds["s3"])


@contextmanager
def _s3_server() -> Iterator[dict[str, str]]:
    """An S3 server in this process, which only waits meanwhile, and the environment of its clients."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else it prints a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    credentials = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
    yield {"AWS_ENDPOINT_URL": f"http://{host}:{port}", **credentials}
    server.stop()


def _make_bucket(name: str, server: Mapping[str, str]) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server["AWS_ENDPOINT_URL"],
        aws_access_key_id=server["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server["AWS_SECRET_ACCESS_KEY"],
        region_name=server["AWS_DEFAULT_REGION"],
    )
    client.create_bucket(Bucket=name)


def _seconds_of(command: list[str], environment: Mapping[str, str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, env=dict(environment), check=True)
    return time.perf_counter() - begin
