"""Bad data: what is left out is counted and named by file and line, what is too much refuses, nothing crashes or hangs.

helpers/zoo.py holds the kinds of bad input.
"""

import dataclasses
import io
import json
import pickle
import random
import resource
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from dataset import check, samples
from dataset.feature_cache import cache_features
from dataset.quarantine import DAMAGED, LEAST, QUARANTINE, Quarantine
from dataset.readers import json_lines
from dataset.readers.opening import read_samples
from dataset.samples import DROPPED, BadSample, DataError, Rejected
from dataset.step_batch import Counts, StepBatch, StepBatches
from dataset.vlm_dataset import ConversationDataset
from helpers.data import encoded, make_picture, write_jsonl
from helpers.faults import outcome, run_ranks
from helpers.runs import run_until, tiny
from helpers.zoo import (
    LONGEST,
    SOUND_LINE,
    as_bytes,
    bad_pictures,
    lenient,
    make_zoo,
    odd_pictures,
    turns,
    with_picture,
    write_lines,
)
from model.config import IMAGE_TOKEN_ID
from model.pictures import SampleError, open_picture
from scripts.status import describe
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM


def written(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the zoo


def test_every_kind_of_bad_sample_is_counted_and_named(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE", LONGEST)
    planted = make_zoo(tmp_path)
    opened = []
    monkeypatch.setattr(samples, "open_picture", lambda source, *_: (opened.append(source), open_picture(source))[1])
    random.Random(0).shuffle(planted)
    lines, wanted = [SOUND_LINE.encode()], {}
    for kind, line, reason in planted:
        lines += [line, SOUND_LINE.encode() if len(lines) % 3 else as_bytes(with_picture("b.png")), b""]
        wanted[f"{tmp_path / 'train.jsonl'}:{len(lines) - 2}"] = (kind, reason)
    path = write_lines(tmp_path / "train.jsonl", lines)
    quarantine = lenient(tmp_path / QUARANTINE)
    data = ConversationDataset(read_samples(path), processor, 64, quarantine)

    found = {entry["where"]: entry["reason"] for entry in written(tmp_path / QUARANTINE)}
    assert {where: kind for where, (kind, _) in wanted.items() if where not in found} == {}
    assert {where: reason for where, reason in found.items() if wanted.get(where, ("", "none"))[1] not in reason} == {}
    assert quarantine.bad == len(data.report.bad) == len(planted) >= 90
    assert data.report.conversations == len(planted) + 1 and not data.report.dropped
    assert all(reason.isprintable() for reason in found.values())
    inside = (tmp_path / "images").resolve()
    assert not [path for path in opened if not path.resolve().is_relative_to(inside)]
    assert not [path for path in opened if path.exists() and not path.is_file()]


def test_bombs_cost_no_memory():
    pictures = bad_pictures()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb.png", "square.png", "huge.png", "text_bomb.png", "strip.png"):
        with pytest.raises(SampleError):
            open_picture(io.BytesIO(pictures[name][0]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB; decoding one takes 88 MB


@pytest.mark.parametrize("name", odd_pictures())
def test_odd_pictures_are_what_they_should_be(name, tmp_path, processor):
    content, corner = odd_pictures()[name]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(content)
    path = write_jsonl(tmp_path / "train.jsonl", [with_picture(name)])
    data = ConversationDataset(read_samples(path), processor, 64)
    (picture,) = data.samples[0].open_pictures()
    assert picture.mode == "RGB" and np.abs(np.subtract(picture.getpixel((0, 0)), corner)).max() <= 1
    assert data[0][1][0].shape == (3, processor.image_size, processor.image_size)


@pytest.mark.parametrize(
    "text",
    ["<|image_pad|><|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "@@@@", "\0", "\x1b[2J", "a" * 99_999],
)
def test_text_that_looks_like_control_is_text(text, tmp_path, processor):
    (tmp_path / "images").mkdir()
    make_picture(0).save(tmp_path / "images" / "a.png")
    record = {"image": "a.png", **turns("<image>" + text, text)}
    plain = {"image": "a.png", **turns("<image>x", "x")}
    lines = read_samples(write_jsonl(tmp_path / "train.jsonl", [record, plain]))
    row, other = (ConversationDataset([sample], processor, 10**6).rendered(0) for sample in lines)
    control = range(3)
    assert sum(row.image_mask) == processor.image_tokens
    assert [i for i in row.input_ids if i in control] == [i for i in other.input_ids if i in control]
    assert row.input_ids.tolist().count(IMAGE_TOKEN_ID) == processor.image_tokens + 2 * text.count("@")


def test_what_was_rejected_crosses_to_another_process():
    error = BadSample("train.jsonl:3", "too\nlong", DROPPED)
    assert pickle.loads(pickle.dumps(error)).rejected == Rejected("train.jsonl:3", "too long", "dropped")
    assert str(error) == str(error.rejected) == "train.jsonl:3: too long"


# ---- how much is too much


def sound_and_bad(path: Path, bad: set[int], lines: int) -> Path:
    return write_lines(path, [b"nonsense %d" % n if n in bad else SOUND_LINE.encode() for n in range(1, lines + 1)])


@pytest.mark.parametrize(
    ("bad", "lines", "share", "refused"),
    [
        ({2}, 24, 0.05, None), ({2}, 3, 0.05, "1 of 3"), ({1, 2, 3, 4}, 4, 0.05, "4 of 4"),
        ({3, 24}, 24, 0.05, "2 of 24"), ({3, 24}, 24, 0.1, None), ({1}, 24, 0.0, "1 of 24"), (set(), 24, 0.0, None),
        (set(range(1, 11)), 200, 0.05, None), (set(range(191, 201)), 200, 0.05, None),  # wherever they stand
        (set(range(1, 13)), 912, 0.05, None), (set(range(901, 913)), 912, 0.05, None),
        (set(range(1, 61)), 1000, 0.05, "at least 51 of 1,000"),  # stops as soon as no rest could make it good
        (set(range(100, 111)), 150, 0.1, None), (set(range(100, 201)), 1000, 0.1, "at least 101 of 1,000"),
    ],
)  # fmt: skip
def test_more_than_the_share_is_refused_with_the_first_reasons(bad, lines, share, refused, tmp_path, processor):
    path = sound_and_bad(tmp_path / "train.jsonl", bad, lines)
    quarantine = lenient(tmp_path / QUARANTINE, share)
    if refused is None:
        data = ConversationDataset(read_samples(path), processor, 64, quarantine)
        assert (data.report.conversations, quarantine.bad) == (lines - len(bad), len(bad))
        return
    with pytest.raises(DataError) as error:
        ConversationDataset(read_samples(path), processor, 64, quarantine)
    assert str(error.value).startswith(f"{refused} samples are bad, more than --max_bad_share {share:g} allows.")
    assert all(f"{path}:{number}: " in str(error.value) for number in sorted(bad)[:3])
    assert str(error.value).count(f"{path}:") == min(3, len(bad))
    assert len(written(tmp_path / QUARANTINE)) == int(refused.split()[-3])


def test_strict_stops_at_the_first(tmp_path, processor):
    path = sound_and_bad(tmp_path / "train.jsonl", {5, 7}, 100)
    with pytest.raises(BadSample, match=rf"{path}:5: this line is no JSON"):
        ConversationDataset(read_samples(path), processor, 64, Quarantine(strict=True))


def test_bits_of_a_parquet_with_checksums_never_flip_unseen(tmp_path, processor):
    path, chance = tmp_path / "train.parquet", random.Random(0)
    texts = [json.dumps(turns(f"{n} <image>")["conversations"]) for n in range(12)]
    pictures = [encoded(make_picture(n), "PNG") for n in range(12)]
    table = pyarrow.table({"conversations": texts, "image_bytes": pictures})
    parquet.write_table(table, path, row_group_size=4, write_page_checksum=True)
    sound, wanted, results = path.read_bytes(), list(read_samples(path)), {"refused": 0, "left out": 0, "harmless": 0}
    for _ in range(60):
        place = chance.randrange(len(sound))
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << chance.randrange(8)]) + sound[place + 1 :])
        try:
            quarantine = lenient(max_share=0.9)
            data = ConversationDataset(read_samples(path), processor, 64, quarantine)
        except DataError:
            results["refused"] += 1
            continue
        finally:
            for copy in tmp_path.glob("*.arrow"):
                copy.unlink()
        right = [data.samples[number] for number in data.kept]
        assert right == [wanted[number] for number in data.kept]
        assert quarantine.bad == 12 - len(right) and quarantine.bad in (0, 4)
        results["left out" if quarantine.bad else "harmless"] += 1
    assert results["left out"] > 30 and sum(results.values()) == 60


# ---- a run


@pytest.fixture
def config(data_folder, tower_folder):
    """24 samples of which lines 5 and 17 are bad, and 20 texts for validation, one of them bad."""
    path = data_folder / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[4], lines[16] = "nonsense", json.dumps(with_picture("../train.jsonl"))
    path.write_text("\n".join(lines))
    validation = sound_and_bad(data_folder / "val.jsonl", {3}, 20)
    return tiny(SFT_VLM, data_folder, tower_folder, val_path=str(validation), max_bad_share=0.1, batch_size=4)


def test_a_run_leaves_bad_samples_out_and_says_so(config, capsys):
    run_stage(config)
    said = capsys.readouterr().out
    assert (
        "22 conversations" in said
        and f"left out 2 bad samples, the first: {config.data_path}:5: this line is no" in said
    )
    assert (
        f"left out: 3 bad samples, 0 that do not fit, 0 with a picture that was damaged; named in {config.run_dir}"
        in said
    )
    entries = written(config.run_dir / QUARANTINE)
    where = [f"{config.data_path}:5", f"{config.data_path}:17", f"{config.val_path}:3"]
    assert [(entry["kind"], entry["where"]) for entry in entries] == [("bad", place) for place in where]
    status = json.loads((config.run_dir / "status.json").read_text())
    assert (status["state"], status["samples_bad"], status["samples_damaged"]) == ("done", 3, 0)
    assert "left out: 3 bad, 0 dropped, 0 damaged; " in describe(config.run_dir, 40)


@pytest.mark.parametrize(
    ("flags", "reason"), [({"strict_data": 1}, "jsonl:5: this line"), ({"max_bad_share": 0.05}, "2 of 24")]
)
def test_a_run_refuses_before_its_first_step(flags, reason, config):
    config = dataclasses.replace(config, **flags)
    with pytest.raises(SystemExit, match=reason) as stopped:
        run_stage(config)
    assert str(stopped.value).startswith("sft_vlm: ") and "\n" not in str(stopped.value)
    assert json.loads((config.run_dir / "status.json").read_text())["state"] == "fatal-input"
    assert not config.weight_path.exists()


# ---- pictures that turn out damaged in training


@pytest.fixture
def damaged(data_folder, tower_folder, monkeypatch):
    """Only headers are looked at before training, and the picture of line 4, and one of line 2's, are cut in half."""
    monkeypatch.setattr(check, "FULLY_DECODED", 0)
    for name in ("3_0.png", "1_1.png"):
        path = data_folder / "images" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return tiny(SFT_VLM, data_folder, tower_folder, batch_size=4, epochs=2, save_interval=2, dropout=0.1)


def damaged_lines(config) -> list[str]:
    entries = [entry for entry in written(config.run_dir / QUARANTINE) if entry["kind"] == DAMAGED]
    return sorted(entry["where"].rpartition(":")[2] for entry in entries)


@pytest.mark.parametrize(
    "changes",
    [{"num_workers": 1}, {"pack_tokens": 128, "batch_size": 1}]
    + [{"cache_features": kind} for kind in ("int8", "pixels")],
    ids=str,
)
def test_a_run_with_damaged_pictures_resumes_to_the_bit(changes, damaged, monkeypatch, capsys):
    config = dataclasses.replace(damaged, **changes)
    unbroken = dataclasses.replace(config, save_dir=config.save_dir + "_unbroken")
    run_stage(unbroken)
    assert "2 with a picture that was damaged" in capsys.readouterr().out
    assert damaged_lines(unbroken) == ["2", "4"]
    for last_step in (3, 4):
        run_until(config, last_step, monkeypatch)
        config = dataclasses.replace(config, from_resume=1)
    run_stage(config)
    assert outcome(config) == outcome(unbroken)
    assert set(damaged_lines(config)) == {"2", "4"}


def test_damaged_pictures_of_validation_data(damaged, data_folder):
    lines = (data_folder / "train.jsonl").read_text().splitlines(keepends=True)
    (data_folder / "val.jsonl").write_text("".join(lines[:6]))
    (data_folder / "train.jsonl").write_text("".join(lines[6:]))
    config = dataclasses.replace(damaged, val_path=str(data_folder / "val.jsonl"))
    run_stage(config)
    assert damaged_lines(config) == ["2", "4"]
    assert [entry["where"].startswith(config.val_path) for entry in written(config.run_dir / QUARANTINE)] == [True] * 2
    losses = [entry["val_loss"] for entry in written(config.run_dir / "metrics.jsonl") if "val_loss" in entry]
    assert len(losses) == 4 and all(0 < loss < 9 for loss in losses)


def test_damaged_pictures_on_two_ranks(damaged):
    assert run_ranks(damaged, 2) == [0, 0]
    assert set(damaged_lines(damaged)) == {"2", "4"}
    assert "2 with a picture that was damaged" in (Path(damaged.save_dir).parent / "rank_0.log").read_text()
    assert json.loads((damaged.run_dir / "status.json").read_text())["samples_damaged"] == 2


def test_nothing_is_learnt_from_a_damaged_picture(damaged, data_folder, processor, make_vlm):
    data, model = ConversationDataset(read_samples(data_folder / "train.jsonl"), processor, 64), make_vlm().train()

    def learnt(*rows: int) -> dict[str, torch.Tensor]:
        share = lenient().record(StepBatches(data)[[rows]])
        assert len(share.rejected) == len({1, 3} & set(rows)) and share.counts.rows == len(rows)
        (batch,) = share.micro_batches
        model.zero_grad()
        model(**batch, supervised_tokens=7).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    alone, beside, nothing = learnt(0), learnt(0, 3, 1), learnt(3, 1)
    assert alone.keys() == beside.keys() == nothing.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(beside[name], gradient, rtol=1e-4, atol=1e-6)
        assert not nothing[name].any()


def test_features_of_a_damaged_picture_teach_nothing(damaged, data_folder, processor, make_vlm, tmp_path):
    data = ConversationDataset(read_samples(data_folder / "train.jsonl"), processor, 64)
    cache_features(data, make_vlm().encode_pictures, "tower", "float16", tmp_path / "cache")
    for row in range(6):
        rendered, features, rejected = data[row]
        assert bool(rejected) == (row in (1, 3)) and any(rendered.trained) != (row in (1, 3))
        pictures = len(data.features.numbers_of(row))
        assert [feature.shape for feature in features] == [(processor.image_tokens, 16)] * pictures


def test_too_many_damaged_pictures_end_a_run(processor):
    def share(number: int) -> StepBatch:
        return StepBatch([], Counts(rows=4), [Rejected(f"train.jsonl:{number}", "cut", DAMAGED)])

    quarantine = lenient(max_share=0.2)
    for number in range(1, LEAST):
        assert quarantine.record(share(number)) == share(number)
        assert quarantine.record(share(number)) == share(number)  # again, and counted once
    for _ in range(3):
        quarantine.record(StepBatch([], Counts(rows=4), []))
    quarantine.record(share(LEAST))  # 10 of 88
    quarantine = lenient(max_share=0.2)
    with pytest.raises(DataError, match=rf"{LEAST} of {4 * LEAST} samples are bad.*train.jsonl:{LEAST}: cut"):
        for number in range(1, LEAST + 1):
            quarantine.record(share(number))
    with pytest.raises(BadSample, match="train.jsonl:1: cut"):
        Quarantine(strict=True).record(share(1))
