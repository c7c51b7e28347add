"""Generation: caches, left padding, pictures, beams, samples and streams all tell the same story."""

import math

import pytest
import torch
from transformers.cache_utils import StaticCache
from transformers.generation.streamers import BaseStreamer

from helpers.models import SIZES, count_tower_calls, enliven
from model.config import END_OF_TEXT_ID, MiniMindConfig
from model.model_minimind import CACHE_NAME, MiniMindForCausalLM

NEW_TOKENS = 8
# every row of the same length: END_ID is out until then, and where it ends a row has its own test
LENGTH = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def model(make_vlm, request):
    return enliven(make_vlm(use_moe=request.param))


@pytest.fixture
def dense(make_vlm):
    return enliven(make_vlm())


@pytest.fixture
def conversations(picture):
    """Prompts of different lengths with no, one and two pictures."""

    def ask(text: str, *seeds: int):
        return [{"role": "user", "content": "<image>" * len(seeds) + text}], [picture(seed) for seed in seeds]

    return [
        ask("hello, who are you and where do you live?"),
        ask("what is it?", 1),
        ask("\nwhich one differs and how?", 2, 3),
    ]


@pytest.fixture
def batch(processor, conversations):
    return processor.prompts(conversations)


@pytest.fixture
def singles(processor, conversations):
    return [processor.prompts([conversation]) for conversation in conversations]


def answers(model, inputs: dict, **options) -> torch.Tensor:
    """Only what is new; greedy unless told otherwise."""
    found = model.generate(**inputs, **{"do_sample": False, **LENGTH, **options})
    return found[:, inputs["input_ids"].shape[1] :]


def greedy_by_hand(model, inputs: dict, steps: int = NEW_TOKENS) -> list[int]:
    """The whole sequence through forward() at each step: no cache, no generate(), no padding. For a single row."""
    ids, mask, new = inputs["input_ids"], inputs["image_mask"], []
    for _ in range(steps):
        with torch.no_grad():
            scores = model(ids, image_mask=mask, pixel_values=inputs.get("pixel_values")).logits[0, -1]
        scores[model.config.eos_token_id] = -math.inf
        new.append(int(scores.argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
        mask = torch.cat([mask, torch.zeros(1, 1, dtype=torch.bool)], 1)
    return new


def assert_varied(rows: list[list[int]]) -> None:
    """Comparisons say little if every answer is the same word again and again."""
    assert all(len(set(row)) >= NEW_TOKENS // 2 for row in rows), rows
    assert len({tuple(row) for row in rows}) == len(rows), rows


def test_greedy_is_that_of_a_loop_over_forward(model, singles):
    rows = [answers(model, inputs)[0].tolist() for inputs in singles]
    assert_varied(rows)
    assert rows == [greedy_by_hand(model, inputs) for inputs in singles]


def test_cache_changes_nothing(model, singles, batch):
    for inputs in (*singles, batch):
        cached = answers(model, inputs)
        assert_varied(cached.tolist())
        assert torch.equal(cached, answers(model, inputs, use_cache=False))


def test_static_cache_changes_nothing(model, singles, batch):
    for inputs in (*singles, batch):
        dynamic = answers(model, inputs)
        options = {"cache_implementation": "static", "return_dict_in_generate": True}
        static = model.generate(**inputs, do_sample=False, **LENGTH, **options)
        assert isinstance(static[CACHE_NAME], StaticCache)
        assert torch.equal(dynamic, static.sequences[:, inputs["input_ids"].shape[1] :])


def test_left_padded_batch_is_one_by_one(model, singles, batch):
    lengths = [inputs["input_ids"].shape[1] for inputs in singles]
    assert len(set(lengths)) == 3 and batch["pixel_values"].shape[:2] == (3, 2)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    together = answers(model, batch).tolist()
    assert_varied(together)
    assert together == [answers(model, inputs)[0].tolist() for inputs in singles]


def test_answers_depend_on_the_picture(dense, processor, picture):
    messages = [{"role": "user", "content": "<image>what is it?"}]
    rows = answers(dense, processor.prompts([(messages, [picture(seed)]) for seed in range(4)])).tolist()
    assert len({tuple(row) for row in rows}) == 4


def test_decoder_without_pictures_generates():
    torch.manual_seed(0)
    decoder = enliven(MiniMindForCausalLM(MiniMindConfig(**SIZES))).eval()
    ids = torch.tensor([[1, 300, 400, 500]])
    row = answers(decoder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).tolist()
    assert_varied(row)
    expected = []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            scores = decoder(ids).logits[0, -1]
        scores[2] = -math.inf
        expected.append(int(scores.argmax()))
        ids = torch.cat([ids, scores.argmax().view(1, 1)], 1)
    assert row == [expected]


def test_a_row_that_ends_is_filled_up_and_the_others_go_on(dense, batch):
    free = answers(dense, batch).tolist()
    end = free[1][3]  # whatever row 1 says there shall end a turn
    assert end not in free[0] + free[2] + free[1][:3]
    ended = answers(dense, batch, eos_token_id=end, min_new_tokens=None).tolist()
    assert ended[1] == free[1][:4] + [END_OF_TEXT_ID] * 4
    assert [ended[0], ended[2]] == [free[0], free[2]]


def test_generation_stops_at_the_end_of_the_turn_by_default(dense):
    assert dense.generation_config.eos_token_id == 2
    assert dense.generation_config.pad_token_id == END_OF_TEXT_ID


# beams


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_beams_of_a_batch_are_those_of_singles(model, singles, batch, beams):
    together = answers(model, batch, num_beams=beams).tolist()
    assert together == [answers(model, inputs, num_beams=beams)[0].tolist() for inputs in singles]
    if beams == 1:
        assert together == answers(model, batch).tolist()


def log_likelihood(model, inputs: dict, answer: list[int]) -> float:
    """Of an answer, by one pass over prompt and answer, without cache."""
    count = len(answer)
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    mask = torch.cat([inputs["image_mask"], torch.zeros(1, count, dtype=torch.bool)], 1)
    with torch.no_grad():
        logits = model(ids, image_mask=mask, pixel_values=inputs.get("pixel_values")).logits[0].double()
    chances = logits.log_softmax(-1)
    start = ids.shape[1] - count
    return sum(float(chances[start + k - 1, token]) for k, token in enumerate(answer))


def test_beams_know_what_their_answers_are_worth(model, singles, batch):
    """Fails if a beam goes on from the cache of another."""
    options = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**batch, do_sample=False, **LENGTH, **options)
    rows = found.sequences[:, batch["input_ids"].shape[1] :].tolist()
    assert len({tuple(row) for row in rows}) == 9
    expected = [log_likelihood(model, singles[k // 3], row) / NEW_TOKENS for k, row in enumerate(rows)]
    assert found.sequences_scores.tolist() == pytest.approx(expected, abs=1e-4)
    greedy = [log_likelihood(model, singles[k], row) for k, row in enumerate(answers(model, batch).tolist())]
    best = [expected[3 * k] * NEW_TOKENS for k in range(3)]
    assert sum(best) > sum(greedy)  # else these were no beams


def test_beams_without_cache(dense, batch):
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(answers(dense, batch, **options), answers(dense, batch, **options, use_cache=False))


# samples


def sample(model, inputs: dict, seed: int, **options) -> list[list[int]]:
    torch.manual_seed(seed)
    return answers(model, inputs, do_sample=True, temperature=1.5, **options).tolist()


def test_sampling_follows_the_seed(model, batch):
    once = sample(model, batch, seed=1)
    assert once == sample(model, batch, seed=1)
    assert once != sample(model, batch, seed=2)
    assert once != answers(model, batch).tolist()


def test_several_samples_a_prompt(dense, batch):
    rows = sample(dense, batch, seed=1, num_return_sequences=3)
    assert len(rows) == 9 and len({tuple(row) for row in rows}) == 9
    # the only candidate is the greedy one, so each prompt must come back with its own answer, three times
    rows = sample(dense, batch, seed=1, num_return_sequences=3, top_k=1)
    greedy = answers(dense, batch).tolist()
    assert_varied(greedy)
    assert rows == [greedy[k // 3] for k in range(9)]


# streams


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_streamer_receives_the_same_tokens(dense, singles, options):
    inputs, streamer = singles[2], Collector()
    torch.manual_seed(4)
    row = answers(dense, inputs, streamer=streamer, **options)[0].tolist()
    assert streamer.ended
    prompt, *new = streamer.pieces
    assert prompt == inputs["input_ids"][0].tolist()
    assert new == [[token] for token in row]  # one at a time, as they come
    assert_varied([row])


# the tower


@pytest.mark.parametrize(
    ("options", "pictures"),
    [
        ({}, 3),
        ({"cache_implementation": "static"}, 3),
        ({"do_sample": True, "num_return_sequences": 2}, 6),
        ({"num_beams": 2}, 6),
    ],
    ids=["greedy", "static", "sampled", "beams"],
)
def test_tower_runs_once(dense, batch, options, pictures):
    calls = count_tower_calls(dense)
    answers(dense, batch, **options)
    assert calls == [pictures]


def test_tower_never_runs_for_text(dense, singles):
    calls = count_tower_calls(dense)
    answers(dense, singles[0])
    assert calls == []


def test_wrong_number_of_pictures_is_refused(dense, batch):
    """A picture fewer than the spans of row 2 want."""
    with pytest.raises(ValueError, match="row 2 has 8 placeholders and at most 1 pictures"):
        answers(dense, {**batch, "pixel_values": batch["pixel_values"][:, :1]})
