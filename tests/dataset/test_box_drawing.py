"""Boxes drawn: where they are, in colours that tell them apart, with names that do not cover one another."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from dataset import box_drawing
from dataset.box_drawing import COLOURS, DARK, LEAST_SIDE, draw_boxes


@pytest.fixture
def plates(monkeypatch) -> list[tuple]:
    """Where the names are drawn."""
    found, place = [], box_drawing._place
    monkeypatch.setattr(box_drawing, "_place", lambda *given: found.append(place(*given)) or found[-1])
    return found


def labels_of(monkeypatch, text: str) -> list[str]:
    found, label = [], box_drawing._label
    monkeypatch.setattr(box_drawing, "_label", lambda *given: found.append(label(*given)) or found[-1])
    draw_boxes(Image.new("RGB", (500, 500)), text)
    return [label for label, _ in found]


def extent(picture: Image.Image, colour: tuple[int, int, int]) -> tuple[int, ...]:
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_an_answer_without_boxes_is_not_drawn():
    assert draw_boxes(Image.new("RGB", (50, 50)), "a cat at the top, <box> 1 2 3") is None


@pytest.mark.parametrize("size", [(500, 1000), (1000, 500)])
def test_a_box_is_drawn_where_it_is(size):
    drawn = draw_boxes(Image.new("RGB", size), "<box> 10 20 60 80")
    corners = (size[0] * 0.1, size[1] * 0.2, size[0] * 0.6, size[1] * 0.8)
    assert drawn.size == size and extent(drawn, COLOURS[0]) == corners  # alone it needs no number
    middle = (size[0] * 0.35, size[1] * 0.5)
    assert drawn.getpixel(tuple(map(int, middle))) == (0, 0, 0)  # a frame, and what is in it can be seen


def test_small_pictures_are_drawn_larger_and_others_as_they_are():
    text = "<box> 10 20 60 80"
    assert draw_boxes(Image.new("RGB", (112, 56)), text).size == (LEAST_SIDE, LEAST_SIDE // 2)
    assert draw_boxes(Image.new("RGB", (112, 56)), text, 112).size == (112, 56)
    assert draw_boxes(Image.new("L", (900, 700)), text).mode == "RGB"


@pytest.mark.parametrize("ground", [*COLOURS, DARK, (0, 0, 0), (128, 128, 128)])
def test_a_line_shows_on_any_ground(ground):
    """Light, or its dark edges are: 3 to 1 is the contrast that lines need (WCAG 2.1)."""

    def light(colour: tuple[int, int, int]) -> float:
        channels = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2] + 0.05

    for number, colour in enumerate(COLOURS):
        text = ", ".join(["<box> 1 1 2 2"] * number + ["<box> 40 40 80 80"])
        around = draw_boxes(Image.new("RGB", (500, 500), ground), text).crop((190, 250, 215, 300)).getcolors()
        drawn = {found for _, found in around}
        assert {colour, DARK} <= drawn
        contrasts = [max(light(line), light(ground)) / min(light(line), light(ground)) for line in (colour, DARK)]
        assert max(contrasts) > 3


def test_names_stand_in_the_picture_and_not_on_one_another(plates):
    boxes = ["0 0 40 30", "41 0 99 30", "0 31 40 60", "41 31 99 60", "0 61 40 99", "41 61 99 99", "70 70 95 95"]
    text = ", ".join(f"{name} <box> {box}" for name, box in zip("abcdefg", boxes, strict=True))
    size = draw_boxes(Image.new("RGB", (300, 200)), text).size
    assert len(plates) == 7
    assert all(0 <= left < right <= size[0] and 0 <= top < bottom <= size[1] for left, top, right, bottom in plates)
    assert not any(box_drawing._common(a, b) for a, b in combinations(plates, 2))


def test_names_are_those_of_the_answer_and_numbers_where_it_has_none(monkeypatch):
    assert labels_of(monkeypatch, "red cat <box> 1 1 9 9, bus <box> 20 20 40 40") == ["red cat", "bus"]
    assert labels_of(monkeypatch, "<box> 1 1 9 9, bus <box> 20 20 40 40") == ["1", "bus"]
    assert labels_of(monkeypatch, "<box> 1 1 9 9") == [""]
    assert labels_of(monkeypatch, f"{'very ' * 40}long <box> 1 1 9 9") == ["very very very very very..."]
    monkeypatch.setattr(box_drawing, "font_for", lambda text, size: None)  # a machine without Chinese letters
    assert labels_of(monkeypatch, "猫 <box> 1 1 9 9，车 <box> 20 20 40 40") == ["1", "2"]


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (2000, 2)])
def test_whatever_the_picture_and_the_answer_something_is_drawn(size):
    assert draw_boxes(Image.new("RGB", size), "cat <box> 99 99 100 100, " * 500) is not None
