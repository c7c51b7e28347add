"""Rows held back for validation: whole groups about the same pictures, chosen by what these show."""

import itertools
import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from dataset.check import BLOCK, print_of
from dataset.quarantine import Quarantine
from dataset.readers.opening import read_samples
from dataset.split import groups_of, hold_back, split_rows
from helpers.data import construct, make_picture, turns, write_jsonl, write_parquet
from helpers.runs import tiny
from trainer.data import load_data
from trainer.train_sft_vlm import SFT_VLM

WORDS = ("a cat", "a dog", "a bird", "two cats", "a red dog")


def records_about(pictures: range, each: int = 3) -> list[dict]:
    """Rows that do not share: a question about each picture, and the next picture's in between."""
    rounds = [[{"image": f"{n}.png", "conversations": turns(1, WORDS[k])} for n in pictures] for k in range(each)]
    return list(itertools.chain(*rounds))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(40):
        make_picture(number).save(tmp_path / "images" / f"{number}.png")
    return tmp_path


@pytest.fixture
def split(folder, processor):
    """split(records): the pictures trained on, and those held back, each a set of names."""

    def split_records(records: list[dict], wanted: int = 6, seed: int = 42) -> tuple[set, set]:
        data = construct(read_samples(write_jsonl(folder / "train.jsonl", records)), processor)
        train, held = (rows.tolist() for rows in split_rows(data.checked, wanted, seed))
        assert sorted(train + held) == list(range(len(data))) and train == sorted(train) and held == sorted(held)
        return tuple(
            {Path(data.checked.name(picture)).name for row in rows for picture in data.checked.shown_in(row)}
            for rows in (train, held)
        )

    return split_records


def test_no_picture_stands_on_both_sides(split):
    train, held = split(records_about(range(40)))
    assert len(held) == 2 and len(train) == 38 and not train & held


def test_sides_follow_content_and_seed_but_neither_order_nor_names(split, folder):
    records = records_about(range(40))
    _, held = split(records)
    random.Random(1).shuffle(records)
    assert split(records)[1] == held
    assert split(records, seed=43)[1] != held
    for number in range(40):
        (folder / "images" / f"{number}.png").rename(folder / "images" / f"renamed_{number}.png")
    renamed = [{**record, "image": f"renamed_{record['image']}"} for record in records]
    assert split(renamed)[1] == {f"renamed_{name}" for name in held}


def test_more_pictures_never_bring_a_trained_one_into_validation(split):
    """The tenth of 90 rows and that of 120 are both more than the six that are wanted."""
    for seed in range(5):
        train, _ = split(records_about(range(30)), seed=seed)
        _, held = split(records_about(range(40)), seed=seed)
        assert len(held) == 2 and not held & train


def test_a_picture_of_two_names_is_one(split, folder):
    _, held = split(records_about(range(40)))
    for name in held:
        shutil.copy(folder / "images" / name, folder / "images" / f"again_{name}")
    again = [{"image": f"again_{name}", "conversations": turns(1)} for name in sorted(held)]
    train, more = split(records_about(range(40)) + again, wanted=8)
    assert more == held | {f"again_{name}" for name in held} and not train & more


def test_rows_of_several_pictures_link_them(split):
    records = [{"image": f"{n}.png, {n + 1}.png", "conversations": turns(2)} for n in range(0, 40, 2)]
    records += [{"image": "1.png,2.png", "conversations": turns(2)}]
    for seed in range(20):
        train, held = split(records, wanted=2, seed=seed)
        assert held and not train & held
        assert len(held & {"0.png", "1.png", "2.png", "3.png"}) == 0  # three rows of 21 are more than a tenth


def test_where_all_is_about_one_picture_there_is_no_validation_and_one_line(folder, processor):
    records = [{"image": "0.png", "conversations": turns(1, word)} for word in WORDS]
    records = [record for word in records for record in (word, {"image": "0.png,0.png", "conversations": turns(2)})]
    data, said = construct(read_samples(write_jsonl(folder / "train.jsonl", records)), processor), []
    train, held = split_rows(data.checked, 4, 42, said.append)
    assert len(train) == 10 and not len(held)
    assert said == [
        "no row is held back for validation: of 10 rows at most 1 may be, but the smallest group about the same "
        "pictures has 10 rows: give --val_path, or more data"
    ]
    assert [len(rows) for rows in split_rows(data.checked, 0, 42, pytest.fail)] == [10, 0]


def test_texts_are_held_back_by_their_tokens(folder, processor):
    texts = [{"text": f"There are {number} cats"} for number in range(50)]
    found = []
    for lines in (texts * 2, texts[::-1] * 2):
        path = write_jsonl(folder / "texts.jsonl", lines)
        data = construct(read_samples(path), processor)
        held = split_rows(data.checked, 4, 42)[1].tolist()
        assert len(held) == 4 and held[2:] == [row + 50 for row in held[:2]]  # the same text twice is one group
        found.append({lines[row]["text"] for row in held})
    assert found[0] == found[1]


def test_files_and_embedded_bytes_have_the_same_sides(split, folder, processor):
    records = records_about(range(40))
    _, held = split(records)
    pictures = [(folder / "images" / record["image"]).read_bytes() for record in records]
    texts = [json.dumps(record["conversations"]) for record in records]
    path = write_parquet(folder / "train.parquet", texts, pictures)
    _, rows = split_rows(construct(read_samples(path), processor).checked, 6, 42)
    assert {records[row]["image"] for row in rows} == held


def test_a_run_holds_back_the_same_rows_at_every_start(folder, tower_folder, processor):
    write_jsonl(folder / "train.jsonl", records_about(range(40)))
    config = tiny(SFT_VLM, folder, tower_folder, val_samples=6)
    (train, validation), again = (load_data(config, processor, Quarantine(), lambda _: None) for _ in range(2))
    assert len(validation) == 6 and len(train) == 114
    assert all(map(np.array_equal, (train.indices, validation.indices), (rows.indices for rows in again)))


# ---- the parts


@pytest.mark.parametrize("size", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK, 100_000])
def test_prints_of_files_and_bytes_are_equal_and_see_size_head_middle_and_tail(size, tmp_path):
    content = random.Random(size).randbytes(size)
    (tmp_path / "picture").write_bytes(content)
    assert print_of(tmp_path / "picture") == print_of(content) < 1 << 64
    assert print_of(content) != print_of(content + b"\0")
    for place in {0, size // 2, size - 1} if size else ():
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        assert print_of(flipped) != print_of(content)


def test_linked_groups_are_those_of_a_plain_union_find():
    chance = random.Random(0)
    for _ in range(200):
        rows = [[chance.randrange(30) for _ in range(chance.choice((1, 1, 1, 2, 3)))] for _ in range(25)]
        contents = np.array(list(itertools.chain(*rows)), np.uint64)
        groups = groups_of(contents, np.cumsum([0, *map(len, rows)]))
        sets = [set(row) for row in rows]
        for _ in rows:
            sets = [set().union(*(other for other in sets if other & own)) for own in sets]
        for one, other in itertools.combinations(range(len(rows)), 2):
            assert (groups[one] == groups[other]) == bool(sets[one] & sets[other])
        assert set(groups.tolist()) == set(range(groups.max() + 1))


def test_a_chain_of_a_hundred_thousand_pictures_is_one_group_and_found_soon():
    order = np.random.default_rng(0).permutation(100_001).astype(np.uint64)
    chain = np.stack([order[:-1], order[1:]], 1).reshape(-1)
    began = time.process_time()
    assert groups_of(chain, np.arange(0, 200_001, 2)).max() == 0
    assert time.process_time() - began < 5


def test_a_group_that_is_too_large_is_passed_over():
    contents, starts = np.repeat(np.arange(3, dtype=np.uint64), (80, 12, 8)), np.arange(101)
    groups = groups_of(contents, starts)
    for seed in range(10):
        assert np.flatnonzero(hold_back(contents, starts, groups, 5, 10, seed)).tolist() == list(range(92, 100))


def test_a_million_rows_are_split_in_seconds():
    contents, starts = np.random.default_rng(0).integers(0, 100_000, 1_000_000).astype(np.uint64), np.arange(1_000_001)
    began = time.process_time()
    held = hold_back(contents, starts, groups_of(contents, starts), 1000, 100_000, 42)
    assert time.process_time() - began < 5
    assert 1000 <= held.sum() < 1030 and not np.isin(contents[held], contents[~held]).any()
