"""The answering engine says what generate() says, whichever way it is asked."""

import pytest
import torch

from scripts.answer import Answerer, Interrupted, Options

SHORT = Options(max_new_tokens=12)


@pytest.fixture
def answerer(make_vlm):
    return Answerer(make_vlm())


def question(text: str = "<image>\nWhat is it?") -> list[dict]:
    return [{"role": "user", "content": text}]


def oracle(answerer: Answerer, messages: list[dict], pictures: list, count: int = 12) -> tuple[int, ...]:
    inputs = answerer.processor.prompts([(messages, pictures)])
    with torch.no_grad():
        found = answerer.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return tuple(found[0, inputs["input_ids"].shape[1] :].tolist())


def test_stream_is_generate(answerer, picture):
    pieces = []
    answer = answerer.stream(question(), [picture(1)], SHORT, pieces.append)
    assert answer.token_ids == oracle(answerer, question(), [picture(1)])
    assert "".join(pieces) == answer.text and not answer.stopped


def test_batch_is_generate(answerer, picture):
    conversations = [(question(), [picture(1)]), (question("hello, and how are you?"), [])]
    answers = answerer.batch(conversations, SHORT)
    assert [answer.token_ids for answer in answers] == [oracle(answerer, *asked) for asked in conversations]


def test_stopped_ends_the_answer(answerer, picture):
    count = iter(range(100))
    answer = answerer.stream(question(), [picture(1)], SHORT, stopped=lambda: next(count) == 3)
    assert answer.stopped and answer.new_tokens == 4


def test_an_error_in_show_keeps_the_text_and_the_engine(answerer, picture):
    def fail(text: str) -> None:
        raise OSError("the browser went away")

    with pytest.raises(Interrupted, match="the browser went away") as caught:
        answerer.stream(question(), [picture(1)], SHORT, fail)
    whole = answerer.stream(question(), [picture(1)], SHORT)
    assert whole.text.startswith(caught.value.answer.text) and caught.value.answer.text


def test_a_seed_draws_the_same_answer(answerer, picture):
    def ask(seed: int) -> str:
        return answerer.stream(question(), [picture(1)], Options(12, temperature=2.0, top_p=1.0, seed=seed)).text

    assert ask(1) == ask(1) != ask(2)
