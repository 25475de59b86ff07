"""The page in headless Chromium: keyboard alone, light and dark, wide and narrow, and text that is no markup.

Needs the package playwright and a Chromium, named by TEAL_CHROMIUM or on the path: `make test-page`.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import live_server
import pytest
from live_server import Live, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("TEAL_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-headless-shell", "google-chrome"))), None
)
if CHROMIUM is None:
    pytest.skip("there is no Chromium (TEAL_CHROMIUM names one)", allow_module_level=True)

calibrated = pytest.fixture(scope="module")(live_server.calibrated)
LONG = 100_000
"""Tokens that take a tiny model longer than a person needs to press a key."""
SHOTS = os.environ.get("TEAL_SCREENSHOTS")
"""A folder for screenshots, to be looked at."""
SECONDS_60 = 60_000


@pytest.fixture(scope="module")
def live(calibrated: Path) -> Iterator[Live]:
    options = {"sparsity": [0.5, 0.3], "context": LONG + 1000, "max_new_tokens": LONG, "slots": 2}
    with serving(calibrated / "tiny", calibrated / "runs", **options) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=["light wide", "dark narrow"])
def page(request: pytest.FixtureRequest, browser, live: Live) -> Iterator:
    scheme, width = request.param.split()
    size = {"wide": {"width": 1280, "height": 800}, "narrow": {"width": 360, "height": 740}}[width]
    context = browser.new_context(color_scheme=scheme, viewport=size, reduced_motion="reduce")
    found = context.new_page()
    found.set_default_timeout(SECONDS_60)
    said: list[str] = []
    found.on("console", lambda message: said.append(message.text) if "Failed to load" not in message.text else None)
    found.on("pageerror", lambda error: said.append(str(error)))
    elsewhere: list[str] = []
    found.on("request", lambda asked: elsewhere.append(asked.url) if not asked.url.startswith(live.address) else None)
    found.goto(live.address)
    found.wait_for_selector("#send:not([disabled])")
    yield found
    _shoot(found, f"{request.node.name.split('[')[0]} {request.param}")
    assert not said
    assert not elsewhere
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert found.evaluate(overflow) <= 0
    context.close()


def _shoot(page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name.replace(' ', '-')}.png")


def _focused(page) -> str:
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def _tab_to(page, name: str) -> None:
    for _ in range(30):
        if name in _focused(page):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"no Tab leads to {name}")


def test_a_conversation_by_the_keyboard_alone(page, live: Live) -> None:
    _tab_to(page, "prompt")
    page.keyboard.type("the quick brown fox")
    _tab_to(page, "sparsity")
    assert page.get_attribute("#sparsity", "aria-valuetext") == "0.5"
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#level") == "0.3"
    page.keyboard.press("ArrowRight")
    _tab_to(page, "most")
    page.keyboard.type("40")
    _tab_to(page, "send")
    page.keyboard.press("Enter")
    page.wait_for_selector(".again:not([hidden])")
    figures = page.text_content(".figures")
    assert "40 tokens" in figures
    assert "tokens/s" in figures
    assert "realised sparsity 0." in figures
    sparse = page.text_content(".answer .text")
    _tab_to(page, "again")
    page.keyboard.press("Enter")
    page.wait_for_selector(".parting:not([hidden])")
    texts = page.locator(".answer .text").all_text_contents()
    assert texts[0] == sparse
    assert len(texts) == 2
    # What stands before the marks is the same, what is in them is not.
    marks = page.locator(".answer mark").all_text_contents()
    assert "part after" in page.text_content(".parting")
    assert len(marks) == 2
    assert texts[0].removesuffix(marks[0]) == texts[1].removesuffix(marks[1])
    assert marks[0] != marks[1]
    # A second turn.
    _tab_to(page, "prompt") if "prompt" in _focused(page) else page.focus("#prompt")
    page.keyboard.type("over the lazy dog")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn:nth-of-type(2) .again:not([hidden])")
    live.wait_until_idle()


def test_escape_stops_an_answer_and_frees_its_slot(page, live: Live) -> None:
    before = live.statistics().finished.get("cancelled", 0)
    page.focus("#prompt")
    page.keyboard.type("count the stars")
    page.keyboard.press("Enter")
    page.locator(".figures", has_text="token").wait_for()
    page.keyboard.press("Escape")
    page.locator(".figures", has_text="stopped").wait_for()
    live.wait_until_idle()
    assert live.statistics().finished["cancelled"] == before + 1
    page.click("#new")
    assert page.locator(".turn").count() == 0
    assert "prompt" in _focused(page)


def test_what_people_and_models_write_is_no_markup(page, live: Live) -> None:
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    answer = 'data: {"choices":[{"index":0,"delta":{"content":' + _json(hostile) + '},"finish_reason":"stop"}]}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=answer, content_type="text/event-stream"))
    page.fill("#prompt", hostile)
    page.keyboard.press("Enter")
    page.wait_for_selector(".again:not([hidden])")
    page.click(".again")
    page.wait_for_selector(".parting:not([hidden])")
    assert page.text_content(".question") == hostile
    assert page.locator(".answer .text").all_text_contents() == [hostile, hostile]
    assert page.text_content(".parting") == "The two texts are the same."
    assert page.locator("main img, main script").count() == 0
    assert page.title() == "teal"


def _json(text: str) -> str:
    import json

    return json.dumps(text)


def test_an_error_is_said(page) -> None:
    page.fill("#most", str(LONG + 1))
    page.fill("#prompt", "x")
    page.focus("#prompt")
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert f"at most {LONG:,}" in page.text_content("#problem")
    assert page.input_value("#prompt") == "x"
