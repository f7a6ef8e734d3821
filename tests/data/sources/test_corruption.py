"""Ways in which a delivery goes wrong, each after a good one was published, and what becomes of it.

Whatever happens: the last good version stays published unless a better one is, nothing half-made is left, what could
not be used is named in the Data Docs, and once the source is mended the next run is as if nothing had been.
"""

import html
import re
import shutil
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import pandas as pd
import pytest
import yaml

from ml.core.errors import EXIT_BAD_INPUT, EXIT_REFUSED, EXIT_TRY_AGAIN
from ml.core.store import Json
from tests.data.sources.corrupted_source import COLUMNS, DC, IMAGES, NEW, ROWS, Source, jpeg, zipped
from tests.data.sources.corruption_cases import CASES, Case
from tests.data.sources.kaggle_server import all_names, noise_png
from tests.helpers.made_up import name, png, write_tree


class Site(NamedTuple):
    url: str
    folder: list[Path]
    status: list[int | str]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A web server of all.zip in the first of its folders."""
    folder: list[Path] = []
    status: list[int | str] = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            data = (folder[0] / "all.zip").read_bytes()
            answer = status.pop(0) if status else 200
            if isinstance(answer, int) and answer != 200:
                self.send_error(answer)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if answer == "cut" else data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield Site(f"http://127.0.0.1:{server.server_port}/all.zip", folder, status)
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def good(site: Site, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind a folder with its source, ingested and published."""
    roots = {}
    for kind in ("folder", "archive", "table"):
        root = roots[kind] = tmp_path_factory.mktemp(kind)
        source = Source(root, kind, site.url, site.status)
        for folder in (source.yaml.parent, source.images, root / "site"):
            folder.mkdir(parents=True)
        declared: Json = {"name": source.name, "kind": "directory", "path": str(source.images)}
        if kind == "archive":
            source.yaml.write_text(yaml.safe_dump({"name": source.name, "kind": "http", "url": site.url}))
            source.pack(zipped(IMAGES))
        elif kind == "table":
            write_tree(source.images, {f"scans/{k}.png": png(k) for k in range(len(ROWS))})
            source.write_table()
            declared |= {"layout": "table", "table": {"file": "cases.csv", **COLUMNS}}
            source.yaml.write_text(yaml.safe_dump(declared))
        else:
            write_tree(source.images, IMAGES)
            source.yaml.write_text(yaml.safe_dump(declared))
        site.folder[:] = [root / "site"]
        code, result, err = source.ingest()
        assert (code, result["changed"], result["quarantined"]) == (0, True, {}), err
    return roots


@pytest.fixture
def source(request: pytest.FixtureRequest, good: dict[str, Path], site: Site, tmp_path: Path) -> Source:
    """A copy of a published source, to be corrupted."""
    kind = request.param
    root = tmp_path / "source"
    shutil.copytree(good[kind], root)
    site.folder[:] = [root / "site"]
    site.status.clear()
    made = Source(root, kind, site.url, site.status)
    if kind != "archive":
        made.declare(path=str(made.images))
    return made


@pytest.mark.parametrize(
    ("source", "case"), [pytest.param(case.kind, case, id=name) for name, case in CASES.items()], indirect=["source"]
)
def test_a_corrupted_source(source: Source, case: Case) -> None:
    before = source.published()
    sound = source.root.with_name("sound")
    parts = ("conf", "images", "site")
    for part in parts:
        shutil.copytree(source.root / part, sound / part)
    case.corrupt(source)

    code, result, err = source.ingest()

    assert code == case.status, err
    assert "Traceback" not in err
    assert source.leftovers() == (["archive.part"] if "broke off" in case.says else [])
    last = err.splitlines()[-1]
    if code in (EXIT_BAD_INPUT, EXIT_TRY_AGAIN):
        assert result == {}
        assert re.search(f"^error: .*{case.says}", last), last
    else:
        if code == EXIT_REFUSED:
            assert case.says in [check["name"] for check in result["failed"]]
            assert "did not pass validation" in last
        assert_quarantined(source, result, case)
    if code == 0 and case.gained:
        assert result["changed"]
        assert source.published()["images"] == result["images"] == before["images"] + case.gained
        return
    assert source.published() == before
    if case.status == EXIT_TRY_AGAIN:
        code, result, err = source.ingest()
        assert (code, result["images"]) == (0, before["images"] + 1), err
        assert source.leftovers() == []
        return

    for part in parts:
        shutil.rmtree(source.root / part, ignore_errors=True)
        (source.root / part).unlink(missing_ok=True)
        shutil.copytree(sound / part, source.root / part)
    code, result, err = source.ingest()
    assert (code, result["changed"], result["version"]) == (0, False, before["version"]), err
    assert source.leftovers() == []


def assert_quarantined(source: Source, result: Json, case: Case) -> None:
    """The table and the Data Docs name each file with its reason, and no other."""
    quarantine = pd.read_parquet(source.store.file(result["manifest"], "quarantine.parquet"))
    assert dict(zip(quarantine["path"], quarantine["reason"], strict=True)) == case.quarantined
    assert quarantine["detail"].str.len().gt(0).all()
    docs = Path(result["docs"].removeprefix("file://")).parent
    page = (docs / "quarantine.html").read_text()
    assert page.count("<tr>") == 1 + len(case.quarantined)
    for path, reason in case.quarantined.items():
        assert f"<td>{html.escape(path)}</td><td>{reason}</td>" in page
    if case.status == EXIT_REFUSED:
        assert re.search(rf"did not pass: [^<]*{case.says} failed", (docs / "index.html").read_text())


def test_a_source_that_claims_to_be_all_of_breakhis(site: Site, tmp_path: Path) -> None:
    """With as many names as BreakHis has; the pictures are specks."""
    source = Source(tmp_path, "folder", site.url, site.status)
    source.yaml.parent.mkdir(parents=True)
    write_tree(
        source.images, {str(one): noise_png(f"{one.slide}-{one.magnification}-{one.seq}", 8) for one in all_names()}
    )
    declared = {"name": source.name, "kind": "directory", "path": str(source.images), "inventory": True}
    source.yaml.write_text(yaml.safe_dump(declared))
    code, result, err = source.ingest()
    assert (code, result["images"], result["quarantined"]) == (0, 7909 - 246, {"slide_with_two_subtypes": 246}), err
    before = source.published()

    source.put(name("A", "14-22549AB", 40, 999), png(1))
    for path in source.images.glob("SOB_M_PC-14-*"):
        path.unlink()
    code, result, err = source.ingest()
    assert code == EXIT_REFUSED, err
    assert {check["name"] for check in result["failed"]} == {"inventory", "images_lost"}
    [found] = [check["observed"] for check in result["failed"] if check["name"] == "inventory"]
    assert "A at 40X: expected 114, found 115 (slide 14-22549AB: 30 of 29)" in found
    assert re.search(r"PC at 400X: expected 138, found \d+ ", found)
    assert source.published() == before


@pytest.mark.parametrize(
    ("source", "path", "data", "images", "duplicates"),
    [
        pytest.param("folder", NEW, jpeg(), 33, 0, id="a JPEG named .png"),
        pytest.param("folder", NEW, png(1, mode="RGBA"), 33, 0, id="a channel for transparency"),
        pytest.param("folder", NEW, png(1, mode="P"), 33, 0, id="a palette"),
        pytest.param("folder", f"more/{Path(DC[0]).name}", png(1), 32, 1, id="the same name with other bytes"),
        pytest.param("folder", f"more/{name('DC', '14-1041', 100)}", IMAGES[DC[0]], 32, 1, id="the same pixels again"),
        pytest.param("folder", "Thumbs.db", b"x", 32, 0, id="a file of no concern"),
    ],
    indirect=["source"],
)
def test_what_looks_odd_and_is_no_fault(source: Source, path: str, data: bytes, images: int, duplicates: int) -> None:
    source.put(path, data)
    code, result, err = source.ingest()
    assert (code, result["images"], result["duplicates"], result["quarantined"]) == (0, images, duplicates, {}), err
