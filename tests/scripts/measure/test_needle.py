"""The needle test counts right answers at their depth, and perplexity at its position."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch

from helpers.models import enliven, make_decoder
from model.inference.answerer import Answer, Answerer
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.processing import IMAGE_TAG
from model.weights import save_weights
from scripts.measure import needle


@dataclass
class Knows:
    """Stands for an answerer that has read everything, and forgets what is deeper than it reads."""

    inner: Answerer
    reach: float = 1.0

    @property
    def processor(self):
        return self.inner.processor

    @property
    def reader(self):
        return self.inner.reader

    def prompt(self, messages, pictures=()):
        return messages[0]["content"], pictures

    def stream(self, prompt, options):
        (text, pictures), said = prompt, "no"
        before, _, question = text.rpartition("\n")
        key = question.removeprefix("What is the password of ").removesuffix("?")
        place = before.find(f"The password of {key} is ")
        if 0 <= place <= self.reach * len(before):
            said = before[place:].partition(".")[0] + "."
        if pictures:
            assert before.count(IMAGE_TAG) == len(pictures)
        return Answer(f" {said} ", (), 0, 0, 0.0, 0.0)


@pytest.fixture
def answerer() -> Answerer:
    return Answerer(enliven(make_decoder(vocab_size=6400)))


def test_right_answers_are_counted_at_their_tenth(answerer):
    assert needle.find_facts(Knows(answerer), 400, 3, seed=1) == needle.Found((3,) * 10, 3)
    half = needle.find_facts(Knows(answerer, reach=0.5), 2000, 2, seed=1)
    assert half.right == (2,) * 5 + (0,) * 5
    assert half.record()["lowest"] == 0 and half.record()["all"] == 0.5


def test_a_model_that_knows_nothing_finds_nothing(answerer):
    """The real engine; each text is read once, and the questions behind it alone."""
    lengths, read = [], answerer.reader.decoder.read
    answerer.reader.decoder.read = lambda x, cache: lengths.append(x.shape[1]) or read(x, cache)
    answerer.end_ids = answerer.end_ids | set(range(6400))  # a token is enough
    assert needle.find_facts(answerer, 400, 1, seed=1).right == (0,) * 10
    assert lengths[0] > 350 and max(lengths[1:]) < 40


def test_perplexity_is_that_of_the_models_own_loss(answerer):
    model: MiniMindForCausalLM = answerer.model
    rows = needle.texts_of(answerer.processor, 1300, 2, seed=1)
    found = needle.perplexity_by_position(model, rows)
    assert list(found) == ["0-512", "512-1024", "1024-2048"]
    with torch.inference_mode():
        losses = torch.stack([
            torch.nn.functional.cross_entropy(model(row[None]).logits[0, 511:1023], row[512:1024]) for row in rows
        ])  # fmt: skip
    assert found["512-1024"] == pytest.approx(math.exp(losses.mean()), rel=1e-3)


def test_other_positions_are_asked_with_as_if_the_weights_said_so(answerer):
    model, other = answerer.model, make_decoder(vocab_size=6400, rope_theta=1e3)
    needle.with_rope(model, {"rope_theta": 1e3})
    assert torch.equal(model.model.rotary.frequencies, other.model.rotary.frequencies)
    with pytest.raises(UserError, match="rope_type must be"):
        needle.with_rope(model, {"rope_type": "dynamic"})


def test_a_run_prints_a_table_and_writes_json(tmp_path, monkeypatch, capsys):
    save_weights(enliven(make_decoder(vocab_size=6400)), tmp_path / "llm_32.safetensors")
    monkeypatch.setattr(needle, "ANSWER", replace(needle.ANSWER, max_new_tokens=2))
    sizes = ["--lengths", "240", "--texts", "1", "--perplexity_texts", "1", "--rope", '{"rope_theta": 5000}']
    files = ["--weight", tmp_path / "llm_32.safetensors", "--json", tmp_path / "new/needle.json"]
    monkeypatch.setattr("sys.argv", ["needle.py", *sizes, *map(str, files), "--device", "cpu"])
    needle.main()
    found = json.loads((tmp_path / "new/needle.json").read_text())
    assert found["rope_parameters"]["rope_theta"] == 5000 and found["tokens"]["240"]["asked_each"] == 1
    said = capsys.readouterr().out
    assert "   95%" in said and "0-512" in said and f"{240:>9}" in said


def test_pictures_are_found_by_number_or_thing(make_vlm, monkeypatch):
    """Of what the engine is asked: each tenth's picture, with all pictures of the row."""
    asked = []

    class Notes(Knows):
        def stream(self, prompt, options):
            asked.append((prompt[0].rpartition("\n")[2], len(prompt[1])))
            return Answer("Picture 1 shows the cat.", (), 0, 0, 0.0, 0.0)

    needle.find_pictures(Notes(Answerer(make_vlm())), 3, 1, seed=1, concepts=128)
    assert len(asked) == 10 and {count for _, count in asked} == {3}
