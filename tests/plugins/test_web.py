from pathlib import Path
from urllib.parse import quote

import pytest
from airflow.api_fastapi.core_api.security import get_user
from fastapi.testclient import TestClient

from breakhis_airflow.addresses import PREFIX
from breakhis_airflow.web import create_app
from ml.core.store import Store


@pytest.fixture
def validation(store: Store) -> str:
    def fill(folder: Path) -> None:
        (folder / "result.json").write_text("{}")
        docs = folder / "docs"
        (docs / "static").mkdir(parents=True)
        (docs / "index.html").write_text("<h1>Validation</h1>")
        (docs / "static" / "style.css").write_text("h1 {}")
        (docs / "odd").write_bytes(b"\0")
        (docs / "way_out.html").symlink_to("/etc/passwd")

    return store.create("validation", {"n": 1}, {"passed": True}, fill)


@pytest.fixture
def anonymous() -> TestClient:
    return TestClient(create_app())


@pytest.fixture
def reader() -> TestClient:
    app = create_app()
    app.dependency_overrides[get_user] = object
    return TestClient(app)


@pytest.mark.parametrize("path", ["{id}/index.html", "{id}/no", "nonsense/x", "{id}/../result.json"])
def test_nothing_without_a_login(anonymous, validation, path):
    assert anonymous.get(f"/docs/{path.format(id=validation)}").status_code == 401


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/"])
def test_no_pages_of_fastapi_itself(anonymous, path):
    assert anonymous.get(path).status_code == 404


def test_only_reading(reader, validation):
    for method in ("post", "put", "delete"):
        assert getattr(reader, method)(f"/docs/{validation}/index.html").status_code == 405


@pytest.mark.parametrize(
    ("path", "kind"),
    [("index.html", "text/html"), ("static/style.css", "text/css"), ("odd", "application/octet-stream")],
)
def test_the_files_of_a_report_come_with_their_type(reader, validation, path, kind):
    answer = reader.get(f"/docs/{validation}/{path}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kind)
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "../result.json",
        "../object.json",
        "static/../../result.json",
        "/etc/passwd",
        "..\\result.json",
        "index.html\0.css",
        "way_out.html",
        "static",
        "",
        "no_such_page.html",
        "../../../../../../../../etc/passwd",
    ],
)
def test_no_way_out_of_the_report(reader, validation, path):
    answer = reader.get(f"/docs/{validation}/{quote(path, safe='')}")
    assert answer.status_code == 404, answer.text


@pytest.mark.parametrize(
    "name", ["validation-000000000000", "validation-XYZ", "..", "manifest-0123456789ab", "validation-0123456789abc"]
)
def test_only_validations_that_exist(reader, store, validation, name):
    store.create("manifest", {"n": 1}, {}, lambda folder: (folder / "docs").mkdir())
    assert reader.get(f"/docs/{quote(name, safe='')}/index.html").status_code == 404


def test_no_object_of_another_kind(reader, store):
    def fill(folder: Path) -> None:
        (folder / "docs").mkdir()
        (folder / "docs" / "index.html").write_text("secret")

    other = store.create("evidence", {"n": 1}, {}, fill)
    assert reader.get(f"/docs/{other}/index.html").status_code == 404


def test_the_prefix_is_what_links_use():
    assert PREFIX == "/breakhis"


def test_a_source_leads_to_the_report_of_its_current_version(reader, anonymous, validation, store):
    assert anonymous.get("/sources/ours").status_code == 401
    for unknown in ("ours", "OURS", "..%2f..%2fledgers%2fours"):
        assert reader.get(f"/sources/{unknown}").status_code == 404
    store.compare_and_set("refs/sources/ours.json", {"validation": validation}, None)
    answer = reader.get("/sources/ours")
    assert answer.url.path == f"/docs/{validation}/index.html"
    assert answer.text == "<h1>Validation</h1>"


@pytest.mark.parametrize("path", ["x" * 300, "é" * 120, "a/" * 600 + "x", "x" * 50_000])
def test_a_path_that_no_disk_has_is_no_page(reader, validation, path):
    answer = reader.get(f"/docs/{validation}/{quote(path, safe='')}")
    assert answer.status_code == 404
    assert len(answer.text) < 500
    assert reader.get(f"/sources/{'x' * 5_000}").status_code == 404


@pytest.mark.parametrize("damaged", ["[1]", "7", '{"validation": 7}', '{"validation": null}', "{}", "{"])
def test_a_reference_to_a_source_that_was_overwritten_is_named(reader, store, damaged):
    store.put_json("refs/sources/ours.json", {})
    store.local("refs/sources/ours.json").write_text(damaged)
    answer = reader.get("/sources/ours", follow_redirects=False)
    assert answer.status_code == 404
    assert f"{store.uri('refs/sources/ours.json')} is damaged" in answer.text or damaged == "{}"
