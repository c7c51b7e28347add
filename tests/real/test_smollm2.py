"""A real base, SmolLM2-135M-Instruct: our decoder computes what transformers computes, and answers."""

import sys

import pytest
import torch

pytest.importorskip("gguf", reason="real weights are tried by make test-real")
pytest.importorskip("accelerate", reason="real weights are tried by make test-real")

import eval_vlm
from helpers.foreign_base import conversations
from model.config import END_ID
from model.inference.answerer import Answerer, Options, user_turn
from model.processing import VLMProcessor
from model.tokenizer_files import read_tokenizer

BAR = 1e-5  # largest difference of an fp32 logit
TEXT = (
    "The Eiffel Tower was built in 1889. It is 330 metres tall, and 12,345 rivets were counted twice. def f(x):\n"
    "    return x + 1\n\nPhotosynthesis turns light, water and carbon dioxide into sugar; \"why?\" asked the child."
)  # fmt: skip
SHORT, LONG = "What is the capital of France?", "Tell me a story about a dog who finds an old map."


@torch.no_grad()
def test_logits_are_those_of_transformers(ours, theirs, their_tokenizer):
    ids = their_tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 60
    expected = theirs(ids).logits
    assert expected.std() > 1 and (ours(ids).logits - expected).abs().max() <= BAR


def test_the_renderer_writes_what_its_chat_template_writes(smollm2, their_tokenizer):
    processor = VLMProcessor(read_tokenizer(smollm2))
    for messages in conversations():
        asks = messages[-1]["role"] == "user"
        expected = their_tokenizer.apply_chat_template(messages, add_generation_prompt=asks, return_dict=True)
        assert processor.render(messages, add_generation_prompt=asks).input_ids.tolist() == expected["input_ids"]


@torch.no_grad()
def test_64_greedy_tokens_are_those_of_transformers(ours, theirs, their_tokenizer, smollm2):
    prompt = their_tokenizer.apply_chat_template(
        [{"role": "user", "content": LONG}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    expected = theirs.generate(**prompt, max_new_tokens=64, do_sample=False, pad_token_id=END_ID)
    assert torch.equal(ours.generate(**prompt, max_new_tokens=64, do_sample=False), expected)
    answerer = Answerer(ours, processor=VLMProcessor.for_config(ours.config, read_tokenizer(smollm2)))
    answer = answerer.stream(answerer.prompt([user_turn(LONG, 0)], []), Options(max_new_tokens=64))
    assert list(answer.token_ids) == expected[0, prompt["input_ids"].shape[1] :].tolist()
    assert answer.new_tokens == 64


def test_it_answers_in_a_terminal(smollm2, monkeypatch, capsys):
    options = ["--weight", str(smollm2), "--prompt", SHORT, "--device", "cpu", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["eval_vlm.py", *options])
    eval_vlm.main()
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."
