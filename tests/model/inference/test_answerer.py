"""The answering engine says what generate() says, whichever way it is asked, and whatever it remembers."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from helpers.models import IMAGE_TOKENS, count_tower_calls, enliven
from model.config import MiniMindConfig
from model.inference.answerer import Answer, Answerer, Interrupted, Options, PromptTooLong
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.pictures import SampleError
from scripts.measure.generation import clocks, measure_generation, table

SHORT = Options(max_new_tokens=12)
WHAT, WHERE = "<image>\nWhat is it?", "<image>\nAnd where would you say that it is?"


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def answerer(make_vlm, request):
    return Answerer(enliven(make_vlm(use_moe=request.param)))


@pytest.fixture
def dense(make_vlm):
    return Answerer(enliven(make_vlm()))


def question(text: str = WHAT) -> list[dict]:
    return [{"role": "user", "content": text}]


def oracle(answerer: Answerer, messages: list[dict], pictures: list, count: int = 12) -> tuple[int, ...]:
    """generate() of transformers, which remembers nothing."""
    inputs = answerer.processor.prompts([(messages, pictures)])
    with torch.no_grad():
        found = answerer.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    tokens = tuple(found[0, inputs["input_ids"].shape[1] :].tolist())
    assert len(set(tokens)) >= len(tokens) // 2, f"{tokens} would hide mistakes"
    return tokens


@pytest.fixture
def conversations(picture):
    """No, one and two pictures, of different lengths."""
    return [
        (question("hello, who are you and where do you live?"), []),
        (question(), [picture(1)]),
        (question("<image><image>\nwhich one differs and how?"), [picture(2), picture(3)]),
        (question(WHERE), [picture(1)]),
    ]


def stream(
    answerer: Answerer, messages: list[dict], pictures: Sequence = (), options: Options = SHORT, **how
) -> Answer:
    return answerer.stream(answerer.prompt(messages, pictures), options, **how)


def batch(answerer: Answerer, conversations: list, options: Options = SHORT) -> list[Answer]:
    return answerer.batch([answerer.prompt(*conversation) for conversation in conversations], options)


def read_lengths(answerer: Answerer) -> list[int]:
    """Positions of each pass through the decoder, filled while it runs."""
    lengths, decoder = [], answerer.reader.decoder

    def watched(x, cache):
        lengths.append(x.shape[1])
        return decoder(x, cache)

    watched.new_cache = decoder.new_cache
    answerer.reader.decoder = watched
    return lengths


# the same text


def test_stream_is_generate(answerer, conversations):
    for messages, pictures in conversations:
        pieces = []
        answer = stream(answerer, messages, pictures, SHORT, show=pieces.append)
        assert answer.token_ids == oracle(answerer, messages, pictures)
        assert "".join(pieces) == answer.text and not answer.stopped
        assert answer.new_tokens == 12 and answer.seconds_to_first > 0 and answer.tokens_per_second > 0


def test_batch_is_generate(answerer, conversations):
    answers = batch(answerer, conversations, SHORT)
    assert len({answer.prompt_tokens for answer in answers}) == 4
    assert [answer.token_ids for answer in answers] == [oracle(answerer, *asked) for asked in conversations]


def test_rows_that_end_leave_the_others_as_they_were(answerer, conversations):
    """Ends fall at different steps, so the cache loses rows in between."""
    free = [batch(answerer, [asked], SHORT)[0].token_ids for asked in conversations]
    (end,) = answerer.end_ids = {free[2][4]}
    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    assert [answer.token_ids for answer in batch(answerer, conversations, SHORT)] == expected
    answerer.end_ids = {free[0][1]}
    lone = batch(answerer, conversations[:2], SHORT)
    assert lone[0].token_ids == free[0][:2]
    assert lone[1].token_ids[:12] == free[1][: len(lone[1].token_ids)]


def test_yarn_turns_as_in_the_model(make_vlm, picture):
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    answerer = Answerer(enliven(make_vlm(rope_parameters=scaling)))
    answer = stream(answerer, question(), [picture(1)], SHORT)
    assert answer.token_ids == oracle(answerer, question(), [picture(1)])


def test_answers_longer_than_the_first_room(dense, picture):
    answer = stream(dense, question(), [picture(1)], Options(max_new_tokens=300))
    inputs = dense.processor.prompts([(question(), [picture(1)])])
    expected = dense.model.generate(**inputs, max_new_tokens=300, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.token_ids == tuple(expected.tolist()) and answer.new_tokens > 256


def test_answers_up_to_the_last_position(make_vlm, picture):
    """The table of rotary angles has so many, and nobody asks for one more."""
    answerer = Answerer(enliven(make_vlm(max_position_embeddings=40)))
    answer = stream(answerer, question(), [picture(1)], Options(max_new_tokens=100))
    assert answer.prompt_tokens + answer.new_tokens == len(answerer.reader.decoder.rotary) == 40
    assert answer.token_ids == oracle(answerer, question(), [picture(1)], answer.new_tokens)


def test_a_row_at_the_last_position_waits_for_others(make_vlm):
    """Two short conversations go on beside it: one of three rows has ended, which is too few to move them."""
    answerer = Answerer(enliven(make_vlm(max_position_embeddings=40)))
    asked = [(question("a b" * 11 + " c d e"), []), (question("hi"), []), (question("hello"), [])]
    answers = batch(answerer, asked, Options(max_new_tokens=20))
    assert answers[0].prompt_tokens + answers[0].new_tokens == 40 and answers[1].new_tokens == 20
    assert [answer.token_ids for answer in answers] == [
        batch(answerer, [one], Options(max_new_tokens=20))[0].token_ids for one in asked
    ]


def test_making_the_prompt_counts_for_the_first_token(dense):
    prompt = dense.prompt(question("hello"))
    assert prompt.seconds > 0
    prompts = [replace(prompt, seconds=seconds) for seconds in (100.0, 10.0)]
    assert [round(dense.stream(prompt, SHORT).seconds_to_first, -1) for prompt in prompts] == [100, 10]
    assert [round(answer.seconds_to_first, -1) for answer in dense.batch(prompts, SHORT)] == [110, 110]


def test_a_decoder_without_eyes(tiny_config):
    answerer = Answerer(enliven(MiniMindForCausalLM(MiniMindConfig(**tiny_config.to_diff_dict())).eval()))
    answer = stream(answerer, question("hello"), (), SHORT)
    ids = torch.tensor([answerer.processor.render(question("hello"), add_generation_prompt=True).input_ids.tolist()])
    expected = answerer.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert answer.token_ids == tuple(expected.tolist())


def test_bfloat16_stays_near(make_vlm, picture):
    exact, rounded = Answerer(enliven(make_vlm())), Answerer(enliven(make_vlm()), dtype=torch.bfloat16)
    prompt = exact.prompt(question(), [picture(1)])
    with torch.inference_mode():
        found = [answerer.reader.start([prompt]) for answerer in (exact, rounded)]
        steps = [
            answerer.reader.step(torch.tensor([5]), cache)
            for answerer, (_, cache) in zip((exact, rounded), found, strict=True)
        ]
    for one, other in (found[0][0], found[1][0]), steps:
        assert 0 < (one - other).abs().max() < 0.05 * one.abs().max()


# what is remembered


def test_a_second_question_reads_the_picture_no_more(answerer, picture):
    calls = count_tower_calls(answerer.model)
    stream(answerer, question(), [picture(1)], SHORT)
    lengths = read_lengths(answerer)
    second = stream(answerer, question(WHERE), [picture(1)], SHORT)
    own = len(answerer.processor.encode("\nAnd where would you say that it is?"))
    assert calls == [1] and lengths[0] <= own + 6 and lengths[1:] == [1] * 11
    assert second.token_ids == oracle(answerer, question(WHERE), [picture(1)])


def test_another_picture_is_read_anew(answerer, picture):
    calls = count_tower_calls(answerer.model)
    first = stream(answerer, question(), [picture(1)], SHORT)
    other = stream(answerer, question(), [picture(2)], SHORT)
    again = stream(answerer, question(), [picture(1)], SHORT)
    assert calls == [1, 1] and first.token_ids == again.token_ids != other.token_ids
    assert other.token_ids == oracle(answerer, question(), [picture(2)])


def test_order_of_pictures_counts(answerer, picture):
    messages, calls = question("<image><image>\nwhich?"), count_tower_calls(answerer.model)
    stream(answerer, messages, [picture(1), picture(2)], SHORT)
    turned = stream(answerer, messages, [picture(2), picture(1)], SHORT)
    mixed = stream(answerer, messages, [picture(1), picture(3)], SHORT)
    assert calls == [2, 1]  # only the third picture was new
    assert turned.token_ids == oracle(answerer, messages, [picture(2), picture(1)])
    assert mixed.token_ids == oracle(answerer, messages, [picture(1), picture(3)])


def test_the_next_turn_reads_only_itself(answerer, picture):
    messages = question()
    for text in ("And its colour?", "How many are there?"):
        answer = stream(answerer, messages, [picture(1)], SHORT)
        messages = [*messages, {"role": "assistant", "content": "a cat"}, *question(text)]
        lengths = read_lengths(answerer)
    answer = stream(answerer, messages, [picture(1)], SHORT)
    assert answer.token_ids == oracle(answerer, messages, [picture(1)])
    assert lengths[0] < answer.prompt_tokens / 2


def test_typed_at_signs_are_no_picture(answerer, picture):
    """As many as a picture takes, so that the ids of both prompts are the same."""
    span = "@" * IMAGE_TOKENS
    stream(answerer, question("<image>what?"), [picture(1)], SHORT)
    typed = stream(answerer, [{"role": "user", "content": [{"type": "text", "text": f"{span}what?"}]}], (), SHORT)
    assert typed.token_ids == oracle(answerer, question(f"{span}what?"), [])


def test_a_batch_remembers_for_its_own_rows(dense, picture):
    calls, lengths = count_tower_calls(dense.model), read_lengths(dense)
    asked = [(question(f"<image>\nnumber {row}?"), [picture(1)]) for row in range(5)]
    answers = batch(dense, asked, SHORT)
    assert calls == [1] and max(lengths[1:]) < lengths[0] / 1.5
    assert [answer.token_ids for answer in answers] == [oracle(dense, *conversation) for conversation in asked]


@pytest.mark.parametrize("limit", [0, 20, 60])
def test_memory_is_bounded(dense, picture, limit):
    dense.reader.prefixes.limit, dense.reader.pictures.limit = limit, 2
    for seed in range(4):
        answer = stream(dense, question(), [picture(seed)], SHORT)
        assert answer.token_ids == oracle(dense, question(), [picture(seed)])
        assert dense.reader.prefixes.size <= limit and dense.reader.pictures.size <= 2
    assert bool(dense.reader.prefixes.keys()) == (limit >= answer.prompt_tokens)


def test_threads_share_an_engine(dense, picture):
    asked = [(question(f"<image>\nnumber {row}?"), [picture(row % 2)]) for row in range(6)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda conversation: stream(dense, *conversation, SHORT), asked))
    assert [answer.token_ids for answer in answers] == [oracle(dense, *conversation) for conversation in asked]


# endings


def test_padding_alone_is_an_error(dense, picture):
    """Nothing of it is ever shown: a user would see a program that says nothing and ends well."""
    dense.reader.decoder.head = lambda x: F.one_hot(torch.zeros(len(x), dtype=torch.long), 6400)
    with pytest.raises(Interrupted, match=r"nothing but padding \(12 tokens\) in torch.float32: ask with --dtype"):
        stream(dense, question(), [picture(1)], SHORT)
    with pytest.raises(UserError, match="nothing but padding"):
        batch(dense, [(question(), [picture(1)])] * 2, SHORT)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_an_error(dense, picture, temperature):
    dense.reader.decoder.head = lambda x: torch.full((len(x), 6400), float("nan"))
    sampling = Options(12, temperature=temperature)
    with pytest.raises(Interrupted, match="computes what is no number in torch.float32: ask with --dtype float32"):
        stream(dense, question(), [picture(1)], sampling)
    with pytest.raises(UserError, match="no number"):
        batch(dense, [(question(), [picture(1)])] * 2, sampling)


def test_stopped_ends_the_answer(dense, picture):
    count = iter(range(100))
    answer = stream(dense, question(), [picture(1)], SHORT, stopped=lambda: next(count) == 3)
    assert answer.stopped and answer.token_ids == oracle(dense, question(), [picture(1)])[:4]
    assert stream(dense, question(), [picture(1)], SHORT).token_ids == oracle(dense, question(), [picture(1)])


def test_an_error_in_show_keeps_the_text_and_the_engine(dense, picture):
    shown = []

    def fail(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise OSError("the browser went away")

    with pytest.raises(Interrupted, match="the browser went away") as caught:
        stream(dense, question(), [picture(1)], SHORT, show=fail)
    assert caught.value.answer.text == "".join(shown)
    whole = stream(dense, question(), [picture(1)], SHORT)
    assert whole.token_ids == oracle(dense, question(), [picture(1)]) and whole.text.startswith("".join(shown))


def test_an_error_of_the_model_keeps_the_text_and_the_engine(dense, picture, monkeypatch):
    layer, calls = dense.reader.decoder.layers[1].mlp, []

    def fail(x):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return layer(x)

    monkeypatch.setattr(dense.reader.decoder.layers[1], "mlp", fail)
    with pytest.raises(Interrupted, match="broke off after 4 tokens: out of memory") as caught:
        stream(dense, question(), [picture(1)], SHORT)
    assert caught.value.answer.token_ids == oracle(dense, question(), [picture(1)])[:4]
    assert stream(dense, question(), [picture(1)], SHORT).token_ids == oracle(dense, question(), [picture(1)])


def test_wrong_numbers_are_refused(dense, picture):
    with pytest.raises(SampleError, match="holds 1 <image> but there are 0 pictures"):
        stream(dense, question())
    dense.max_length = 40
    assert stream(dense, question(), [picture(1)], Options(max_new_tokens=100)).new_tokens == 40 - 20
    with pytest.raises(PromptTooLong, match="takes .* tokens and the model reads 40"):
        batch(dense, [(question("hello " * 40), [])])
    assert batch(dense, []) == []


def test_a_seed_draws_the_same_answer(dense, picture, conversations):
    def ask(seed: int | None) -> tuple[int, ...]:
        return stream(dense, question(), [picture(1)], Options(12, temperature=2.0, top_p=1.0, seed=seed)).token_ids

    assert ask(1) == ask(1) != ask(2) != ask(None) != ask(None)
    options = Options(12, temperature=1.5, seed=3)
    drawn = [[answer.token_ids for answer in batch(dense, conversations, options)] for _ in range(2)]
    assert drawn[0] == drawn[1] != [answer.token_ids for answer in batch(dense, conversations, SHORT)]


def test_a_seed_draws_in_a_batch_what_it_draws_alone(dense, conversations):
    """Whoever the neighbours are, and when they end."""
    options = Options(12, temperature=1.5, seed=3)
    free = [stream(dense, *asked, options).token_ids for asked in conversations]
    assert [answer.token_ids for answer in batch(dense, conversations, options)] == free
    dense.end_ids = {free[0][1], free[2][3]}  # rows leave the cache
    alone = [stream(dense, *asked, options).token_ids for asked in conversations]
    assert len({len(row) for row in alone}) > 1
    assert [answer.token_ids for answer in batch(dense, conversations, options)] == alone


def test_the_benchmark_compares_equal_answers(make_vlm):
    """The plain way is a second oracle: measure_generation raises unless both say the same."""
    result = measure_generation(1, 5, 1, enliven(make_vlm()))
    lines = table(result).splitlines()
    assert len(lines) == 19 and all(line.endswith("x") for line in lines if line.startswith("  "))
    for name in ("decode_ratio", "first_token_ratio_cpu", "second_question_ratio"):
        assert result[name] > 0
    assert result["batch_text"]["ratio"] > 0 and result["medians"]["prompt_tokens"] == 24


def test_the_benchmark_notices_a_difference(make_vlm, monkeypatch):
    monkeypatch.setattr(
        "scripts.measure.generation.PlainWay.tokens", lambda *_: ([0] * 5, [clocks() + k for k in range(5)])
    )
    with pytest.raises(RuntimeError, match="the engine says .* the plain way"):
        measure_generation(1, 5, 1, enliven(make_vlm()))
