"""Answers about pictures that are cut: those of generate(), remembered view by view, and maps over whole pictures."""

import pytest
import torch

from helpers.data import make_picture
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS, count_tower_calls, enliven
from model.config import VLMConfig
from model.inference.answerer import Answerer, Options, assistant_turn, user_turn
from model.inference.attention_map import Looked, look
from model.inference.batcher import Batcher
from model.views import UNCUT, Grid

SHORT = Options(max_new_tokens=12)


@pytest.fixture
def answerer(make_vlm) -> Answerer:
    model = enliven(make_vlm())
    model.config.tiles = 4
    return Answerer(model)


def wide(seed: int):
    return make_picture(seed, 80).crop((0, 0, 80, 60))


def oracle(answerer: Answerer, messages: list[dict], pictures: list) -> tuple[int, ...]:
    """generate(), which remembers nothing."""
    inputs = answerer.processor.prompts([(messages, pictures)])
    with torch.no_grad():
        found = answerer.model.generate(**inputs, max_new_tokens=SHORT.max_new_tokens, do_sample=False)
    return tuple(found[0, inputs["input_ids"].shape[1] :].tolist())


def test_alone_and_together_answers_are_those_of_generate(answerer):
    asked = [
        ([user_turn("What is it?", 1)], [wide(1)]),
        ([user_turn("Who are you?", 0)], []),
        ([user_turn("What differs?", 2)], [wide(2), make_picture(3)]),
        ([user_turn("And where?", 1)], [wide(1)]),
    ]
    expected = [oracle(answerer, *one) for one in asked]
    prompts = [answerer.prompt(*one) for one in asked]
    assert [len(prompt.pictures) for prompt in prompts] == [5, 0, 6, 5]
    assert [answerer.stream(prompt, SHORT).token_ids for prompt in prompts] == expected
    assert [answer.token_ids for answer in answerer.batch(prompts, SHORT)] == expected
    batcher = Batcher(answerer)
    futures = [batcher.submit(lambda one=one: answerer.prompt(*one), SHORT) for one in asked]
    assert [future.result().token_ids for future in futures] == expected
    batcher.close(0.0)


def test_a_second_turn_reads_no_view_again(answerer):
    calls = count_tower_calls(answerer.model)
    messages = [user_turn("What is it?", 1)]
    first = answerer.stream(answerer.prompt(messages, [wide(1)]), SHORT)
    assert sum(calls) == 5
    messages += [assistant_turn(first.text), user_turn("And now?", 1)]
    second = answerer.stream(answerer.prompt(messages, [wide(1), wide(2)]), SHORT)
    assert sum(calls) == 10
    assert second.token_ids == oracle(answerer, messages, [wide(1), wide(2)])


def test_a_map_lies_over_the_whole_picture(answerer):
    pictures = [wide(1), make_picture(2)]
    looked = look(answerer.model, answerer.prompt([user_turn("What differs?", 2)], pictures), (300, 400))
    assert looked.patches.shape[2:] == (6, IMAGE_TOKENS)
    cut, uncut = looked.over_pictures()
    grid = looked.cuts[0]
    assert (grid.rows, grid.columns) == (2, 2) and cut.shape == (-(-grid.height * 2 // 32), 4)
    assert torch.equal(uncut, looked.maps()[-1])


def test_what_tiles_and_thumbnail_saw_adds_up_in_its_place():
    cut = Grid(2, 2, 64, 40)  # the last 24 of 64 lines are beyond the picture
    patches = torch.zeros(1, 1, 6, 4)
    patches[0, 0, 0] = 0.1  # the whole, evenly
    patches[0, 0, 3, 3] = 0.3  # the last patch of the tile in row 2, column 1
    patches[0, 0, 5] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    first, second = Looked(patches, (2, 2), (cut, UNCUT), IMAGE_SIZE).over_pictures()
    assert first.shape == (3, 4)
    torch.testing.assert_close(first, torch.full((3, 4), 0.4 / 12))  # 4 x 0.1; the tile's patch lies beyond the edge
    torch.testing.assert_close(second, torch.tensor([[0.4, 0.3], [0.2, 0.1]]))
    patches[0, 0, 3] = torch.tensor([0.0, 0.3, 0.0, 0.0])
    first, _ = Looked(patches, (2, 2), (cut, UNCUT), IMAGE_SIZE).over_pictures()
    assert float(first[2, 1]) == pytest.approx(0.3 + 0.4 / 12)


def test_a_config_keeps_its_tiles():
    assert VLMConfig(tiles=9).to_dict()["tiles"] == 9 and VLMConfig().tiles == 0
