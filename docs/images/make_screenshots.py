"""Takes the pictures of README.md and review-a-promotion.md, on a stack that it sets up and stops.

``make screenshots`` runs it. It runs ``breakhis demo`` in the home folder that BREAKHIS_HOME names, which makes two
champions, and a retraining with another seed, of whose two candidates at least one passes its gates and waits. Then it
takes the grid of that retraining and goes the reviewer's way. Needs Chromium and the dependency group ``screenshots``.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

from make_reviews import ENGINEER, address, logged_in, main, start_browser, take, until
from playwright.sync_api import sync_playwright

from ml.core.airflow_api import AirflowApi
from ml.core.settings import read_settings
from ml.local.stack import Stack

BREAKHIS = str(Path(sys.executable).with_name("breakhis"))
RETRAIN = "retrain_demo"
SECONDS = 900.0


def take_all() -> None:
    """Set the stack up, take every picture, and stop the stack."""
    if not shutil.which("chromium"):
        raise SystemExit("error: there is no chromium on the PATH; install it (Debian, Ubuntu: apt install chromium)")
    subprocess.run([BREAKHIS, "demo", "demo"], check=True)
    subprocess.run([BREAKHIS, "up"], check=True)
    try:
        stack = Stack(read_settings())
        run = retrain(stack.api(ENGINEER))
        take_grid(stack, run)
        main(None)
    finally:
        subprocess.run([BREAKHIS, "down"], check=True)


def retrain(api: AirflowApi) -> str:
    """Retrain with a seed that was not used before, and wait until a candidate waits; returns the run's id."""
    run = str(api.trigger(RETRAIN, conf={"seed": int(time.time()) % 1_000_000})["dag_run_id"])
    until(lambda: api.dag_run(RETRAIN, run)["state"] == "success", f"run {run} of {RETRAIN} is done", SECONDS)
    # With some seeds, one of the two is blocked by its gates: worse than the champion by more than the margin.
    until(lambda: bool(api.list_pending_questions()), "a candidate waits for its review", SECONDS)
    return run


def take_grid(stack: Stack, run: str) -> None:
    """Take the retraining's grid in Airflow."""
    with sync_playwright() as playwright:
        browser = start_browser(playwright)
        with logged_in(browser, stack, ENGINEER) as page:
            page.goto(address(page, f"/dags/{RETRAIN}/runs/{quote(run)}"))
            page.get_by_text("train_subtype").first.wait_for()
            take(page, "grid")
        browser.close()


if __name__ == "__main__":
    take_all()
