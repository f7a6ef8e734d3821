"""Goes the way of review-a-promotion.md in a browser, from the log-in to a rollback, and takes that page's pictures.

Needs Chromium, the dependency group ``screenshots``, and a local stack in which a version waits that would replace a
champion: ``breakhis demo``, ``breakhis up``, and a run of the DAG retrain_demo with another seed. It approves and rolls
back for real, and rolls forth again by keyboard: use a stack that is for trying things.
``python docs/images/make_reviews.py [MODEL]``

It fails where a person could not go on: no champion after an approval, a page that has to be scrolled sideways, what
axe finds to be a serious fault, or a review that the keyboard alone cannot answer.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import axe_playwright_python
from PIL import Image
from playwright.sync_api import Browser, Frame, Locator, Page, Playwright, sync_playwright

from ml.core.settings import read_settings
from ml.core.store import Store
from ml.local.stack import Stack
from ml.promotion.audit_log import read_decisions
from ml.promotion.reviews import APPROVE, ROLLBACK
from ml.registry.registered_model import RegisteredModel

HERE = Path(__file__).parent
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
AUDIT = "audit"
ENGINEER, REVIEWER = "engineer", "reviewer"
WIDTH, HEIGHT = 1280, 800
WHY = "Read the figures, the warnings and the maps. For trying the workflow only."
WHY_FORTH = "It was another scanner's fault, which is mended."
WHY_BACK = "Too many false alarms at 400X since Monday."
WHY_CONFIRMED = "Seen the same in our clinic; the former version is the safer one."
LIST = "/plugin/model-reviews"
OURS = "/breakhis/reviews/"


def main(model: str | None) -> None:
    """Review, approve, see the champion change, roll back; then the keyboard and axe."""
    stack = Stack(read_settings())
    check_audit(stack)
    with sync_playwright() as playwright:
        browser = start_browser(playwright)
        with logged_in(browser, stack, REVIEWER, shown=True) as page:
            found, version, before = read(page, model)
            approve(page, found, version)
        with logged_in(browser, stack, ENGINEER) as page:
            ask_for_rollback(page, found, before, WHY_BACK, "rollback-ask")
        with logged_in(browser, stack, REVIEWER) as page:
            confirm_rollback(page, found, version, before)
        with logged_in(browser, stack, ENGINEER) as page:
            ask_for_rollback(page, found, version, WHY_FORTH)
        with logged_in(browser, stack, REVIEWER) as page:
            find_question(page, found, version)
            walk_by_keyboard(page, found, version)
        browser.close()


def check_audit(stack: Stack) -> None:
    """Have the audit log checked, as Airflow does every night: the pages say when it was."""
    api = stack.api(ENGINEER)
    run = api.trigger(AUDIT)["dag_run_id"]
    until(lambda: api.dag_run(AUDIT, run)["state"] == "success", "the audit log is whole")


# --- the reviewer's way -----------------------------------------------------------------------------------------------


def read(page: Page, model: str | None) -> tuple[str, int, int]:
    """Find the review of a version that would replace a champion, and read it: (model, version, champion)."""
    page.goto(address(page, LIST))
    inside = ours(page)
    inside.get_by_role("heading", name="Model reviews").wait_for()
    take(page, "review-list")
    check(page, "the list")
    evidence = inside.get_by_role("link", name=f"Read and answer: Promote {model or ''}")
    for k in range(evidence.count()):
        evidence.nth(k).click()
        inside = ours(page, "*/bundle-*")
        inside.get_by_role("heading", name="Gates").wait_for()
        if inside.get_by_role("heading", name="What got worse").count():
            break
        page.goto(address(page, LIST))
        inside = ours(page)
        evidence = inside.get_by_role("link", name=f"Read and answer: Promote {model or ''}")
    else:
        raise SystemExit("error: no version waits that would replace a champion; run retrain_demo with another seed")
    found, _, version = inside.locator("h1").inner_text().partition(" version ")
    take(page, "review-page")
    check(page, "a candidate")
    to_top(inside.get_by_role("heading", name="Beside the champion"))
    inside.locator("table .word", has_text="power").first.focus()
    take(page, "review-comparison")
    to_top(inside.get_by_role("heading", name="Magnifications, sources"))
    take(page, "review-slices")
    for image in inside.locator("img").all():
        image.scroll_into_view_if_needed()  # they are loaded when they come into sight
    to_top(inside.get_by_role("heading", name="Can the probabilities be believed?"))
    take(page, "review-pictures")
    with page.context.expect_page() as opened:
        inside.get_by_role("link", name="Report of the candidate").click()
    opened.value.get_by_role("heading", name="Model card").first.wait_for()
    opened.value.close()
    return found, int(version), int(champion_of(found) or 0)


def champion_of(model: str) -> int | None:
    """Returns the version that the alias champion is on."""
    return RegisteredModel(model, read_settings()).aliases().champion


def approve(page: Page, model: str, version: int) -> None:
    """Answer on the page, and see that the champion has changed."""
    answer(page, f"{APPROVE} {model} version {version}", WHY, "review-answer", "review-confirm")
    until(
        lambda: champion_of(model) == version,
        f"{model} version {version} is the champion",
    )
    until(lambda: decision(model) == ("approved", version), "the approval is in the audit log")
    page.goto(address(page, LIST))
    ours(page).get_by_text(WHY).first.wait_for()
    to_top(ours(page).get_by_role("heading", name="Decided"))
    take(page, "review-decided")
    print(f"{model} version {version} was approved and is the champion")


def ask_for_rollback(page: Page, model: str, version: int, why: str, picture: str = "") -> None:
    """An engineer asks to go back to the former champion, in Airflow's form of the DAG rollback."""
    page.goto(address(page, f"/dags/{ROLLBACK}"))
    page.get_by_role("button", name="Trigger").first.click()
    page.locator("#element_model").fill(model)
    page.locator("#element_version").fill(str(version))
    page.locator("#element_reason").fill(why)
    if picture:
        take(page, picture)
    page.get_by_role("button", name="Trigger").last.click()
    page.locator("#element_model").wait_for(state="detached")


def find_question(page: Page, model: str, back_to: int) -> Locator:
    """The link to the evidence of a rollback, on the list, as soon as it is asked."""
    for _ in range(60):
        page.goto(address(page, LIST))
        inside = ours(page)
        inside.get_by_role("heading", name="Model reviews").wait_for()
        evidence = inside.get_by_role("link", name=f"Read and answer: Go back to {model} version {back_to}")
        if evidence.count():
            return evidence
        page.wait_for_timeout(2000)
    raise SystemExit(f"error: nobody is asked whether to go back to {model} version {back_to}")


def confirm_rollback(page: Page, model: str, version: int, back_to: int) -> None:
    """The reviewer finds the question, looks at the evidence, confirms it, and sees the alias go back."""
    find_question(page, model, back_to).click()
    ours(page, "*/bundle-*").get_by_text("somebody asks to go back to it").wait_for()
    check(page, "the evidence of a rollback")
    answer(page, f"{APPROVE} going back to {model} version {back_to}", WHY_CONFIRMED, "rollback-answer")
    until(
        lambda: champion_of(model) == back_to,
        f"{model} version {back_to} is the champion again",
    )
    until(lambda: decision(model) == ("rolled back", back_to), "the rollback is in the audit log")
    assert RegisteredModel(model, read_settings()).aliases().previous == version
    page.goto(address(page, LIST))
    ours(page).get_by_text(WHY_CONFIRMED).first.wait_for()
    to_top(ours(page).get_by_role("heading", name="Decided"))
    take(page, "rollback-decided")
    check(page, "the list after decisions")
    print(f"{model} is back at version {back_to}")


def answer(page: Page, what: str, reason: str, picture: str, picture_of_confirmation: str = "") -> None:
    """Approve on a review's page in both steps, and see that it says so; ``what`` is what is confirmed."""
    inside = ours(page, "*/bundle-*")
    inside.get_by_label("Your reason").fill(reason)
    inside.get_by_label("Your reason").blur()
    to_end(inside.get_by_role("link", name="Airflow's own form"))
    take(page, picture)
    inside.get_by_role("button", name=f"{APPROVE}…").click()
    inside.get_by_role("heading", name=f"{what}?").wait_for()
    check_frame(inside, "the confirmation framed by Airflow")
    if picture_of_confirmation:
        take(page, picture_of_confirmation)
    inside.get_by_role("button", name=what).click()
    inside.locator(".note", has_text="It is being carried out").wait_for()


def walk_by_keyboard(page: Page, model: str, version: int) -> None:
    """From the list over the evidence to the approval of a rollback by Tab and Enter alone, on the page itself."""
    page.goto(address(page, OURS))
    press_to(page, f"Read and answer: Go back to {model} version {version}")
    page.keyboard.press("Enter")
    page.wait_for_url("**/bundle-*/")
    press_to(page, "champion")
    bubble = page.locator(".word:focus span")
    assert bubble.is_visible(), "what a word means is not shown to the keyboard"
    press_to(page, "Your reason")
    page.keyboard.type(WHY_FORTH)
    press_to(page, f"{APPROVE}…")
    page.keyboard.press("Enter")
    page.wait_for_url("**/confirm")
    what = f"{APPROVE} going back to {model} version {version}"
    assert focused(page) == what, f"the button of the confirmation does not have the focus, but {focused(page)!r}"
    page.keyboard.press("Enter")
    page.locator(".note", has_text="It is being carried out").wait_for()
    until(lambda: champion_of(model) == version, f"{model} version {version} is the champion once more")
    print(f"by keyboard alone: list, evidence, meaning of a word, reason, {what}")


# --- what is demanded of our pages ------------------------------------------------------------------------------------


def check(page: Page, what: str) -> None:
    """Fail where our page, framed by Airflow or by itself, has a serious fault or is wider than its window."""
    framed = next(frame for frame in page.frames if OURS in frame.url)
    alone = page.context.new_page()
    alone.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    alone.goto(framed.url)
    for where, frame in (("framed by Airflow", framed), ("by itself", alone.main_frame)):
        check_frame(frame, f"{what} {where}")
    alone.close()


def check_frame(frame: Frame, what: str) -> None:
    """The same of one frame."""
    wide = frame.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    faults = serious_faults(frame)
    print(f"{what}: {len(faults)} serious faults, {wide} pixels of sideways scrolling at {WIDTH}")
    if wide > 0 or faults:
        raise SystemExit("\n".join([f"error: {what} does not hold", *faults]))


def serious_faults(frame: Frame) -> list[str]:
    """What axe finds in a frame that is serious or critical, one line each."""
    frame.evaluate(AXE)
    found = frame.evaluate("async () => (await axe.run(document)).violations")
    return [
        f"{one['impact']}: {one['help']}: {node['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


# --- a browser --------------------------------------------------------------------------------------------------------


def start_browser(playwright: Playwright) -> Browser:
    """The machine's own Chromium, without a window."""
    return playwright.chromium.launch(
        executable_path=shutil.which("chromium"),
        args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"],
    )


@contextmanager
def logged_in(browser: Browser, stack: Stack, user: str, *, shown: bool = False) -> Iterator[Page]:
    """A page of a browser in which somebody is logged in to Airflow; ``shown`` takes a picture of the log-in."""
    with browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}) as context:
        page = context.new_page()
        url = stack.api(user).url
        page.goto(f"{url}/auth/login")
        page.fill("input[name=username]", user)
        page.fill("input[name=password]", stack.passwords()[user])
        if shown:
            take(page, "review-login")
        page.click("button[type=submit]")
        page.wait_for_url(lambda at: "/auth/login" not in at)
        yield page


def ours(page: Page, path: str = "*") -> Frame:
    """Our page in Airflow's frame."""
    for _ in range(100):
        for frame in page.frames[1:]:
            if OURS in frame.url and ("bundle-" in frame.url) == ("bundle" in path):
                frame.wait_for_load_state()
                return frame
        page.wait_for_timeout(100)
    raise SystemExit(f"error: {page.url} shows no page of ours")


def address(page: Page, path: str) -> str:
    """A page of the same Airflow."""
    return "/".join(page.url.split("/")[:3]) + path


def press_to(page: Page, text: str) -> None:
    """Press Tab until something with this text has the focus."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if focused(page).startswith(text):
            return
    raise SystemExit(f"error: on {page.url} Tab does not reach {text!r}")


def focused(page: Page) -> str:
    """The name of what has the focus: of its label, or what it shows."""
    found = page.evaluate("""() => {
        const element = document.activeElement;
        return element.getAttribute("aria-label") ?? (element.labels?.[0] ?? element).textContent;
    }""")
    return str(found).strip()


def to_top(element: Locator) -> None:
    """Scroll until an element is at the top."""
    element.evaluate("e => e.scrollIntoView({block: 'start'})")


def to_end(element: Locator) -> None:
    """Scroll until an element is at the bottom."""
    element.evaluate("e => e.scrollIntoView({block: 'end'})")


def until(holds: Callable[[], bool], what: str, seconds: float = 600) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: waited {seconds:.0f} s, and not: {what}")
        time.sleep(1)


def decision(model: str) -> tuple[str, int]:
    """The last decision about a model."""
    last = read_decisions(Store(read_settings().store), model)[0]
    return last["event"], last["version"]


def take(page: Page, name: str) -> None:
    """Save what is seen, when it has settled."""
    page.wait_for_timeout(1500)
    shot = Image.open(BytesIO(page.screenshot()))
    shot.quantize(128).save(HERE / f"{name}.png", optimize=True)  # a third of the size, and looks the same


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
