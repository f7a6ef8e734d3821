"""Goes a reviewer's way in a browser, from the log-in to a rollback, and takes the pictures of review-a-promotion.md.

Needs Chromium and the dependency group ``screenshots``, and a local stack in which reviews wait, such as after
``make run``: ``python docs/images/make_reviews.py``. It approves for real: use a stack that is for trying things.
"""

import shutil
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ml.local.stack import Stack
from ml.registry import aliases_of
from ml.settings import settings

HERE = Path(__file__).parent
REVIEWER = "reviewer"


def main() -> None:
    """Find the first waiting review, read its page, approve it, and see the champion change."""
    stack = Stack(settings())
    url = stack.api(REVIEWER).url
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(f"{url}/auth/login")
        page.fill("input[name=username]", REVIEWER)
        page.fill("input[name=password]", stack.passwords()[REVIEWER])
        take(page, "review-login")
        page.click("button[type=submit]")
        page.wait_for_url(lambda url: "/auth/login" not in url)

        page.goto(f"{url}/plugin/model-reviews")
        inside = page.frame_locator("iframe")
        inside.get_by_role("heading", name="Model reviews").wait_for()
        take(page, "review-list")

        inside.get_by_role("link", name="evidence").first.click()
        inside.get_by_role("heading", name="Gates").wait_for()
        take(page, "review-page")
        model, _, version = inside.locator("h1").inner_text().partition(" version ")
        wide = inside.locator("html").evaluate("e => e.scrollWidth - e.clientWidth")
        print(f"{model} version {version}: {wide} pixels of sideways scrolling at 1280")
        inside.get_by_role("heading", name="Figures").scroll_into_view_if_needed()
        inside.locator(".word").nth(12).focus()
        take(page, "review-figures")

        inside.get_by_role("link", name="Answer in Airflow").scroll_into_view_if_needed()
        inside.get_by_role("link", name="Answer in Airflow").click()
        page.wait_for_url("**/required_actions**")
        page.get_by_text("Reason").first.wait_for()
        page.locator("input[name*=reason], textarea[name*=reason], #element_reason").first.fill(
            "Read the page: figures and maps are plausible."
        )
        take(page, "review-answer")
        page.get_by_role("button", name="Approve").click()
        page.wait_for_timeout(2000)
        for _ in range(120):
            if aliases_of(model, settings()).champion == int(version):
                break
            page.wait_for_timeout(1000)
        else:
            raise SystemExit(f"error: {model} version {version} has not become champion")
        page.goto(f"{url}/plugin/model-reviews")
        inside.get_by_role("heading", name="Decided").wait_for()
        take(page, "review-decided")
        browser.close()


def take(page: Page, name: str) -> None:
    """Save what is seen, when it has settled."""
    page.wait_for_timeout(1500)
    shot = Image.open(BytesIO(page.screenshot()))
    shot.quantize(128).save(HERE / f"{name}.png", optimize=True)  # a third of the size, and looks the same


if __name__ == "__main__":
    main()
