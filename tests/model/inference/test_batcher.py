"""Whoever asks when, each gets the answer that Answerer.stream gives alone; errors, stops and ends are one row's."""

import random
import time

import pytest

from helpers.models import enliven
from model.inference.answerer import Answer, Answerer, Options
from model.inference.batcher import Batcher
from model.inference.reader import Prompt

SOON = 20.0  # seconds; what takes longer hangs
GREEDY = Options(max_new_tokens=12)


@pytest.fixture
def make_batcher():
    """Batchers that end with the test."""
    made = []

    def make(answerer: Answerer, *sizes: int) -> Batcher:
        made.append(Batcher(answerer, *sizes))
        return made[-1]

    yield make
    for batcher in made:
        batcher.close(0)
        assert not batcher._worker.is_alive()


@pytest.fixture
def answerer(model):
    return Answerer(model)


def ask(answerer: Answerer, text: str, *pictures) -> Prompt:
    return answerer.prompt([{"role": "user", "content": "<image>" * len(pictures) + text}], pictures)


def told(answer: Answer) -> tuple:
    return answer.text, answer.token_ids, answer.ending


# the same text


def random_requests(answerer: Answerer, picture, count: int, seed: int) -> list[tuple[Prompt, Options]]:
    """Short and long, with and without pictures, of which some are the same; greedy, sampled, ended by a string."""
    chance, requests = random.Random(seed), []
    for _ in range(count):
        pictures = [picture(chance.randrange(4)) for _ in range(chance.choice((0, 0, 1, 1, 2)))]
        words = " ".join(chance.choice(("what", "is", "it", "where", "red")) for _ in range(chance.choice((1, 5, 25))))
        sampling = {"temperature": 1.5, "seed": chance.randrange(9), "top_p": chance.choice((0.5, 1.0)),
                    "top_k": chance.choice((0, 20))} if chance.random() < 0.4 else {}  # fmt: skip
        stop = ("e",) if chance.random() < 0.3 else ()
        logprobs = chance.choice((None, 0, 2))
        requests.append(
            (
                ask(answerer, words, *pictures),
                Options(chance.randrange(1, 25), **sampling, stop=stop, logprobs=logprobs),
            )
        )
    return requests


@pytest.mark.parametrize(
    "changes", [{}, {"use_moe": True}, {"max_position_embeddings": 64}], ids=["dense", "moe", "short"]
)
@pytest.mark.parametrize("most_rows", [1, 3, 16])
def test_every_answer_is_that_of_stream_alone(make_vlm, make_batcher, picture, changes, most_rows):
    answerer = Answerer(enliven(make_vlm(**changes)))
    chance = random.Random(most_rows)
    requests = random_requests(answerer, picture, 12, most_rows)
    expected = [Answerer.stream(answerer, *request) for request in requests]
    fresh = Answerer(enliven(make_vlm(**changes)))  # remembers nothing
    batcher, futures, shown = make_batcher(fresh, most_rows), [], [[] for _ in requests]
    for request, pieces in zip(requests, shown, strict=True):
        futures.append(batcher.submit(*request, show=pieces.append))
        time.sleep(chance.choice((0, 0, 0.002, 0.01)))
    answers = [future.result(SOON) for future in futures]
    assert [told(answer) for answer in answers] == [told(answer) for answer in expected]
    assert ["".join(pieces) for pieces in shown] == [answer.text for answer in answers]
    assert {answer.ending for answer in answers} >= {"length", "stop"}
    for answer, alone in zip(answers, expected, strict=True):
        assert [one.logprob for one in answer.logprobs] == pytest.approx(
            [one.logprob for one in alone.logprobs], abs=1e-3
        )
