"""Boxes: from pixels to text and back, beside pixels that are counted; and whatever a model may write instead."""

from itertools import product

import numpy as np
import pytest

from dataset.boxes import Box, box_of_pixels, boxes_in, named_boxes, overlap


def test_a_box_in_text_comes_back():
    boxes = [Box(0, 0, 100, 100), Box(3, 40, 4, 41), Box(12, 34, 56, 78)]
    assert [str(box) for box in boxes] == ["<box> 0 0 100 100", "<box> 3 40 4 41", "<box> 12 34 56 78"]
    assert boxes_in(" and ".join(map(str, boxes))) == boxes


@pytest.mark.parametrize(
    ("corners", "size", "box"),
    [((0, 0, 224, 224), (224, 224), (0, 0, 100, 100)), ((32, 20, 64, 40), (640, 400), (5, 5, 10, 10)),
     ((-30, 50, 40, 900), (200, 100), (0, 50, 20, 100)), ((0.4, 1.6, 2.4, 3.5), (100, 100), (0, 2, 2, 4)),
     ((500, 0, 501, 4000), (4000, 4000), (12, 0, 13, 100)),  # thinner than a step
     ((3999, 3999, 4000, 4000), (4000, 4000), (99, 99, 100, 100))],
)  # fmt: skip
def test_pixels_become_steps_of_the_grid(corners, size, box):
    assert box_of_pixels(corners, size) == box


@pytest.mark.parametrize("corners", [(10, 10, 10, 20), (20, 10, 10, 20), (-9, 0, 0, 5), (0, 50, 5, 60)])
def test_what_is_not_in_the_picture_has_no_box(corners):
    with pytest.raises(ValueError, match="nothing of it is in a picture of 50 x 50 pixels"):
        box_of_pixels(corners, (50, 50))


@pytest.mark.parametrize(
    "text",
    ["<box> 12 34 56 78", "<box>12,34,56,78", "<BOX> [12, 34, 56, 78]</box>", "It is at <box>(12,34),(56,78).",
     "< box >: 12  34\n56 78", "<box> 12，34，56，78。", "<box> 12.4 33.6 56.0 78", "<box> 12 34 56 78 90",
     "<box> 12 34 56 78 <box> 1 2 3", "<box> 1 2 <box> 12 34 56 78", "<box><box> 12 34 56 78"],
)  # fmt: skip
def test_however_a_box_is_written_it_is_found(text):
    assert boxes_in(text) == [Box(12, 34, 56, 78)]


@pytest.mark.parametrize(
    "text",
    ["", "box 1 2 3 4", "<box>", "<box> 1 2 3", "<box> 1 2 3 x 4", "<box> 1 2 3 101", "<box> 1 2 3 1000000",
     "<box> 5 5 5 9", "<box> 9 1 5 4", "<box> 1 9 4 5", "<box> -1 2 3 4", "<box> 1234", "<box> 1 2 3 4.5.6",
     "<box> 1e2 2 3 4", f"<box> 1 2 3 {'9' * 400}", "<image> 1 2 3 4"],
)  # fmt: skip
def test_what_is_no_box_is_passed_over(text):
    assert boxes_in(text) == []


@pytest.mark.parametrize(
    ("text", "names"),
    [("cat <box> 1 2 3 4, red bus <box> 5 6 7 8", ["cat", "red bus"]),
     ("猫 <box> 1 2 3 4，公交车<box> 5 6 7 8", ["猫", "公交车"]),
     ("<box> 1 2 3 4", [""]), ("I see two: cat <box> 1 2 3 4. Dog: <box> 5 6 7 8", ["cat", "Dog"]),
     ("cat <box> 1 2, bus <box> 1 2 3 4", ["bus"]),
     ("t-rex <box> [1, 2, 3, 4]\n- bus <box> 1 2 3 4", ["t-rex", "bus"])],
)  # fmt: skip
def test_a_box_has_the_name_that_stands_before_it(text, names):
    assert [name for name, _ in named_boxes(text)] == names


def test_a_long_answer_is_read_at_once():
    assert len(boxes_in("<box> 1 2 3 4, " * 20_000)) == 20_000
    assert boxes_in("<box> " + "1 " * 100_000) == [] and boxes_in("<box" * 50_000 + "[" * 50_000) == []
    assert len(named_boxes("a " * 100_000 + "\n<box> 1 2 3 4")) == 1


def test_overlap_is_what_counted_cells_say():
    def cells(box: Box) -> np.ndarray:
        grid = np.zeros((100, 100), bool)
        grid[box.top : box.bottom, box.left : box.right] = True
        return grid

    boxes = [Box(0, 0, 100, 100), Box(10, 20, 30, 60), Box(25, 50, 70, 90), Box(30, 20, 31, 21), Box(10, 20, 30, 61)]
    for a, b in product(boxes, boxes):
        both, either = cells(a) & cells(b), cells(a) | cells(b)
        assert overlap(a, b) == pytest.approx(both.sum() / either.sum())
    assert overlap(boxes[1], boxes[1]) == 1 and overlap(boxes[1], boxes[3]) == 0
