"""What a run says of its speed: counted from what was learnt, timed in phases, and --profile."""

import dataclasses
import gzip
import json
import time

import numpy as np
import pytest
import torch

from dataset.batching import Row, pack, share_prefix
from dataset.samples import DAMAGED, Rejected
from dataset.step_batch import Counts, StepBatches, conversations
from helpers.data import make_picture
from helpers.models import IMAGE_TOKENS
from helpers.runs import assert_bit_equal, losses, records, tiny, weights_of
from model import device
from model.config import IGNORE_INDEX
from model.device import peak_flops
from model.flops import StepFlops
from model.model_minimind import branch_mask
from model.processing import Rendered, collate_training
from trainer.distributed import Runtime
from trainer.report import meter, profiling
from trainer.report.meter import Meter, Stopwatch
from trainer.report.metrics import speed_line
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM

ALONE = Runtime(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def talks(processor) -> list[Rendered]:
    question = {"role": "user", "content": "<image>\nWhat is it?"}
    return [processor.render([question, {"role": "assistant", "content": answer}]) for answer in ("a cat", "dogs", "1")]


def test_rows_are_counted_as_their_masks_let_them_see(talks):
    """The oracle is the mask itself: every pair counts twice, a token with itself once."""
    shared = share_prefix(talks, 12)
    rows = {1: talks[0], 2: pack(talks[:2]), 3: shared, 5: pack([talks[0], shared, talks[1]])}
    for number, row in rows.items():
        columns = torch.from_numpy(np.stack([row.branch, row.shared_prefix]))[None]
        assert conversations(row) == (number, 2 * int(branch_mask(columns).sum()) - len(row.input_ids))


def test_share_counts_what_its_batches_hold(talks, processor):
    pixels = [processor.pixels(make_picture(1))]
    cut = Rejected("train.jsonl:2", "cut", DAMAGED)
    talks[1] = dataclasses.replace(talks[1], trained=np.zeros_like(talks[1].trained))
    rows = [Row(talks[0], pixels), Row(talks[1], pixels, (cut,)), Row(pack([talks[2], talks[0]]), pixels * 2)]
    share = StepBatches(rows)[[[0], [1, 2]]]
    assert [len(batch["input_ids"]) for batch in share.micro_batches] == [1, 2]
    wanted = collate_training(rows)
    assert share.counts == Counts(
        rows=3, conversations=4, tokens=sum(len(row.rendered) for row in rows),
        squared_lengths=sum(len(talk.input_ids) ** 2 for talk in (*talks, talks[0])),
        supervised=int((wanted["labels"][:, 1:] != IGNORE_INDEX).sum()),
        pictures=int(wanted["image_mask"].sum()) // IMAGE_TOKENS,
    )  # fmt: skip
    assert share.rejected == [cut]


def test_speed_is_what_was_counted_over_the_time_that_was_training(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(meter, "peak_flops", lambda *_: 1000.0)
    measured = Meter(ALONE, lambda counts: 100 * counts.tokens)
    for _ in range(2):
        with measured.waiting():
            now[0] += 1.0
        for phase, seconds in (("forward", 2.0), ("backward", 3.0), ("optimizer", 0.5), ("", 0.5)):
            measured.enter(phase)
            now[0] += seconds
        measured.count(Counts(rows=4, conversations=7, tokens=14, supervised=21))
    now[0] += 50.0
    measured.pause(50.0)
    speed = measured.read()
    del speed["memory_gb"]
    assert speed == pytest.approx({
        "conversations_per_second": 1.0, "rows_per_second": 4 / 7, "supervised_tokens_per_second": 3.0,
        "data_wait": 1 / 7,
        "forward_seconds": 2.0, "backward_seconds": 3.0, "optimizer_seconds": 0.5, "mfu": 0.2,
    })  # fmt: skip
    now[0] += 1.0
    assert measured.read()["conversations_per_second"] == 0  # the next line begins anew


def test_stopwatch_leaves_out_what_is_no_phase():
    watch = Stopwatch(torch.device("cpu"))
    for phase in ("forward", "", "forward", ""):
        watch.enter(phase)
        time.sleep(0.02 if phase else 0.2)
    seconds = watch.read()
    assert 0.04 <= seconds["forward"] < 0.2 and seconds["backward"] == 0


def test_peak_is_measured_once_and_draws_from_no_stream_of_the_run(monkeypatch):
    monkeypatch.setattr(device, "SIDES", {"cpu": 128})
    peak_flops.cache_clear()
    before = torch.get_rng_state()
    first = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < first < 1e14 and peak_flops(torch.device("cpu"), torch.float32) == first
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(torch, "mm", lambda *_: (_ for _ in ()).throw(RuntimeError("not implemented")))
    assert peak_flops(torch.device("cpu"), torch.float16) == 0.0
    unknown = Meter(Runtime(0, 1, torch.device("cpu"), torch.float16), lambda counts: 1.0)
    assert "mfu" not in unknown.read() and "mfu is not told" in str(unknown)
    peak_flops.cache_clear()


@pytest.mark.parametrize("changes", [{}, {"cache_features": "float16"}, {"cache_features": "pixels"}], ids=str)
def test_records_of_a_run_agree_with_each_other(changes, data_folder, tower_folder, capsys, make_vlm, monkeypatch):
    config = tiny(SFT_VLM, data_folder, tower_folder, batch_size=6, pack_tokens=64, **changes)
    counted, count = [], Meter.count
    monkeypatch.setattr(Meter, "count", lambda self, counts: counted.append(counts) or count(self, counts))
    run_stage(config)
    said = capsys.readouterr().out.splitlines()
    (header,) = [line for line in said if line.startswith("mfu is the share of ")]
    assert all(len(line) <= 120 and " % mfu, " in line for line in said if line.startswith("step "))
    assert all(" rows, " in line and " conversations, " in line for line in said if line.startswith("step "))
    assert speed_line({**records(config)[0], "conversations_per_second": 1.5, "rows_per_second": 1.5}).startswith(
        "1.5 rows, "
    )
    assert any(" rows hold 24 conversations, " in line and ": a step of 6 rows is worth " in line for line in said)
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert f" {peak / 1e9:,.0f} GFLOP/s" in header
    flops = StepFlops(make_vlm().requires_grad_(True))
    flops_of_tower = StepFlops(make_vlm()).per_encoded
    for record, counts in zip(records(config), counted, strict=True):
        seconds = counts.rows / record["rows_per_second"]
        assert counts.conversations > counts.rows and counts.pictures > 0
        assert record["conversations_per_second"] == pytest.approx(counts.conversations / seconds)
        phases = [record[f"{phase}_seconds"] for phase in meter.PHASES]
        assert min(phases) > 0 and sum(phases) + record["data_wait"] * seconds < seconds
        useful = flops.count(counts.tokens, counts.squared_lengths, counts.supervised, counts.pictures)
        useful += 0 if config.cache_features == "float16" else flops_of_tower * counts.pictures
        assert record["mfu"] == pytest.approx(useful / seconds / peak, rel=1e-4)


# ---- --profile


def test_profile_writes_a_trace_and_the_dearest_operations_and_changes_nothing(data_folder, tower_folder, capsys):
    config = tiny(SFT_VLM, data_folder, tower_folder, batch_size=2, dropout=0.1)
    run_stage(config)
    profiled = dataclasses.replace(config, profile=2, save_dir=str(data_folder / "profiled"))
    capsys.readouterr()
    run_stage(profiled)
    said = capsys.readouterr().out.splitlines()
    head = next(number for number, line in enumerate(said) if line.startswith("operation "))
    table = said[head + 1 : head + 1 + profiling.SHOWN]
    costs = [float(line[60:].split()[0]) for line in table]
    assert costs == sorted(costs, reverse=True) and costs[0] > 0 and any("aten::" in line for line in table)
    assert said[head + 1 + profiling.SHOWN].startswith("trace of 2 steps")
    with gzip.open(profiled.run_dir / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{number}" for number in (profiling.WARM_UP, profiling.WARM_UP + 1)}
    assert_bit_equal(weights_of(profiled), weights_of(config))
    assert losses(profiled) == losses(config) and len(losses(config)) == 12


@pytest.mark.parametrize(("batch_size", "told"), [(5, "trace of 1 step,"), (12, "the run ended within the 3 steps")])
def test_profile_of_a_run_that_ends_earlier(batch_size, told, data_folder, tower_folder, capsys):
    config = tiny(SFT_VLM, data_folder, tower_folder, batch_size=batch_size, profile=9)
    run_stage(config)
    assert told in capsys.readouterr().out
    assert (config.run_dir / "trace.json.gz").is_file() == (batch_size == 5)
