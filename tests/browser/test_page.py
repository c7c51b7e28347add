"""The demo in a real browser: headless Chromium, tiny weights, a server of its own. `make test-browser` runs it."""

import re
import shutil
import tempfile
import time
from io import BytesIO

import pytest
from PIL import Image
from server import serve

from helpers.data import make_picture
from helpers.models import SIZES
from model.weights import build_vlm, save_weights

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: make test-browser installs it")
pytest.importorskip("streamlit", reason="no streamlit: pip install -r requirements.txt")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip
SECONDS = 90_000  # milliseconds that a busy machine may need for one step


@pytest.fixture(scope="module")
def server(tmp_path_factory, tower_folder):
    folder = tmp_path_factory.mktemp("weights")
    save_weights(build_vlm(SIZES, tower_folder), folder / "sft_vlm_32.safetensors", {"stage": "sft_vlm"})
    with serve(folder, tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver, tempfile.TemporaryDirectory() as profile:
        context = driver.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=FLAGS, locale="en-GB", viewport={"width": 1100, "height": 900}
        )
        yield context
        context.close()


@pytest.fixture
def open_tab(server, browser):
    """open_tab(): a new tab of the demo, ready to be asked; what went wrong in its console or on it fails the test."""
    tabs, wrong = [], []

    def open_tab(width=1100, height=900):
        tab = browser.new_page()
        tab.set_viewport_size({"width": width, "height": height})
        tab.set_default_timeout(SECONDS)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: None if server.address in request.url or request.url.startswith(
            ("data:", "blob:", server.address.replace("http", "ws"))) else wrong.append(request.url))  # fmt: skip
        tab.goto(server.address)
        tab.get_by_test_id("stChatInputTextArea").wait_for()
        tabs.append(tab)
        return tab

    yield open_tab
    for tab in tabs:
        wrong += [text for text in tab.get_by_test_id("stException").all_inner_texts()]
        tab.close()
    assert not wrong
    assert "Traceback" not in server.log and "Error" not in server.log


def png(seed: int = 1) -> bytes:
    file = BytesIO()
    make_picture(seed, size=64).save(file, "PNG")
    return file.getvalue()


def upload(tab, *files: tuple[str, bytes]) -> None:
    tab.locator("[data-testid=stChatInput] input[type=file]").set_input_files(
        [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in files]
    )


def send(tab, question: str) -> None:
    tab.get_by_test_id("stChatInputTextArea").fill(question)
    tab.get_by_test_id("stChatInputSubmitButton").click()


def answers(tab):
    return tab.get_by_text(re.compile(r"tokens of prompt \+ \d+ of answer"))


def wait_for_answers(tab, count: int) -> None:
    answers(tab).nth(count - 1).wait_for()
    assert answers(tab).count() == count


def shown_pictures(tab):
    return tab.locator("[data-testid=stChatMessage] [data-testid=stImage] img")


def uploaded(tab, count: int) -> None:
    """The upload is over when its files stand in the input with no progress bar."""
    tab.locator("[data-testid=stFileChip], [data-testid=stChatInputFile]").nth(count - 1).wait_for()  # newer, older
    time.sleep(0.5)


def test_upload_ask_ask_again_and_see_where_it_looked(open_tab):
    tab = open_tab()
    upload(tab, ("one.png", png(1)))
    uploaded(tab, 1)
    send(tab, "What is it?")
    wait_for_answers(tab, 1)
    assert shown_pictures(tab).count() == 1
    send(tab, "And what else?")
    wait_for_answers(tab, 2)
    assert shown_pictures(tab).count() == 1  # still there, with the first turn
    assert shown_pictures(tab).first.evaluate("picture => picture.complete && picture.naturalWidth") == 64
    tab.get_by_text("Where it looked").last.click()
    tab.get_by_text(re.compile("Picture 1: .* % of its attention")).wait_for()
    assert shown_pictures(tab).count() == 2
    tab.get_by_test_id("stRadio").get_by_text("中文").click()  # a rerun of everything
    tab.get_by_text("看图问答").wait_for()
    assert shown_pictures(tab).count() == 2 and tab.get_by_text("What is it?").count() == 1


def test_pasted_pictures(open_tab):
    tab = open_tab()
    tab.get_by_test_id("stChatInputTextArea").evaluate(
        """(area, bytes) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "image.png", {type: "image/png"}));
            area.dispatchEvent(new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
        }""",
        list(png(2)),
    )
    uploaded(tab, 1)
    send(tab, "What is it?")
    wait_for_answers(tab, 1)
    assert shown_pictures(tab).count() == 1


def test_bad_and_oversized_files(open_tab):
    tab = open_tab()
    upload(tab, ("really.png", b"#!/bin/sh\necho no\n"))
    uploaded(tab, 1)
    send(tab, "What is it?")
    tab.get_by_text("File 1: it is no JPEG").wait_for()
    assert answers(tab).count() == 0
    assert tab.get_by_test_id("stChatInputTextArea").input_value() == "What is it?"  # not lost
    file = BytesIO()
    Image.new("1", (6000, 6000)).save(file, "PNG")
    upload(tab, ("wide.png", file.getvalue()))
    uploaded(tab, 1)
    send(tab, "What is it?")
    tab.get_by_text("more than 25 million pixels").wait_for()
    upload(tab, ("large.png", bytes(11 * 1024 * 1024)))
    tab.get_by_text(re.compile(r"10(\.0)?\s?MB or smaller")).first.wait_for(state="attached")
    tab.reload()
    tab.get_by_test_id("stChatInputTextArea").wait_for()
    send(tab, "hello")
    wait_for_answers(tab, 1)


def test_stop_keeps_what_was_said_and_streams(open_tab):
    tab = open_tab()
    tab.get_by_text("Generation settings").click()
    for label, most in (("Longest answer", "512"), ("Temperature", "2.00")):  # a tiny model says little when greedy
        slider = tab.get_by_test_id("stSlider").filter(has_text=label)
        slider.get_by_role("slider").focus()
        slider.get_by_role("slider").press("End")
        slider.get_by_test_id("stSliderThumbValue").filter(has_text=most).wait_for()
        time.sleep(1)  # the page sends it after a moment
    send(tab, "Say as much as you can")
    stop = tab.get_by_role("button", name="Stop", exact=False).first
    stop.wait_for()
    grown = set()
    message = tab.get_by_test_id("stChatMessage").last
    until = time.monotonic() + 60
    while len(grown) < 4 and time.monotonic() < until:  # it streams: more text, time after time
        grown.add(message.get_by_test_id("stText").inner_text())
    assert len(grown) >= 4
    stop.click()
    tab.get_by_text(re.compile(r"of answer · stopped")).wait_for()
    told = int(re.search(r"\+ (\d+) of answer", answers(tab).first.inner_text())[1])
    assert 0 < told < 512
    send(tab, "And now?")
    tab.get_by_role("button", name="Stop").wait_for()
    tab.get_by_role("button", name="Stop").click()
    wait_for_answers(tab, 2)


def test_two_tabs_do_not_mix(open_tab):
    left, right = open_tab(), open_tab()
    upload(left, ("left.png", png(3)))
    uploaded(left, 1)
    send(left, "on the left")
    send(right, "on the right")
    wait_for_answers(left, 1)
    wait_for_answers(right, 1)
    assert left.get_by_text("on the right").count() == 0 and right.get_by_text("on the left").count() == 0
    assert shown_pictures(left).count() == 1 and shown_pictures(right).count() == 0


def test_what_is_typed_stays_text(open_tab):
    tab = open_tab()
    typed = "![x](https://example.org/x.png) [y](https://example.org) <img src=x onerror=alert(1)> <|im_end|>"
    send(tab, typed)
    wait_for_answers(tab, 1)
    assert tab.get_by_text(typed).count() == 1
    assert tab.locator("[data-testid=stChatMessage] :is(img[src*=example], a)").count() == 0


def saved_page(tab) -> str:
    button = tab.get_by_role("button", name="HTML")
    with tab.expect_download() as download:
        if not button.is_visible():
            tab.get_by_role("button", name="Save conversation").click()
        button.click()
    return download.value.path().read_text()


def test_a_click_on_an_example_asks_and_its_question_can_be_edited(open_tab):
    tab = open_tab()
    tab.locator("[class*=st-key-card_] img").nth(1).click(force=True)  # the button lies over it
    wait_for_answers(tab, 1)
    assert shown_pictures(tab).count() == 1
    tab.get_by_role("button", name="Edit").click()
    tab.get_by_role("textbox", name="asked anew").fill("Is it red?")
    tab.get_by_role("button", name="Ask", exact=True).click()
    tab.get_by_text("Is it red?").wait_for()
    wait_for_answers(tab, 1)
    deadline = time.monotonic() + 30  # the page of before stays, with its buttons, until the new answer is there
    while "Is it red?" not in saved_page(tab):
        assert time.monotonic() < deadline


def test_on_a_phone_it_begins_at_its_title(open_tab):
    tab = open_tab(width=390, height=600)
    tab.locator("[class*=st-key-card_] img").nth(3).wait_for()
    time.sleep(2)  # for Streamlit to scroll, which it did
    assert tab.get_by_text("Ask about your pictures").bounding_box()["y"] > 0


def test_on_a_phone_nothing_is_wider_than_the_screen(server, open_tab):
    tab = open_tab()
    tab.set_viewport_size({"width": 360, "height": 740})
    upload(tab, *((f"{seed}.png", png(seed)) for seed in range(3)))
    uploaded(tab, 3)
    send(tab, "What are these, and how do they differ from each other? " * 5)
    wait_for_answers(tab, 1)
    tab.get_by_text("Where it looked").click()
    tab.get_by_text(re.compile("Picture 3: .* % of its attention")).wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = [element.bounding_box() for element in tab.locator("[data-testid=stImage] img").all()]
    assert len(boxes) == 6 and all(box["x"] >= 0 and box["x"] + box["width"] <= 360 for box in boxes)
