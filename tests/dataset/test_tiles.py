"""Rows of pictures that are cut: checked by their headers, shared, packed and cached like others."""

import pytest
import torch

from dataset.batching import PackedRows, Row
from dataset.feature_cache import cache_features
from dataset.quarantine import Quarantine
from dataset.readers.opening import read_samples
from dataset.vlm_dataset import GREY, ConversationDataset
from helpers.data import make_picture, write_jsonl
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS
from model.config import IGNORE_INDEX
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, collate_training

SIZES = {"large": (70, 50), "small": (20, 30), "tall": (30, 90)}
VIEWS = {"large": 5, "small": 1, "tall": 4}  # the whole and 2 x 2, not cut, the whole and 3 x 1


@pytest.fixture
def processor(tokenizer) -> VLMProcessor:
    return VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE, tiles=4)


@pytest.fixture
def path(tmp_path):
    """Two questions about each of some pictures, two pictures in one question, and a text."""
    (tmp_path / "images").mkdir()
    lines = []
    for number, (name, size) in enumerate(SIZES.items()):
        make_picture(number, 120).crop((0, 0, *size)).save(tmp_path / "images" / f"{name}.png")
        for question in ("What is it?", "Which colour does it have?"):
            lines.append(line([f"{name}.png"], question))
    lines += [line(["large.png", "tall.png"], "Which is larger?"), line([], "Who are you?")]
    return write_jsonl(tmp_path / "train.jsonl", lines)


def summed_loss(model: MiniMindVLM, row: Row) -> float:
    batch = collate_training([row])
    return model(**batch).loss.item() * int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())


def line(images: list[str], question: str) -> dict:
    turns = [{"role": "user", "content": "<image>" * len(images) + f"\n{question}"},
             {"role": "assistant", "content": "a cat"}]  # fmt: skip
    return {"image": images, "conversations": turns}


def test_rows_hold_every_view_with_its_place(path, processor):
    data = ConversationDataset(read_samples(path), processor, 400)
    assert data.views_a_row.tolist() == [5, 1, 4, 9, 0]  # two questions about a picture share a row
    assert data.conversations_a_row.tolist() == [2, 2, 2, 1, 1]
    for index in range(len(data)):
        row = data[index]
        assert len(row.rendered) == data.lengths[index] and len(row.pictures) == data.views_a_row[index]
        assert row.rendered.image_mask.sum() == IMAGE_TOKENS * len(row.pictures)
    large = data.samples[0].open_picture(0)
    for found, wanted in zip(data[0].pictures, processor.views(large), strict=True):
        assert torch.equal(found, wanted)
    assert len(data[3].pictures) == VIEWS["large"] + VIEWS["tall"]
    assert processor.tokenizer.decode(data.rendered(0).input_ids).count("2,1:") == 1


def test_too_many_views_for_a_row_are_dropped_with_the_cure(path, processor):
    data = ConversationDataset(read_samples(path), processor, 50)
    assert any("would be cut: raise --max_seq_len above 50" in str(one) for one in data.report.dropped)


@pytest.mark.parametrize("kind", ["float16", "int8", "pixels"])
def test_cached_views_are_those_that_are_decoded(path, processor, make_vlm, tmp_path, kind):
    data = ConversationDataset(read_samples(path), processor, 400)
    model, encode = make_vlm(), make_vlm().encode_pictures
    before = [data[index].pictures for index in range(len(data))]
    for rank in (1, 0):
        cache_features(data, encode, "tower", kind, tmp_path / "cache", rank, 2)
    data.features.check_whole()
    assert len(data.features.maps[1]) == 5 + 1 + 4
    for index, views in enumerate(before):
        found = data[index].pictures
        assert len(found) == len(views)
        for one, view in zip(found, views, strict=True):
            wanted = view if kind == "pixels" else model.encode_pictures(view[None])[0]
            assert torch.allclose(one.float(), wanted.float(), atol=0.02)
    again = ConversationDataset(read_samples(path), processor, 400)
    cache_features(again, encode, "tower", kind, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    cut_otherwise = VLMProcessor(processor.tokenizer, IMAGE_TOKENS, IMAGE_SIZE, tiles=2)
    other = ConversationDataset(read_samples(path), cut_otherwise, 400)
    cache_features(other, encode, "tower", kind, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_packed_rows_count_views(path, processor, make_vlm):
    data = ConversationDataset(read_samples(path), processor, 200)
    packed = PackedRows(data, data.lengths.tolist(), data.views_a_row.tolist(), 200, 10)
    assert max(int(data.views_a_row[row].sum()) for row in packed.contents) <= 10
    model = make_vlm()
    for place, row in enumerate(packed.contents):
        alone = sum(summed_loss(model, data[number]) for number in row)
        assert summed_loss(model, packed[place]) == pytest.approx(alone, rel=1e-4)


def test_a_branch_reads_what_it_would_read_alone(path, processor, make_vlm):
    shared = ConversationDataset(read_samples(path), processor, 400)
    alone = [ConversationDataset([sample], processor, 400) for sample in list(read_samples(path))[:2]]
    model = make_vlm()
    parts = sum(summed_loss(model, data[0]) for data in alone)
    assert summed_loss(model, shared[0]) == pytest.approx(parts, rel=1e-4)


def test_a_picture_that_is_damaged_later_is_grey_in_every_view(path, processor, tmp_path):
    data = ConversationDataset(read_samples(path), processor, 400, Quarantine(strict=False, max_share=1.0))
    name = tmp_path / "images" / "large.png"
    name.write_bytes(name.read_bytes()[:60])
    row = data[0]
    assert len(row.pictures) == 5 and all((view == GREY).all() for view in row.pictures)
    assert row.rejected and not row.rendered.trained.any()
