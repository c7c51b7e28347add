"""Whoever asks when, each gets the answer that Answerer.stream gives alone; errors, stops and ends are one row's."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, wait

import pytest
import torch

from helpers.exports import export
from helpers.models import count_tower_calls, enliven
from model.inference import batcher as batcher_module
from model.inference.answerer import Answer, Answerer, Interrupted, Options, PromptTooLong
from model.inference.batcher import Batcher, Closed, Full
from model.inference.reader import Prompt

SOON = 20.0  # seconds; what takes longer hangs
SHORT, LONG = Options(max_new_tokens=6), Options(max_new_tokens=60)


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


@pytest.fixture
def batcher(answerer, make_batcher):
    return make_batcher(answerer)


class Gate:
    """A prompt that is not made before the gate opens: until then the worker waits, and others queue up."""

    def __init__(self, batcher: Batcher):
        self.entered, self.opened, self.prompt = threading.Event(), threading.Event(), ask(batcher.answerer, "gate")
        self.future = batcher.submit(self, Options(max_new_tokens=1))
        assert self.entered.wait(SOON)

    def __call__(self) -> Prompt:
        self.entered.set()
        assert self.opened.wait(SOON)
        return self.prompt

    def open(self) -> None:
        self.opened.set()


def ask(answerer: Answerer, text: str, *pictures) -> Prompt:
    return answerer.prompt([{"role": "user", "content": "<image>" * len(pictures) + text}], pictures)


def told(answer: Answer) -> tuple:
    return answer.text, answer.token_ids, answer.ending


def watched_passes(answerer: Answerer) -> list[tuple[int, int]]:
    """(rows, positions) of each pass through the decoder, filled while it runs."""
    passes, decoder = [], answerer.reader.decoder

    def watched(x, cache):
        passes.append(tuple(x.shape[:2]))
        return decoder(x, cache)

    watched.new_cache = decoder.new_cache
    answerer.reader.decoder = watched
    return passes


# the same text


def random_requests(answerer: Answerer, picture: Callable, count: int, seed: int) -> list[tuple[Prompt, Options]]:
    """Short and long, with and without pictures, of which some are the same; greedy, sampled, ended by a string."""
    chance, requests = random.Random(seed), []
    for _ in range(count):
        pictures = [picture(chance.randrange(4)) for _ in range(chance.choice((0, 0, 1, 1, 2)))]
        words = " ".join(chance.choice(("what", "is", "it", "where", "red")) for _ in range(chance.choice((1, 5, 25))))
        sampling = {"temperature": 1.5, "seed": chance.randrange(9), "top_p": chance.choice((0.5, 1.0)),
                    "top_k": chance.choice((0, 20))} if chance.random() < 0.4 else {}  # fmt: skip
        stop = ("e",) if chance.random() < 0.3 else ()
        options = Options(chance.randrange(1, 25), **sampling, stop=stop, logprobs=chance.choice((None, 0, 2)))
        requests.append((ask(answerer, words, *pictures), options))
    return requests


def check_random(alone: Answerer, batcher: Batcher, requests: list[tuple[Prompt, Options]], seed: int) -> list[Answer]:
    expected, chance = [alone.stream(*request) for request in requests], random.Random(seed)
    futures, shown = [], [[] for _ in requests]
    for request, pieces in zip(requests, shown, strict=True):
        futures.append(batcher.submit(*request, show=pieces.append))
        time.sleep(chance.choice((0, 0, 0.002, 0.01)))
    answers = [future.result(SOON) for future in futures]
    assert [told(answer) for answer in answers] == [told(answer) for answer in expected]
    assert ["".join(pieces) for pieces in shown] == [answer.text for answer in answers]
    for answer, one in zip(answers, expected, strict=True):
        assert [t.logprob for t in answer.logprobs] == pytest.approx([t.logprob for t in one.logprobs], abs=1e-3)
    return answers


@pytest.mark.parametrize(
    ("changes", "most_rows"), [({}, 1), ({}, 3), ({"use_moe": True}, 16), ({"max_position_embeddings": 64}, 3)], ids=str
)
def test_every_answer_is_that_of_stream_alone(make_vlm, make_batcher, picture, changes, most_rows):
    """The batcher's engine has its own memory; in the short model rows end at its last position."""
    alone, fresh = (Answerer(enliven(make_vlm(**changes))) for _ in range(2))
    requests = random_requests(alone, picture, 12, most_rows)
    answers = check_random(alone, make_batcher(fresh, most_rows), requests, most_rows)
    assert {answer.ending for answer in answers} == {"length", "stop"}


def test_stock_models_join_too(model, make_batcher, tmp_path, picture):
    folder = export(model, "llava", tmp_path / "llava")
    answerer = Answerer.from_weight(folder, device="cpu", dtype="float32")
    check_random(answerer, make_batcher(answerer, 3), random_requests(answerer, picture, 6, 5), 5)


def test_ends_of_turns(answerer, batcher, picture):
    """Rows leave at different steps, the last one takes the place of each."""
    asked = [ask(answerer, f"number {number}?", *[picture(number)] * (number % 2)) for number in range(6)]
    answerer.end_ids = {answerer.stream(prompt, LONG).token_ids[3 * number] for number, prompt in enumerate(asked[:4])}
    expected = [answerer.stream(prompt, LONG) for prompt in asked]
    assert len({answer.new_tokens for answer in expected}) > 2
    gate = Gate(batcher)
    futures = [batcher.submit(prompt, LONG) for prompt in asked]
    gate.open()
    assert [told(future.result(SOON)) for future in futures] == [told(answer) for answer in expected]


# who joins when


def test_one_who_comes_later_joins_at_the_next_token(answerer, batcher):
    passes, late, prompt = watched_passes(answerer), [], ask(answerer, "and where?")

    def show(text: str) -> None:
        if not late:
            late.append(batcher.submit(prompt, SHORT))

    first = batcher.submit(ask(answerer, "what is it?"), Options(max_new_tokens=20), show).result(SOON)
    assert late[0].result(SOON).new_tokens == 6 and first.new_tokens == 20
    assert sorted(rows for rows, positions in passes if positions == 1) == [1] * 14 + [2] * 5
    second = next(number for number, (_, positions) in enumerate(passes) if number and positions > 1)
    assert passes[second + 1] == (2, 1)


@pytest.mark.parametrize(("seconds", "between"), [(0.0, 1), (60.0, 0)])
def test_prompts_wait_for_the_steps_of_others(answerer, batcher, monkeypatch, seconds, between):
    """READING says how long they may take between two steps, of which one prompt is always read."""
    monkeypatch.setattr(batcher_module, "READING", seconds)
    passes, gate = watched_passes(answerer), Gate(batcher)
    futures = [batcher.submit(ask(answerer, f"{number}, what is it?"), SHORT) for number in range(4)]
    gate.open()
    wait(futures, SOON)
    reads = [number for number, (_, positions) in enumerate(passes) if positions > 1][1:]  # without the gate's
    assert [later - earlier - 1 for earlier, later in zip(reads, reads[1:], strict=False)] == [between] * 3


def test_a_picture_of_several_who_wait_passes_the_tower_once(answerer, batcher, picture):
    calls, gate = count_tower_calls(answerer.model), Gate(batcher)
    asked = [ask(answerer, f"number {number}?", picture(1)) for number in range(5)]
    futures = [batcher.submit(prompt, SHORT) for prompt in asked]
    gate.open()
    answers = [future.result(SOON) for future in futures]
    assert calls == [1] and [told(a) for a in answers] == [told(answerer.stream(prompt, SHORT)) for prompt in asked]


def test_the_next_turn_reads_only_itself(answerer, batcher):
    first = batcher.submit(ask(answerer, "what is it?"), SHORT).result(SOON)
    passes = watched_passes(answerer)
    talk = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": first.text},
            {"role": "user", "content": "and?"}]  # fmt: skip
    answer = batcher.submit(answerer.prompt(talk), SHORT).result(SOON)
    assert passes[0][1] < answer.prompt_tokens / 2


def test_seconds_count_from_asking(answerer, batcher):
    gate = Gate(batcher)
    future = batcher.submit(ask(answerer, "what?"), SHORT)
    time.sleep(0.1)
    gate.open()
    assert 0.1 < future.result(SOON).seconds_to_first < SOON


# too many, and those who go away


def test_too_many_are_refused(answerer, make_batcher):
    batcher = make_batcher(answerer, 1, 2)
    gate, prompt = Gate(batcher), ask(answerer, "what?")
    futures = [batcher.submit(prompt, SHORT) for _ in range(2)]
    assert (batcher.rows, batcher.waiting) == (1, 2)
    with pytest.raises(Full, match="2 requests wait already: ask again in a moment"):
        batcher.submit(prompt, SHORT)
    assert futures[1].cancel()
    gate.open()
    assert futures[0].result(SOON).new_tokens == 6
    with pytest.raises(CancelledError):
        futures[1].result(SOON)
    assert batcher.submit(prompt, SHORT).result(SOON).new_tokens == 6 and (batcher.rows, batcher.waiting) == (0, 0)


def test_stopped_ends_at_the_next_token_and_waits_for_none(answerer, batcher):
    passes, prompt, gone = watched_passes(answerer), ask(answerer, "what is it?"), threading.Event()
    pieces = []

    def show(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            gone.set()

    gate = Gate(batcher)
    running = batcher.submit(prompt, LONG, show, gone.is_set)
    never = batcher.submit(ask(answerer, "a prompt that is never read"), LONG, stopped=lambda: True)
    gate.open()
    answer, none = running.result(SOON), never.result(SOON)
    assert answer.stopped and answer.text == "".join(pieces) and answer.new_tokens < 10
    assert none.stopped and none.text == "" and none.new_tokens == 0
    assert sum(positions > 1 for _, positions in passes) == 2  # the gate's and one


# errors


def test_an_error_of_one_leaves_the_others_alone(answerer, batcher, picture, monkeypatch):
    prompt, shown, answerer.max_length = ask(answerer, "what is it?"), [], 300

    def fail(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise OSError("the browser went away")

    def too_long() -> Prompt:
        return ask(answerer, "hello " * 300)

    def unsure() -> bool:
        raise OSError("nobody knows")

    def blind(digests: list[int], pictures: list[torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(answerer.reader, "_picture_tokens", blind)
    gate = Gate(batcher)
    sound = [batcher.submit(prompt, LONG)]
    broken = batcher.submit(prompt, LONG, fail)
    refused, unread = batcher.submit(too_long, LONG), batcher.submit(ask(answerer, "what?", picture(1)), LONG)
    waiting = batcher.submit(prompt, LONG, stopped=unsure)
    sound.append(batcher.submit(prompt, LONG))
    gate.open()
    with pytest.raises(Interrupted, match="the browser went away") as caught:
        broken.result(SOON)
    assert caught.value.answer.text == "".join(shown) and caught.value.answer.ending == "error"
    with pytest.raises(PromptTooLong):
        refused.result(SOON)
    with pytest.raises(Interrupted, match="broke off after 0 tokens: out of memory"):
        unread.result(SOON)
    with pytest.raises(OSError, match="nobody knows"):
        waiting.result(SOON)
    expected = told(answerer.stream(prompt, LONG))
    assert [told(future.result(SOON)) for future in sound] == [expected] * 2


def test_what_is_no_number_ends_its_own_row(answerer, batcher, monkeypatch):
    prompt, head, calls = ask(answerer, "what is it?"), answerer.reader.decoder.head, []
    expected = told(answerer.stream(prompt, LONG))

    def broken(x: torch.Tensor) -> torch.Tensor:
        logits = head(x)
        if len(x) == 2:
            calls.append(1)
            logits[1] = float("nan") if len(calls) == 3 else logits[1]
        return logits

    monkeypatch.setattr(answerer.reader.decoder, "head", broken)
    gate = Gate(batcher)
    first, second = (batcher.submit(prompt, LONG) for _ in range(2))
    gate.open()
    with pytest.raises(Interrupted, match=r"broke off after 3 tokens: the model computes what is no number in .*32"):
        second.result(SOON)
    assert told(first.result(SOON)) == expected


def test_an_error_in_a_step_ends_all_rows_and_not_the_worker(answerer, make_batcher, monkeypatch):
    batcher, prompt, step, calls = make_batcher(answerer, 2), ask(answerer, "what is it?"), answerer.reader.step, []

    def fail(tokens: torch.Tensor, cache: object) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return step(tokens, cache)

    monkeypatch.setattr(answerer.reader, "step", fail)
    gate = Gate(batcher)
    running, waiting = [batcher.submit(prompt, LONG) for _ in range(2)], batcher.submit(prompt, SHORT)
    gate.open()
    for future in running:
        with pytest.raises(Interrupted, match="out of memory") as caught:
            future.result(SOON)
        assert caught.value.answer.new_tokens in (4, 5)
    assert told(waiting.result(SOON)) == told(answerer.stream(prompt, SHORT))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_worker_that_is_gone(answerer, batcher):
    """Nothing that is an Exception ends it; what does leaves no future open."""
    prompt, gate = ask(answerer, "what is it?"), Gate(batcher)

    def leave(text: str) -> None:
        raise SystemExit

    futures = [batcher.submit(prompt, LONG, leave), *(batcher.submit(prompt, LONG) for _ in range(30))]
    gate.open()
    for future in futures:
        with pytest.raises(Closed, match="the thread that answers has ended"):
            future.result(SOON)
    with pytest.raises(Closed):
        batcher.submit(prompt, SHORT)


# the end


def test_close_lets_what_was_asked_end(answerer, make_batcher):
    batcher, prompt = make_batcher(answerer, 2), ask(answerer, "what is it?")
    futures = [batcher.submit(prompt, SHORT) for _ in range(5)]
    batcher.close(SOON)
    assert [future.result(0).ending for future in futures] == ["length"] * 5
    with pytest.raises(Closed, match="takes no more requests"):
        batcher.submit(prompt, SHORT)


def test_close_stops_what_takes_too_long(answerer, make_batcher, monkeypatch):
    batcher, prompt, begun = make_batcher(answerer, 2), ask(answerer, "what is it?"), threading.Event()
    answerer.end_ids, answerer.max_length = frozenset(), 10**6
    step = answerer.reader.step
    monkeypatch.setattr(answerer.reader, "step", lambda *what: time.sleep(0.01) or step(*what))
    futures = [batcher.submit(prompt, Options(max_new_tokens=1000), lambda text: begun.set()) for _ in range(4)]
    assert begun.wait(SOON)
    batcher.close(0.1)
    answers = [future.result(0) for future in futures]
    assert [answer.ending for answer in answers] == ["stopped"] * 4
    assert [answer.new_tokens > 0 for answer in answers] == [True, True, False, False]


def test_nothing_of_a_request_stays(answerer, batcher, picture):
    """Not even until a garbage collection: a server that is busy would grow until then."""
    answerer.reader.prefixes.limit = 100
    gc.collect()
    gc.disable()
    try:
        pixels = []
        for number in range(20):
            prompt = ask(answerer, f"number {number}?", picture(number))
            pixels.append(weakref.ref(prompt.pictures[0]))
            batcher.submit(prompt, SHORT, lambda text: None).result(SOON)
        del prompt
        batcher.submit(ask(answerer, "the last"), SHORT).result(SOON)
        assert [reference() for reference in pixels] == [None] * 20
    finally:
        gc.enable()
    assert not batcher._running and answerer.reader.prefixes.size <= 100


def test_tokens_say_how_likely_they_were(answerer, batcher):
    """Against one pass of the model itself over prompt and answer."""
    prompt, pieces = ask(answerer, "what is it?"), []
    answer = batcher.submit(prompt, Options(max_new_tokens=6, logprobs=3), pieces.append).result(SOON)
    ids = torch.tensor([[*prompt.ids, *answer.token_ids]])
    with torch.no_grad():
        likely = answerer.model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
    assert [one.token_id for one in answer.logprobs] == list(answer.token_ids)
    for one, row in zip(answer.logprobs, likely, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4) and one.token_id == one.top[0].token_id
        assert [other.token_id for other in one.top] == row.topk(3).indices.tolist()
    assert b"".join(one.bytes for one in answer.logprobs).decode("utf-8", "replace") == answer.text
    assert tuple(one for piece in pieces for one in piece.logprobs) == answer.logprobs
