"""A recorded step computes what the decoder computes kernel by kernel. Without a GPU it runs where it would replay."""

import pytest
import torch

from helpers.models import enliven
from model.inference import cuda_graph
from model.inference.answerer import Answerer, Options

LONG = Options(max_new_tokens=300)  # the cache grows on the way


@pytest.fixture
def recorded(monkeypatch):
    """How often a step was recorded; a recorded step runs, where on a GPU it would be replayed."""
    steps = []

    def record(step):
        step()  # once before, as on a GPU
        steps.append(step)
        return step

    monkeypatch.setattr(cuda_graph, "record", record)
    return steps


@pytest.fixture
def answerers(make_vlm):
    """The same model without graphs and with them."""
    plain, graphed = (Answerer(enliven(make_vlm(max_position_embeddings=2048))) for _ in range(2))
    graphed.reader.decoder.graphs = True
    return plain, graphed


def prompts(answerer: Answerer, pictures: list) -> list:
    def ask(text: str, *seen) -> object:
        return answerer.prompt([{"role": "user", "content": text}], seen)

    return [ask("hello, who are you?"), ask("<image>\nwhat is it?", pictures[0]), ask("<image>\nwhere?", pictures[1])]


def test_one_answer(answerers, recorded, picture):
    plain, graphed = answerers
    for asked in zip(*(prompts(answerer, [picture(1), picture(2)]) for answerer in answerers), strict=True):
        expected, found = (answerer.stream(prompt, LONG) for answerer, prompt in zip(answerers, asked, strict=True))
        assert found.token_ids == expected.token_ids and len(set(found.token_ids)) > 20
    assert len(recorded) == 6, "each of three answers records a step, and another once its cache has grown"
    # What a recorded step has written is remembered as well as any other.
    again = graphed.stream(prompts(graphed, [picture(1), picture(2)])[1], LONG)
    assert again.token_ids == plain.stream(prompts(plain, [picture(1), picture(2)])[1], LONG).token_ids


@pytest.mark.parametrize("seed", [None, 3])
def test_rows_that_end_at_different_times(answerers, recorded, picture, seed):
    options = Options(max_new_tokens=60, temperature=1.0 if seed else 0.0, seed=seed)
    plain, graphed = answerers
    expected = plain.batch(prompts(plain, [picture(1), picture(2)]), options)
    # Where a row leaves the others go on with another graph.
    for answerer in answerers:
        answerer.end_ids = frozenset({expected[0].token_ids[20], expected[1].token_ids[35]})
    expected, found = (answerer.batch(prompts(answerer, [picture(1), picture(2)]), options) for answerer in answerers)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert len({answer.new_tokens for answer in found}) > 1 and len(recorded) >= 2


def test_logits_are_the_same_and_stay(make_vlm, recorded):
    model = enliven(make_vlm())
    eager, graphed = (Answerer(model).reader.decoder for _ in range(2))
    graphed.graphs = True
    generator = torch.Generator().manual_seed(0)
    caches = [decoder.new_cache(2, 9) for decoder in (eager, graphed)]
    for cache in caches:
        cache.padding = torch.tensor([0, 4])
    kept = []
    with torch.inference_mode():
        for length in (9, *[1] * 12):
            x = torch.randn(2, length, model.config.hidden_size, generator=generator)
            expected, found = (decoder(x, cache) for decoder, cache in zip((eager, graphed), caches, strict=True))
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            kept.append((expected, found))
    for expected, found in kept:  # nothing that was given out changed afterwards
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(recorded) == 1 and caches[0].length == caches[1].length == 21


@pytest.mark.parametrize("fault", ["raises", "forgets the padding", "sees too little"])
def test_a_graph_that_is_no_good_is_not_used(answerers, monkeypatch, picture, caplog, fault):
    plain, graphed = answerers

    def record(step):
        if fault == "raises":
            raise RuntimeError("operation not permitted when stream is capturing")
        graph = step.__self__

        def replay():
            graph.padding.zero_() if fault == "forgets the padding" else graph.padding.add_(9)
            step()

        return replay

    monkeypatch.setattr(cuda_graph, "record", record)
    expected, found = (answerer.batch(prompts(answerer, [picture(1), picture(2)]), LONG) for answerer in answerers)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    assert graphed.reader.decoder.graphs is False and "without CUDA graphs" in caplog.text


def test_experts_have_no_graph(make_vlm):
    decoder = Answerer(enliven(make_vlm(use_moe=True))).reader.decoder
    assert decoder.graphs is False


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(make_vlm, picture):
    plain, graphed = (Answerer(enliven(make_vlm()), "cuda") for _ in range(2))
    assert graphed.reader.decoder.graphs
    plain.reader.decoder.graphs = False
    found, expected = (answerer.stream(prompts(answerer, [picture(1)] * 2)[1]) for answerer in (graphed, plain))
    assert found.token_ids == expected.token_ids
