"""Takes the pictures of add-a-data-source.md from the local stack, once its chapters 1 to 6 were followed.

Needs Chromium and the dependency group ``screenshots``: ``python docs/images/make.py``.
"""

import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ml.core.settings import read_settings
from ml.local.stack import Stack

HERE = Path(__file__).parent
DAG = "ingest_our-biopsies"


def main() -> None:
    """Log in as the engineer and take each picture."""
    stack = Stack(read_settings())
    api = stack.api("engineer")
    runs = api._all(f"/api/v2/dags/{DAG}/dagRuns", "dag_runs")
    first = {state: next(run["dag_run_id"] for run in runs if run["state"] == state) for state in ("success", "failed")}
    validation = api.xcom(DAG, first["success"], "validate")["validation"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = browser.new_page(viewport={"width": 1440, "height": 600})
        page.goto(f"{api.url}/auth/login")
        page.fill("input[name=username]", "engineer")
        page.fill("input[name=password]", stack.passwords()["engineer"])
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "/auth/login" not in url)

        def take(name: str, address: str, ready: Callable[[Page], None]) -> None:
            page.goto(api.url + address)
            ready(page)
            page.wait_for_timeout(2000)  # the grid's bars grow into place
            shot = Image.open(BytesIO(page.screenshot()))
            shot.quantize(128).save(HERE / f"{name}.png", optimize=True)  # a third of the size, and looks the same

        validate = "/dags/{}/runs/{}/tasks/validate"
        take(
            "green",
            validate.format(DAG, first["success"]) + "/details",
            lambda page: page.get_by_text("Extra Links").wait_for(),
        )
        take(
            "quarantine",
            f"/breakhis/docs/{validation}/quarantine.html",
            lambda page: page.get_by_text("slide_with_two_subtypes").first.wait_for(),
        )
        take(
            "red", validate.format(DAG, first["failed"]), lambda page: page.get_by_text("images_lost").first.wait_for()
        )
        browser.close()


if __name__ == "__main__":
    main()
