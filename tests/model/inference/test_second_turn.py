"""A second turn that goes on from a given cache answers as a fresh run over the whole conversation does."""

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from helpers.models import IMAGE_TOKENS, count_tower_calls
from model.config import END_OF_TEXT_ID
from model.messages import UserError
from model.model_minimind import CACHE_NAME

OPTIONS = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
LATER = ("input_ids", "attention_mask", "image_mask")


@pytest.fixture
def turns(processor, picture):
    """turns((2, 3), (0, 1)): of each row, how many new pictures its first and its second turn show."""

    def make(*rows: tuple[int, int]) -> tuple[dict, dict]:
        shown = [[picture(10 * row + n) for n in range(sum(counts))] for row, counts in enumerate(rows)]
        asked = [
            [[{"role": "user", "content": "<image>" * counts[turn] + f"what is {'it ' * (row + 1)}{turn}?"}]
             for row, counts in enumerate(rows)]
            for turn in (0, 1)
        ]  # fmt: skip
        first = processor.prompts([(asked[0][row], shown[row][: rows[row][0]]) for row in range(len(rows))])
        second = processor.prompts([(asked[1][row], shown[row][rows[row][0] :]) for row in range(len(rows))])
        most = max(map(sum, rows))
        pixels = torch.zeros(len(rows), most, 3, 32, 32, dtype=torch.uint8)
        for row, pictures in enumerate(shown):
            for number, one in enumerate(pictures):
                pixels[row, number] = processor.pixels(one)
        return first, {**second, "pixel_values": pixels if most else None}

    return make


def answers(model, inputs: dict, **options) -> torch.Tensor:
    found = model.generate(**inputs, **{**OPTIONS, **options})
    return found[:, inputs["input_ids"].shape[1] :]


def whole(first: dict, said: torch.Tensor, second: dict) -> dict:
    """The inputs of both turns, with what was said between; in a batch padding stands before either turn."""
    between = {"input_ids": said, "attention_mask": torch.ones_like(said), "image_mask": torch.zeros_like(said).bool()}
    joined = {name: torch.cat([first[name], between[name], second[name]], 1) for name in LATER}
    return {**joined, "pixel_values": second["pixel_values"]}


def both_turns(model, turns, *rows, **options) -> tuple[dict, object]:
    """The whole conversation as inputs, and the cache after its first turn."""
    first, second = turns(*rows)
    found = model.generate(**first, **OPTIONS, return_dict_in_generate=True, **options)
    return whole(first, found.sequences[:, first["input_ids"].shape[1] :], second), found[CACHE_NAME]


CASES = {
    "a new picture": [(1, 1)],
    "text": [(1, 0)],
    "the first picture in the second turn": [(0, 1)],
    "several": [(2, 3)],
    "a batch of text": [(1, 0), (2, 0), (0, 0)],
    "a batch": [(1, 1), (0, 2), (2, 0), (0, 0)],
    "a row alone has a new one": [(2, 0), (0, 0), (1, 1)],
}


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_second_turn_from_the_cache_is_that_of_a_fresh_run(model, turns, rows, options):
    if options:  # of a size that holds both turns
        options = {CACHE_NAME: StaticCache(config=model.config, max_cache_len=100)}
    inputs, cache = both_turns(model, turns, *rows, **options)
    assert isinstance(cache, StaticCache if options else DynamicCache)
    expected = answers(model, inputs)
    calls = count_tower_calls(model)
    assert torch.equal(answers(model, inputs, **{CACHE_NAME: cache}), expected)
    assert calls == ([sum(new for _, new in rows)] if any(new for _, new in rows) else [])


@pytest.mark.parametrize("rows", [[(1, 1)], [(1, 1), (0, 2), (2, 0)]], ids=["one", "batch"])
@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3, "do_sample": True}]
)
def test_beams_and_several_answers(model, turns, rows, options):
    inputs, cache = both_turns(model, turns, *rows)
    cache.batch_repeat_interleave(3)  # generate() leaves that to whoever gives the cache
    torch.manual_seed(1)
    expected = answers(model, inputs, **options)
    torch.manual_seed(1)
    assert torch.equal(answers(model, inputs, **options, **{CACHE_NAME: cache}), expected)


def test_without_cache_a_given_one_is_left_alone(model, turns):
    inputs, cache = both_turns(model, turns, (1, 1), (0, 2), (2, 0))
    seen = cache.get_seq_length()
    expected = answers(model, inputs)
    assert torch.equal(answers(model, inputs, use_cache=False, **{CACHE_NAME: cache}), expected)
    assert cache.get_seq_length() == seen
    new = {**inputs, "input_ids": inputs["input_ids"][:, seen:]}
    with pytest.raises(UserError, match="use_cache=False reads everything again"):
        answers(model, new, use_cache=False, **{CACHE_NAME: cache})


def test_prompts_without_pictures_may_be_read_in_chunks(model, turns):
    inputs = turns((0, 0))[0]
    assert torch.equal(answers(model, inputs, prefill_chunk_size=5), answers(model, inputs))


@pytest.mark.parametrize("masked", ["new tokens", "everything"])
def test_new_tokens_alone(model, turns, masked):
    """generate() takes them too, with the attention mask of everything."""
    inputs, cache = both_turns(model, turns, (1, 1), (0, 2), (2, 0))
    expected = answers(model, inputs)
    seen = cache.get_seq_length()
    new = {**inputs, "input_ids": inputs["input_ids"][:, seen:]}
    if masked == "new tokens":
        new["image_mask"] = inputs["image_mask"][:, seen:]
        before = inputs["image_mask"][:, :seen].sum(1) // IMAGE_TOKENS
        rows = [pictures[count:] for pictures, count in zip(inputs["pixel_values"], before, strict=True)]
        new["pixel_values"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    assert torch.equal(answers(model, new, **{CACHE_NAME: cache}), expected)


def test_mask_of_the_first_turn_is_enough_where_nothing_new_is_shown(model, turns):
    inputs, cache = both_turns(model, turns, (1, 0), (2, 0))
    expected = answers(model, inputs)
    shorter = {**inputs, "image_mask": inputs["image_mask"][:, :-12]}
    assert torch.equal(answers(model, shorter), expected)
    assert torch.equal(answers(model, shorter, **{CACHE_NAME: cache}), expected)


def test_second_turn_without_the_old_pictures_at_hand(model, turns):
    """A turn of text needs neither mask nor pictures of what the cache remembers."""
    inputs, cache = both_turns(model, turns, (1, 0))
    expected = answers(model, inputs)
    text = {**inputs, "pixel_values": None, "image_mask": None}
    assert torch.equal(answers(model, text, **{CACHE_NAME: cache}), expected)


def test_rows_that_ended_early_go_on_where_they_ended(model, turns):
    """What fills up a shorter answer is masked, so that later tokens stand where they stand alone."""
    first, second = turns((1, 1), (2, 0))
    found = model.generate(**first, **OPTIONS, return_dict_in_generate=True)
    said = found.sequences[:, first["input_ids"].shape[1] :].clone()
    said[0, 3:] = END_OF_TEXT_ID
    inputs = whole(first, said, second)
    inputs["attention_mask"][0, first["input_ids"].shape[1] + 3 : first["input_ids"].shape[1] + 6] = 0
    expected = answers(model, inputs)
    cache = DynamicCache(config=model.config)
    start = {name: inputs[name][:, : first["input_ids"].shape[1] + 5] for name in LATER}
    with torch.no_grad():
        places = (start["attention_mask"].cumsum(1) - 1).clamp(min=0)
        model(**start, pixel_values=first["pixel_values"], position_ids=places, **{CACHE_NAME: cache})
    assert torch.equal(answers(model, inputs, **{CACHE_NAME: cache}), expected)


def test_pictures_that_do_not_fit_are_refused(model, turns):
    inputs, cache = both_turns(model, turns, (1, 1))
    with pytest.raises(ValueError, match="row 0 has 8 placeholders and at most 1 pictures"):
        answers(model, {**inputs, "pixel_values": inputs["pixel_values"][:, :1]}, **{CACHE_NAME: cache})
    wide = torch.nn.functional.pad(inputs["image_mask"], (3, 0))
    with pytest.raises(UserError, match=f"image_mask has {wide.shape[1]} columns"):
        answers(model, {**inputs, "image_mask": wide}, **{CACHE_NAME: cache})
