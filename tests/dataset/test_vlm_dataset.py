"""ConversationDataset: stored rows are rendered rows, what is dropped is counted, workers give the same batches."""

import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataset import check, vlm_dataset
from dataset.readers.opening import read_samples
from dataset.samples import DataError
from dataset.vlm_dataset import text_only
from helpers.data import SOUND, TURNS, construct, encoded, make_picture, open_lines, turns, write_parquet
from helpers.models import IMAGE_SIZE
from model.config import END_OF_TEXT_ID, IGNORE_INDEX
from model.processing import VLMProcessor, collate_training


@pytest.fixture
def mixed(data_folder) -> Path:
    """The shared data folder and lines that invite confusion: typed @, several turns, plain text."""
    records = [
        {"image": "0_0.png", "conversations": [*turns(0), {"role": "user", "content": "@@@@<image>@@"}, turns(0)[1]]},
        {"conversations": [{"role": "system", "content": "@" * 9}, *turns(0, "@@@@")]},
        {"text": "a cat @@@@ <image> <|im_end|>"},
    ]  # fmt: skip
    with (data_folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return data_folder / "train.jsonl"


@pytest.mark.parametrize("image_tokens", [1, 4, 7])
@pytest.mark.parametrize("max_seq_len", [1000, 38])
def test_stored_rows_are_the_rendered_rows(mixed, tokenizer, image_tokens, max_seq_len):
    processor = VLMProcessor(tokenizer, image_tokens, IMAGE_SIZE)
    samples = read_samples(mixed)
    data = construct(samples, processor, max_seq_len)
    assert data.kept.tolist() == list(range(27))
    cut = 0
    for index, sample in enumerate(samples):
        if sample.text is None:
            wanted = processor.render(sample.messages).truncated(max_seq_len)
            cut += len(wanted.input_ids) < len(processor.render(sample.messages).input_ids)
        else:
            wanted = processor.render_text(sample.text).truncated(max_seq_len)
        found, pixels, _ = data[index]
        assert np.array_equal(found.input_ids, wanted.input_ids)
        assert np.array_equal(found.labels, wanted.labels)
        assert np.array_equal(found.image_mask, wanted.image_mask)
        assert np.array_equal(found.trained, wanted.trained)
        assert sum(found.image_mask) == image_tokens * len(sample.pictures)
        assert data.lengths[index] == len(wanted.input_ids)
        assert data.report.trained_tokens[index] == sum(label != -100 for label in wanted.labels)
        for picture, path in zip(pixels, sample.pictures, strict=True):
            with Image.open(path) as wanted_picture:
                assert np.array_equal(picture.permute(1, 2, 0).numpy(), np.asarray(wanted_picture))
    assert (cut > 0) == (max_seq_len == 38)
    assert len(data) == len(data.lengths) == data.report.conversations == 27
    assert data.report.pictures == 25
    assert str(data.report).startswith("27 conversations, 25 pictures, trained tokens a conversation ")


def test_samples_too_long_for_their_pictures_are_dropped_and_counted(folder, processor):
    samples = open_lines(
        folder,
        {"conversations": turns(0)},
        {"image": "a.png,b.png,c.png,a.png", "conversations": turns(4)},
        {"image": "a.png", "conversations": turns(1)},
        {"conversations": turns(0, "a cat " * 50)},
        {"conversations": [{"role": "user", "content": "What is it? " * 9}, turns(0)[1]]},
        {"conversations": [{"role": "user", "content": "What is it?"}]},
        {"text": "a cat " * 50},
    )
    path = folder / "train.jsonl"
    data = construct(samples, processor, max_seq_len=18)  # 15 tokens stand before an answer, 19 with one picture
    assert [str(rejected) for rejected in data.report.dropped] == [
        f"{path}:2: its last picture ends at token 20 and would be cut: raise --max_seq_len above 18",
        f"{path}:3: no token of an answer within 18 tokens: raise --max_seq_len, or give it an answer",
        f"{path}:5: no token of an answer within 18 tokens: raise --max_seq_len, or give it an answer",
        f"{path}:6: no token of an answer within 18 tokens: raise --max_seq_len, or give it an answer",
    ]
    assert data.kept.tolist() == [0, 3, 6]
    assert data.report.pictures == 0
    assert data.lengths.tolist() == [18, 18, 18]
    assert data.report.trained_tokens.tolist() == [3, 3, 17]
    assert data[0][0].labels[15:].tolist() == [*processor.encode("a cat"), 2]
    assert data[1][0].labels[15:].tolist() == [*processor.encode("a cat a")]
    assert "dropped 4 samples, the first: " in str(data.report)
    assert f"{path}:2: " in str(data.report)


def test_nothing_left_is_an_error(folder, processor):
    with pytest.raises(DataError, match=r"(?s)no sample of 1 can be used; .*train\.jsonl:1: no token of an answer"):
        construct(open_lines(folder, {"conversations": turns(0)[:1]}), processor)


def test_a_first_token_has_nothing_that_predicts_it(folder, processor):
    """A text cut to its first token would be a sample without a loss."""
    with pytest.raises(DataError, match="no sample of 1 can be used"):
        construct(open_lines(folder, {"text": "a cat"}), processor, max_seq_len=1)


def test_beyond_many_pictures_only_headers_are_read(folder, processor, monkeypatch):
    content = (folder / "images" / "b.png").read_bytes()
    (folder / "images" / "half.png").write_bytes(content[: len(content) // 2])
    samples = open_lines(folder, SOUND, {"image": "half.png", "conversations": TURNS})
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*half\.png"):
        construct(samples, processor)
    monkeypatch.setattr(check, "FULLY_DECODED", 1)
    data = construct(samples, processor)
    rendered, (pixels,), ((where, reason, _),) = data[1]
    assert where.endswith("train.jsonl:2") and "half.png: it cannot be read as a picture" in reason
    assert not any(rendered.trained) and set(rendered.labels) == {IGNORE_INDEX}
    assert np.array_equal(rendered.input_ids, data.rendered(1).input_ids) and any(data.rendered(1).trained)
    assert torch.equal(pixels, torch.full_like(pixels, vlm_dataset.GREY)) and pixels.shape == data[0][1][0].shape
    (folder / "images" / "half.png").write_text("<html>")
    with pytest.raises(DataError, match=r"train\.jsonl:2: "):  # what has no header is still found
        construct(samples, processor)


def test_text_only_removes_exactly_the_placeholders(mixed, processor):
    data = construct(read_samples(mixed), processor, 1000)
    rows = [data[index][0] for index in range(len(data))]
    before = [row.input_ids.tolist() for row in rows]
    batch = text_only(rows)
    assert set(batch.pop("pictures_a_row")) == {0}
    assert sorted(batch) == ["image_mask", "input_ids", "labels", "loss_positions"]
    assert not batch["image_mask"].any()
    for number, sample in enumerate(read_samples(mixed)):
        if sample.text is None:
            parts = [{**m, "content": m["content"].replace("<image>", "")} for m in sample.messages]
            wanted = processor.render(parts)
        else:
            wanted = processor.render_text(sample.text)
        size = len(wanted.input_ids)
        assert batch["input_ids"][number, :size].tolist() == wanted.input_ids.tolist()
        assert (batch["input_ids"][number, size:] == END_OF_TEXT_ID).all()
        assert batch["labels"][number, :size].tolist() == wanted.labels.tolist()
        assert batch["labels"][number, size:].eq(-100).all()
    assert [row.input_ids.tolist() for row in rows] == before  # the rows themselves keep their pictures


def assert_batches_equal(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert [
            name for name in other if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))
        ] == []


def test_two_worker_processes_give_the_same_batches(mixed, processor):
    data = construct(read_samples(mixed), processor, 1000)
    order = [[26, 0, 5], [2, 5, 24], [1, 3], [25, 4, 7, 8]]  # the second is without pictures but for its last
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside threads
        found = list(DataLoader(data, batch_sampler=order, num_workers=2, collate_fn=collate_training))
    assert_batches_equal(found, [collate_training([data[index] for index in rows]) for rows in order])


def test_the_data_set_crosses_to_a_process_started_afresh(mixed, processor):
    """macOS, Windows and newer Pythons start workers afresh and send them the data set as a pickle."""
    data = construct(read_samples(mixed), processor, 1000)
    sent = pickle.loads(pickle.dumps(data))
    assert len(sent) == len(data)
    for index in (0, 1, 2, 24, 26):
        (rendered, pixels, _), (wanted, wanted_pixels, _) = sent[index], data[index]
        assert rendered == wanted
        assert all(map(torch.equal, pixels, wanted_pixels))
    assert sent.processor.encode("a cat") == data.processor.encode("a cat")


def test_a_source_that_gives_fewer_pictures_than_it_did_is_told(folder, processor):
    """Places and pictures that do not match would shift every patch behind the gap, and nobody would see it."""
    contents = [[encoded(make_picture(number), "PNG") for number in range(2)]]
    data = construct(read_samples(write_parquet(folder / "a.parquet", [json.dumps(turns(2))], contents)), processor)
    sample = data.samples[0]
    data.samples = [dataclasses.replace(sample, pictures=sample.pictures[:1])]
    with pytest.raises(DataError, match=r"a\.parquet:1: the text holds 2 <image> but there is 1 picture; start again"):
        data[0]
