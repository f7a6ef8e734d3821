"""The list of packages and their advisories, and the scan for secrets in files."""

import json
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

ROOT = Path(__file__).parents[1]

Json = dict[str, Any]


def locked_packages() -> dict[str, set[str]]:
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    found: dict[str, set[str]] = {}
    for package in packages:
        found.setdefault(package["name"], set()).add(package["version"])
    return found


def test_the_list_of_packages_has_those_of_the_lock_with_their_hashes() -> None:
    subprocess.run(["make", "sbom"], cwd=ROOT, check=True, capture_output=True, timeout=120)
    made = json.loads((ROOT / "sbom.cdx.json").read_text())
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.5")
    locked = locked_packages()
    assert all(part["version"] in locked[part["name"]] for part in made["components"])
    named = {part["name"] for part in made["components"]}
    assert named >= {"apache-airflow", "boto3", "great-expectations", "kaggle", "mlflow", "pandas", "scikit-learn"}
    assert "pytest" not in named
    for part in made["components"]:
        files = [file for file in part["externalReferences"] if file["type"] == "distribution"]
        assert files
        assert all(file["hashes"][0]["alg"] == "SHA-256" for file in files)


class Advisories(BaseHTTPRequestHandler):
    """As OSV's ``/v1/querybatch`` and ``/v1/vulns``: it knows one weakness, of one package."""

    weak = ""
    asked: ClassVar[set[str]] = set()

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        names = [query["package"]["name"] for query in queries]
        self.asked.update(names)
        found = [{"vulns": [{"id": "GHSA-made-made-made", "modified": "2026-01-02T03:04:05Z"}]}]
        self.answer({"results": [found[0] if name == self.weak else {} for name in names]})

    def do_GET(self) -> None:
        package = {"name": self.weak, "ecosystem": "PyPI"}
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}]
        facts = {"id": "GHSA-made-made-made", "modified": "2026-01-02T03:04:05Z", "summary": "a made-up weakness"}
        self.answer({**facts, "affected": [{"package": package, "ranges": ranges}]})

    def answer(self, content: Json) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def ask_advisories() -> Iterator[Callable[[str], subprocess.CompletedProcess[str]]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Advisories) as server:
        Thread(target=server.serve_forever, daemon=True).start()

        def ask(weak: str) -> subprocess.CompletedProcess[str]:
            Advisories.weak = weak
            Advisories.asked.clear()
            command = ["make", "advisories", f"ARGS=--service-url http://127.0.0.1:{server.server_port}"]
            return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)

        yield ask
        server.shutdown()


def test_every_locked_package_is_asked_about_and_a_known_weakness_fails(
    ask_advisories: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    sound = ask_advisories("")
    assert sound.returncode == 0, sound.stderr
    assert Advisories.asked == set(locked_packages()) - {"breakhis"}
    weak = ask_advisories("pillow")
    assert weak.returncode != 0
    assert "pillow" in weak.stdout + weak.stderr
    assert "a made-up weakness" in weak.stdout + weak.stderr


def test_advisories_that_cannot_be_reached_are_no_good_news() -> None:
    command = ["make", "advisories", "ARGS=--service-url http://127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=180)
    assert done.returncode != 0


@pytest.mark.parametrize(
    "text",
    [
        "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n",
        "address = 'https://someone:" + "h7Tq2zWm9@example.org/data'\n",
        "aws = 'AKIA" + "QWERTYUIOPASDFGH'\n",
        "mlflow_password = '" + "h7Tq2zWm9'\n",
    ],
)
def test_a_secret_in_a_file_is_found(text: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.py"
    file.write_text(text)
    done = subprocess.run([".ci/scan-secrets", str(file)], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert str(file) in done.stdout


def test_what_names_a_secret_and_holds_none_is_not_reported(tmp_path: Path) -> None:
    file = tmp_path / "settings.py"
    file.write_text('password = os.environ["MLFLOW_PASSWORD"]\nPLANTED_PASSWORD = "planted-1"\n')
    done = subprocess.run([".ci/scan-secrets", str(file)], cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
