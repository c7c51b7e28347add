"""What TRL learns from is what the stages learn from: the same tokens, the same labels, the same pictures."""

import json

import pytest

pytest.importorskip("trl", reason="tuning with TRL is tried by make test-trl")

import torch
from transformers import AutoProcessor
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from dataset.options import ReadOptions
from helpers.data import SOUND, make_picture, open_lines, write_jsonl
from model.config import IGNORE_INDEX
from model.messages import UserError
from model.processing import VLMProcessor
from model.tokenizer_files import load_tokenizer
from scripts.tune import sft
from scripts.tune.pairs import Pair
from scripts.tune.rows import read_picked, read_talks

TALK = {"image": "a.png", "conversations": [
    {"role": "system", "content": "You see."}, {"role": "user", "content": "<image>\nWhat is it?"},
    {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "有什么？"},
    {"role": "assistant", "content": "猫"},
]}  # fmt: skip


@pytest.fixture
def talk(tmp_path):
    (tmp_path / "images").mkdir()
    make_picture(1).save(tmp_path / "images/a.png")
    return open_lines(tmp_path, TALK)[0]


@pytest.fixture
def rendered(seeing, talk):
    """As the stages learn it."""
    return VLMProcessor.for_config(seeing.config, load_tokenizer()).render(talk.messages)


def test_sft_learns_every_answer_with_its_end_and_nothing_else(folder, talk, rendered):
    collate = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(folder), assistant_only_loss=True)
    batch = collate([sft.row(talk)])
    pictures = torch.from_numpy(rendered.image_mask)
    ids = torch.from_numpy(rendered.input_ids).masked_fill(pictures, 6400)  # Llava's token for pictures
    assert batch["input_ids"][0].tolist() == ids.tolist()
    assert batch["labels"][0].tolist() == rendered.labels.tolist()
    assert batch["pixel_values"].shape == (1, 3, 32, 32) and pictures.sum() == 16


def test_dpo_learns_the_last_answer_with_its_end(folder, talk, rendered):
    processor, (question,) = AutoProcessor.from_pretrained(folder), read_picked_from(talk)
    batch = DataCollatorForVisionPreference(processor)([Pair(question, "狗、狗", "order").row(processor)])
    chosen, mask = batch["input_ids"][0], batch["completion_mask"][0].bool()
    tail = [token for token in rendered.labels.tolist() if token != IGNORE_INDEX]
    assert chosen[mask].tolist() == tail[tail.index(2) + 1 :]  # what is learnt behind the first answer's end
    assert batch["input_ids"][1][batch["completion_mask"][1].bool()][-1] == 2


def read_picked_from(talk):
    return read_picked(talk.where.rpartition(":")[0], ReadOptions(), 1, 0)


def test_talks_are_picked_over_the_whole_file_and_bad_lines_left_out(data, tmp_path, capsys):
    records = [json.loads(line) for line in data.read_text().splitlines()]
    path = write_jsonl(tmp_path / "some.jsonl", [*records[:3], {"conversations": [{"role": "user"}]}])
    options = ReadOptions(images_path=str(data.parent / "images"))
    assert len(read_talks(path, options, 10, seed=0)) == 3 and "left out 1 of 4 lines" in capsys.readouterr().err
    few = {seed: [talk.where for talk in read_talks(data, options, 4, seed)] for seed in (0, 1)}
    assert len(set(few[0])) == 4 and few[0] != few[1]
    assert max(int(where.rpartition(":")[2]) for where in few[0] + few[1]) > 12


def test_plain_text_is_refused(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("once upon a time\n")
    with pytest.raises(UserError, match="words.txt:1: this is plain text"):
        read_talks(str(path), ReadOptions(), 5, 0)


def test_a_talk_that_ends_with_a_question_is_no_question_with_an_answer(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{**SOUND, "conversations": TALK["conversations"][:2]}])
    with pytest.raises(UserError, match="a.jsonl"):
        read_picked(str(path), ReadOptions(images_path=str(tmp_path)), 5, 0)
