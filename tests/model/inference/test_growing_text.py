"""Text appears in whole characters, ends before stop strings, and never shows what one may begin with."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from helpers.foreign_base import make_tokenizer
from model.inference.growing_text import GrowingText, decode, end_of_text, token_bytes

SAID = "the cat sat on 猫 a mat 🦊  ok"


@pytest.fixture(scope="module", params=["minimind", "llama3", "tinyllama"])
def any_tokenizer(request, tokenizer):
    """Byte-level, of two kinds, and one that writes spaces as underlines and unknown characters as bytes."""
    if request.param == "minimind":
        return tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(request.param))


def grown(tokenizer, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """What was shown, piece by piece, and how many tokens it took."""
    pieces, count = [], 0
    growing = GrowingText(tokenizer, pieces.append, stop)
    for token in tokens:
        growing.add(token)
        count += 1
        if growing.stopped:
            break
    growing.flush()
    return pieces, count


@pytest.mark.parametrize("text", ["a cat", "猫在左边，还有🦊🏳️‍🌈和é", "\n\n  two\tspaces ", "ünï𝔘"])
def test_text_grows_in_whole_characters(tokenizer, text):
    pieces = []
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    growing = GrowingText(tokenizer, pieces.append)
    for token in [*tokens, 2]:  # the end of the turn shows nothing
        growing.add(token)
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    growing.flush()
    assert "".join(pieces) == text


def test_an_unfinished_character_shows_at_the_end_only(tokenizer):
    tokens = tokenizer("ok 𝔘", add_special_tokens=False)["input_ids"][:-1]
    pieces = []
    growing = GrowingText(tokenizer, pieces.append)
    for token in tokens:
        growing.add(token)
    assert "".join(pieces) == "ok "
    growing.flush()
    assert "".join(pieces) == decode(tokenizer, tokens) and pieces[-1].endswith("\ufffd")


def test_every_tokenizer_keeps_its_spaces(any_tokenizer):
    tokens = any_tokenizer(SAID, add_special_tokens=False)["input_ids"]
    pieces, _ = grown(any_tokenizer, tokens)
    assert "".join(pieces) == decode(any_tokenizer, tokens) == SAID and len(pieces) > 8
    assert b"".join(token_bytes(any_tokenizer, token) for token in tokens).decode().lstrip() == SAID
    assert token_bytes(any_tokenizer, len(any_tokenizer) + 5) == b""


# stop strings


@pytest.mark.parametrize(
    "stop", ["sat", " ", "t o", "猫", "🦊  ok", "SAT", "e cat sat on 猫 a mat 🦊  okay", "k", "the"]
)
def test_text_ends_before_a_stop_string(any_tokenizer, stop):
    tokens = any_tokenizer(SAID, add_special_tokens=False)["input_ids"]
    pieces, count = grown(any_tokenizer, tokens, (stop, "never said"))
    assert "".join(pieces) == SAID.partition(stop)[0]
    if stop in SAID:  # it ends with the first token that completes the string
        assert stop in decode(any_tokenizer, tokens[:count]) and stop not in decode(any_tokenizer, tokens[: count - 1])
    else:
        assert count == len(tokens)


def test_nothing_is_shown_that_a_stop_string_may_begin_with(tokenizer):
    """Against a slow loop, over few letters so that beginnings overlap."""
    chance = random.Random(1)
    letters = {letter: tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab"}
    for _ in range(300):
        text = "".join(chance.choice("ab") for _ in range(12))
        stop = tuple("".join(chance.choice("ab") for _ in range(chance.randrange(1, 6))) for _ in range(2))
        shown = []
        growing = GrowingText(tokenizer, shown.append, stop)
        for length in range(1, 13):
            growing.add(letters[text[length - 1]])
            said = text[:length]
            end = end_of_text(said, stop)
            if end is None:  # the most that no continuation could make part of a stop string
                end = min(n for n in range(length + 1) if n == length or any(s.startswith(said[n:]) for s in stop))
            assert "".join(shown) == said[:end]
            if growing.stopped:
                break
        growing.flush()
        assert "".join(shown) == said[: end_of_text(said, stop)]
