"""A window over a conversation: what is forgotten leaves no trace, and what is left is whole."""

import pytest

from helpers.models import IMAGE_TOKENS
from model.inference.answerer import Answerer, Options, PromptTooLong, assistant_turn, user_turn
from model.inference.window import Forgotten, split_turns
from model.messages import UserError

SHORT = Options(max_new_tokens=6)
SYSTEM = {"role": "system", "content": "Be short."}
TALK = [
    SYSTEM,
    user_turn("What is it?", 1), assistant_turn("A cat."),
    user_turn("Where?", 0), assistant_turn("At the top."),
    user_turn("And these two?", 2), assistant_turn("A dog and a tree."),
    user_turn("Which of them is green?", 0),
]  # fmt: skip
PICTURES = (1, 0, 2, 0)  # of its turns


@pytest.fixture
def answerer(model) -> Answerer:
    return Answerer(model)


def without(turns: int) -> list[dict]:
    return [SYSTEM, *TALK[1 + 2 * turns :]]


def test_every_window_answers_as_if_the_forgotten_had_never_been_said(answerer, model, picture):
    """The oracle: a fresh engine without a window, whose conversation begins later."""
    shown = [picture(number) for number in range(sum(PICTURES))]
    sizes = [len(answerer.prompt(without(turns), shown[sum(PICTURES[:turns]) :]).ids) for turns in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    met = set()
    for window in range(sizes[-1], sizes[0] + 2):
        turns = next(turns for turns, size in enumerate(sizes) if size <= window)
        prompt = answerer.keep_within(window).prompt(TALK, shown)
        gone = sum(PICTURES[:turns])
        plain = answerer.processor.render(without(turns), add_generation_prompt=True)
        assert prompt.forgotten == Forgotten(turns, gone)
        assert prompt.ids == plain.input_ids.tolist() and len(prompt.ids) <= window
        assert sum(prompt.image_mask) == IMAGE_TOKENS * len(prompt.pictures) == IMAGE_TOKENS * (len(shown) - gone)
        if turns not in met:
            met.add(turns)
            fresh = Answerer(model)
            expected = fresh.stream(fresh.prompt(without(turns), shown[gone:]), SHORT)
            answer = answerer.stream(prompt, SHORT)
            assert (answer.token_ids, answer.forgotten) == (expected.token_ids, Forgotten(turns, gone))
            assert expected.forgotten == Forgotten()
    assert met == {0, 1, 2, 3}


def test_the_newest_turn_is_never_cut(answerer, picture):
    talk = [SYSTEM, user_turn("What is it?", 0), assistant_turn("A cat."), user_turn("And this?", 1)]
    alone = len(answerer.prompt([SYSTEM, talk[-1]], [picture(1)]).ids)
    assert answerer.keep_within(alone).prompt(talk, [picture(1)]).forgotten == Forgotten(1, 0)
    said = f"the question alone takes {alone} tokens, .* --context_window is {alone - 1}: ask less"
    with pytest.raises(PromptTooLong, match=said):
        answerer.keep_within(alone - 1).prompt(talk, [picture(1)])


def test_without_a_window_nothing_is_forgotten(answerer, picture):
    shown = [picture(number) for number in range(sum(PICTURES))]
    answerer.max_length = len(answerer.prompt(TALK, shown).ids)
    with pytest.raises(PromptTooLong, match="and the model reads"):
        answerer.prompt(TALK, shown)


@pytest.mark.parametrize("window", [0, -1, 40])
def test_windows_that_cannot_be_are_refused(answerer, window):
    answerer.max_length = 40
    with pytest.raises(UserError, match=f"--context_window {window} must lie within 1 and 39"):
        answerer.keep_within(window)


def test_turns_begin_with_the_user_after_an_answer():
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert split_turns([SYSTEM, user, answer, user]) == ([[user, answer], [user]], [SYSTEM])
    assert split_turns([user, user, answer, answer, SYSTEM, user]) == (
        [[user, user, answer, answer], [SYSTEM, user]],
        [],
    )
    assert split_turns([SYSTEM]) == ([], [SYSTEM])
