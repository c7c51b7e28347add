"""log p of given answers is what the model's own forward pass says of the whole conversation."""

import pytest
import torch

from helpers.exports import make_seeing
from helpers.models import count_tower_calls, enliven, make_decoder
from model.inference.answerer import Answerer, Options, PromptTooLong, assistant_turn, user_turn
from model.inference.likelihood import Likelihood, log_likelihoods
from model.messages import UserError
from model.tokenizer_files import load_tokenizer
from scripts.export.formats import FORMATS, Source

TEXTS = ["a cat", "two dogs that run, and one bird", "A", "yes, it is", "no"]


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def answerer(make_vlm, request):
    return Answerer(enliven(make_vlm(use_moe=request.param)))


@pytest.fixture
def asked(picture):
    """No, one and two pictures, of different lengths; the second is asked twice."""
    one = [user_turn("What is it?", 1)], [picture(1)]
    two = [user_turn("which one differs and how?", 2)], [picture(2), picture(3)]
    talk = [user_turn("hello", 0), assistant_turn("yes?"), user_turn("who are you and where do you live?", 0)], []
    return [one, two, talk, one, ([user_turn("And where is it?", 1)], [picture(1)])]


def oracle(answerer: Answerer, messages: list[dict], pictures: list, text: str, with_end: bool) -> Likelihood:
    """Of the rendering that training uses: every learnt token of the last answer, from one pass over everything."""
    processor, before = answerer.processor, len(answerer.prompt(messages, pictures).ids)
    rendered = processor.render([*messages, assistant_turn(text)])
    last = len(rendered) - len(processor.endings["assistant"].ids) - (0 if with_end else len(processor.end.ids))
    inputs = processor.prompt_inputs([(rendered[:last], pictures)])
    with torch.no_grad():
        scores = answerer.model(**inputs).logits[0].double().log_softmax(-1)
    ids, total, greedy = inputs["input_ids"][0].tolist(), 0.0, True
    assert rendered.trained[before:last].all() and not rendered.trained[last:].all()
    for position in range(before, last):
        total += float(scores[position - 1, ids[position]])
        greedy &= int(scores[position - 1].argmax()) == ids[position]
    return Likelihood(total, last - before, greedy)


@pytest.mark.parametrize("with_end", [False, True], ids=["text", "with_end"])
def test_sums_are_those_of_the_whole_sequence(answerer, asked, with_end):
    prompts = [answerer.prompt(*question) for question in asked]
    assert len({len(prompt.ids) for prompt in prompts}) == 4
    found = log_likelihoods(answerer, prompts, TEXTS, with_end)
    expected = [oracle(answerer, *question, text, with_end) for question, text in zip(asked, TEXTS, strict=True)]
    assert len({one.tokens for one in found}) > 2
    for one, other in zip(found, expected, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-3) and one.total < -1
        assert (one.tokens, one.greedy) == (other.tokens, other.greedy)
        assert one.mean == one.total / other.tokens


def test_what_the_model_would_say_is_greedy(answerer, asked):
    prompts = [answerer.prompt(*question) for question in asked]
    said = [answerer.batch([prompt], Options(6))[0] for prompt in prompts]
    found = log_likelihoods(answerer, prompts, [answer.text for answer in said])
    encode = answerer.processor.encode  # of some answers the text has other tokens than were said
    as_said = [encode(answer.text) == answer.token_ids for answer in said]
    assert any(as_said) and all(one.greedy for one, same in zip(found, as_said, strict=True) if same)
    assert not any(one.greedy for one in log_likelihoods(answerer, prompts, TEXTS))


def test_a_prompt_of_several_texts_is_read_once(answerer, asked):
    seen, reads = count_tower_calls(answerer.model), []
    read = answerer.reader._read
    answerer.reader._read = lambda prompt: reads.append(len(prompt.ids)) or read(prompt)
    once = log_likelihoods(answerer, [answerer.prompt(*asked[1]) for _ in TEXTS], TEXTS)
    assert seen == [2] and len(reads) == 1
    alone = [log_likelihoods(answerer, [answerer.prompt(*asked[1])], [text])[0] for text in TEXTS]
    assert seen == [2]  # remembered from then on
    assert [one.total for one in once] == pytest.approx([one.total for one in alone], abs=1e-4)


@pytest.mark.parametrize("sees", [True, False], ids=["llava", "decoder"])
def test_a_stock_folder_says_the_same(sees, asked, tmp_path):
    model = make_seeing() if sees else make_decoder()
    FORMATS["llava" if sees else "llm"](Source(model, load_tokenizer(), "tiny"), tmp_path)
    stock, ours = Answerer.from_weight(tmp_path, device="cpu", dtype="float32"), Answerer(model)
    asked = asked if sees else [asked[2]] * 2
    expected, found = (
        log_likelihoods(one, [one.prompt(*question) for question in asked], TEXTS[: len(asked)])
        for one in (ours, stock)
    )
    assert [one.total for one in found] == pytest.approx([one.total for one in expected], abs=1e-3)
    assert [one.tokens for one in found] == [one.tokens for one in expected]


def test_texts_up_to_the_last_position(make_vlm, asked):
    """A short one beside them goes on, where the long conversation's row has no position left."""
    answerer = Answerer(enliven(make_vlm(max_position_embeddings=40)))
    question = asked[3]
    prompt = answerer.prompt(*question)
    room = 40 - len(prompt.ids)
    longest = next(text for n in range(1, 40) if len(answerer.processor.encode(text := "a b" * n)) >= room)
    with pytest.raises(PromptTooLong, match=r"take \d+ tokens and the model reads 40"):
        log_likelihoods(answerer, [prompt], [longest], with_end=True)
    brief = answerer.prompt([user_turn("hi", 0)])
    long = answerer.prompt([user_turn("a b" * 11, 0)])
    texts = ["b", "a b a b a b a b", "a b a b"]
    found = log_likelihoods(answerer, [long, brief, brief], texts)
    assert [one.total for one in found] == pytest.approx(
        [oracle(answerer, [user_turn(q, 0)], [], text, False).total
         for q, text in zip(("a b" * 11, "hi", "hi"), texts, strict=True)], abs=1e-3,
    )  # fmt: skip


def test_what_cannot_be_scored(answerer, asked):
    prompt = answerer.prompt(*asked[0])
    with pytest.raises(UserError, match="a text to score is empty"):
        log_likelihoods(answerer, [prompt], [""])
    assert log_likelihoods(answerer, [prompt], [""], with_end=True)[0].tokens == 1
    assert log_likelihoods(answerer, [], []) == []
    answerer.reader.decoder.head = lambda x: torch.full((len(x), 6400), float("nan"))
    with pytest.raises(UserError, match="computes what is no number"):
        log_likelihoods(answerer, [prompt], ["a"])
