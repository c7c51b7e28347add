"""Takes docs/demo_desktop.png and docs/demo_phone.png anew, in a headless Chromium.

python tests/browser/screenshots.py --weights out/quickstart [--output docs] [--more]
"""

import argparse
import re
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from server import ROOT, serve

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
SECONDS = 30_000  # milliseconds that a busy machine may need for one step
SCROLLED = "[data-testid=stMain], [data-testid=stAppScrollToBottomContainer]"
SCENE = 1  # of the examples: "what is at"
DESKTOP = {"locale": "en-GB", "viewport": {"width": 1280, "height": 960}}
PHONE = {"locale": "zh-CN", "viewport": {"width": 390, "height": 844}, "device_scale_factor": 1.5, "is_mobile": True,
         "has_touch": True}  # fmt: skip
ANSWERED = re.compile(r"tokens of prompt \+ \d+ of answer|回答 \d+ 词元")
LOOKED = re.compile("Picture 1: |图片 1：")


def open_page(browser: Browser, address: str, settings: dict) -> Page:
    page = browser.new_context(**settings).new_page()
    page.set_default_timeout(SECONDS)
    page.goto(address)
    page.get_by_test_id("stChatInputTextArea").wait_for()
    page.locator("[class*=st-key-card_] img").nth(3).wait_for()
    page.wait_for_timeout(1000)  # fonts and pictures
    return page


def keep(page: Page, path: Path, whole: bool = False) -> None:
    """whole: the window as high as all that stands in it; a person would scroll."""
    page.mouse.move(2, 2)
    if whole:
        inside = page.locator(SCROLLED).first.evaluate("main => main.scrollHeight")
        page.set_viewport_size({"width": page.viewport_size["width"], "height": inside})
    page.wait_for_timeout(1500)
    page.screenshot(path=path)
    print(path, flush=True)


def ask_an_example(page: Page) -> None:
    """A click on the picture, as people would."""
    box = page.locator("[class*=st-key-card_] img").nth(SCENE).bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.get_by_text(ANSWERED).first.wait_for()


def take(browser: Browser, address: str, output: Path, more: bool) -> None:
    for name, settings in (("desktop", DESKTOP), ("phone", PHONE)):
        page = open_page(browser, address, settings)
        if more:
            keep(page, output / f"begin_{name}.png")
        ask_an_example(page)
        page.get_by_test_id("stCheckbox").last.click()
        page.get_by_text(LOOKED).first.wait_for()
        keep(page, output / f"demo_{name}.png", whole=True)
        page.close()
    if more:
        page = open_page(browser, address, DESKTOP)
        page.get_by_test_id("stSelectbox").nth(1).locator("input").click()
        page.get_by_role("option").nth(1).click()
        page.wait_for_timeout(1500)
        ask_an_example(page)
        page.get_by_text(ANSWERED).nth(1).wait_for()
        page.get_by_test_id("stPopover").last.click()
        keep(page, output / "compare_desktop.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "out/quickstart", help="a folder with weights")
    parser.add_argument("--address", help="of a demo that runs already; --weights is not looked at then")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--more", action="store_true", help="also the page as it begins, and two weights side by side")
    options = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    options.output.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        address = options.address
        if address is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            address = stack.enter_context(serve(options.weights.resolve(), home)).address
        driver = stack.enter_context(sync_playwright())
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        take(browser, address, options.output, options.more)
        browser.close()


if __name__ == "__main__":
    main()
