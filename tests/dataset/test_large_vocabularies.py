"""Ids above 65,535, as Qwen's vocabulary of 151,936 has them, from a line of a file to a gradient."""

import json

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from dataset import vlm_dataset
from dataset.check import picture_mark, stored_as
from dataset.readers.opening import read_samples
from dataset.step_batch import StepBatches
from dataset.token_cache import MappedData
from dataset.vlm_dataset import ConversationDataset
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS
from model.config import IGNORE_INDEX
from model.processing import VLMProcessor

KEPT, MOVED = 300, 145_000  # ids below the first stay, the others move up by the second
VOCABULARY = 6400 + MOVED


def moved(ids):
    """What an id of the shipped tokenizer is in `large`."""
    return ids + MOVED * (ids >= KEPT)


@pytest.fixture
def large(tokenizer, tmp_path) -> VLMProcessor:
    """The shipped tokenizer with most of its ids far up."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {text: moved(number) for text, number in vocabulary.items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    return VLMProcessor(PreTrainedTokenizerFast(tokenizer_file=str(path)), IMAGE_TOKENS, IMAGE_SIZE)


@pytest.fixture
def start(data_folder, tmp_path, monkeypatch):
    """start(processor): the data, kept on disk."""
    monkeypatch.setattr(vlm_dataset, "WORTH_KEEPING", 1)

    def open_data(processor: VLMProcessor) -> ConversationDataset:
        samples = read_samples(data_folder / "train.jsonl")
        return ConversationDataset(samples, processor, 64, folder=tmp_path / "tokens", say=lambda _: None)

    return open_data


def test_large_ids_come_through_cache_and_batch(start, large, processor):
    small = StepBatches(start(processor))[[list(range(24))]].micro_batches[0]
    start(large)
    data = start(large)  # from what the first start has kept
    assert isinstance(data.checked, MappedData) and data.ids.dtype == np.uint32
    batch = StepBatches(data)[[list(range(24))]].micro_batches[0]
    assert (batch["input_ids"] > 65_535).sum() > 200
    assert torch.equal(batch["input_ids"], moved(small["input_ids"]))
    labels = small["labels"]
    assert torch.equal(batch["labels"], moved(labels)) and (labels == IGNORE_INDEX).any()
    for name in ("image_mask", "loss_positions", "pixel_values"):
        assert torch.equal(batch[name], small[name])


def test_large_ids_reach_loss_and_gradient(start, large, make_vlm):
    model = make_vlm(vocab_size=VOCABULARY).train()
    batch = StepBatches(start(large))[[[0, 1, 2]]].micro_batches[0]
    model(**batch).loss.backward()
    learnt = batch["labels"][batch["labels"] != IGNORE_INDEX].unique()
    gradient = model.lm_head.weight.grad[learnt]
    assert learnt.max() > 65_535 and (gradient.abs().sum(1) > 0).all()


def test_small_vocabularies_take_two_bytes_as_before(start, processor):
    assert start(processor).ids.dtype == np.uint16


@pytest.mark.parametrize(("largest", "kind"), [(65_534, np.uint16), (65_535, np.uint32), (151_935, np.uint32)])
def test_no_id_is_the_mark_of_a_picture(largest, kind, processor, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda _: {"a": 0, "b": largest})
    assert stored_as(processor) == kind and largest < picture_mark(kind)
