"""A page of the demo in a test: what a person does on it, and what stands there then."""

from io import BytesIO

import pytest

from helpers.data import make_picture

pytest.importorskip("streamlit", reason="the demo needs streamlit: pip install -r requirements.txt")
from streamlit.testing.v1 import AppTest

from model.inference.answerer import Answer
from scripts.demo.chat import Turn


def png(seed: int = 1) -> bytes:
    file = BytesIO()
    make_picture(seed).save(file, "PNG")
    return file.getvalue()


def checked(page: AppTest) -> AppTest:
    assert not page.exception
    return page


def ask(page: AppTest, question: str, *files: bytes) -> AppTest:
    message = page.chat_input[0].set_value(question)
    for content in files:
        message.upload("../../etc/x.png", content)
    return checked(page.run())


def turns_of(page: AppTest) -> list[Turn]:
    return page.session_state.chat.turns


def answer_of(page: AppTest, number: int = -1) -> Answer:
    return turns_of(page)[number].replies[0].answer


def texts(page: AppTest) -> list[str]:
    return [element.value for element in page.text]


def pictures_on(page: AppTest) -> list[int]:
    """How many pictures each of the messages shows."""
    return [sum(len(image.proto.imgs) for image in message.image) for message in page.chat_message]


def click(page: AppTest, key: str) -> AppTest:
    page.button(key=key).click()
    return checked(page.run())


def toggle(page: AppTest) -> AppTest:
    page.toggle[-1].set_value(True)
    return checked(page.run())
