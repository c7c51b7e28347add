"""Boxes of an answer on the browser demo's page: drawn on the last picture, and only where there are some."""

from io import BytesIO
from types import SimpleNamespace

import pytest
from PIL import Image

from dataset.box_drawing import draw_boxes
from helpers.data import make_picture

pytest.importorskip("streamlit", reason="the demo needs streamlit: pip install -r requirements.txt")
from streamlit.testing.v1 import AppTest

from model.inference.answerer import Answer, Options
from model.views import Frames, Sight, Times
from scripts.demo.chat import Chat, Reply, Turn
from scripts.demo.limits import Picture, prepare_picture


def one_reply() -> None:
    """The page: the last answer of the tab's conversation."""
    import streamlit as st

    from scripts.demo.view import show_reply

    show_reply(st.session_state.chat, len(st.session_state.chat.turns) - 1, 0)


def shown(answer: str, *pictures: list[int]) -> AppTest:
    """The page where an answer is shown. pictures: numbers of those that each turn has brought."""
    turns = []
    for numbers in pictures:
        reply = Reply(SimpleNamespace(sight=Sight(32)), Options(), answer=Answer(answer, (300, 2), 9, 2, 0.1, 10.0))
        turns.append(
            Turn("?", [prepare_picture(make_picture(number), Sight(32)) for number in numbers], replies=[reply])
        )
    page = AppTest.from_function(one_reply)
    page.session_state.language, page.session_state.chat = "en", Chat(None, turns)
    page.run()
    assert not page.exception and page.text[0].value == answer
    return page


@pytest.mark.parametrize("pictures", [([1],), ([1, 2],), ([1], [2], [])])
def test_boxes_are_drawn_on_the_last_picture(pictures, monkeypatch):
    drawn = []

    def draw(picture: Image.Image, text: str) -> Image.Image | None:
        drawn.append((picture.tobytes(), text))
        return draw_boxes(picture, text)

    monkeypatch.setattr("scripts.demo.view.draw_boxes", draw)
    page = shown("cat <box> 10 10 50 50", *pictures)
    assert len(page.image[0].proto.imgs) == len(page.image) == 1
    last = page.session_state.chat.turns[min(len(pictures) - 1, 1)].pictures[-1].shown
    assert drawn == [(Image.open(BytesIO(last)).tobytes(), "cat <box> 10 10 50 50")]


@pytest.mark.parametrize(("answer", "pictures"), [("a cat at the top", ([1],)), ("cat <box> 10 10 50 50", ([], []))])
def test_nothing_is_drawn_where_there_are_no_boxes_or_no_picture(answer, pictures):
    assert not shown(answer, *pictures).image


def test_a_video_is_passed_over(monkeypatch):
    """Its strip shows many times; a box of the answer is about the picture beside it."""
    frames = Frames([make_picture(3)], Times(("0:01",)))
    film = Picture(prepare_picture(make_picture(3), Sight(32)).shown, frames)
    still = prepare_picture(make_picture(1), Sight(32))
    monkeypatch.setattr(f"{__name__}.prepare_picture", lambda picture, sight: {1: still, 3: film}[picture])
    monkeypatch.setattr(f"{__name__}.make_picture", lambda number: number)
    drawn = []
    monkeypatch.setattr("scripts.demo.view.draw_boxes", lambda picture, text: drawn.append(picture.tobytes()))
    shown("cat <box> 10 10 50 50", [1, 3])
    assert drawn == [Image.open(BytesIO(still.shown)).tobytes()]
    shown("cat <box> 10 10 50 50", [3])
    assert len(drawn) == 1
