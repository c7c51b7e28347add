"""Sources with weights: their shares of an epoch, which rows are drawn, resuming to the bit, and what is refused."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from helpers.data import write_jsonl
from helpers.faults import outcome, small_run
from helpers.runs import make_order, refusal, run_until, steps_of
from model.messages import UserError
from trainer import data, stage
from trainer.checkpoint.files import whole_in
from trainer.data import StageData
from trainer.mix import Mix
from trainer.order import Order

SIZES, WEIGHTS = (700, 250, 50), (0.2, 0.3, 0.5)


def sources_of(rows: list[int]) -> list[int]:
    """How many of these rows are each source's."""
    edges = torch.tensor(SIZES).cumsum(0)
    return torch.bincount(torch.bucketize(torch.tensor(rows), edges, right=True), minlength=len(SIZES)).tolist()


def mixed_order(world_size: int = 1, epochs: int = 4) -> Order:
    return make_order(16 // world_size, 1, world_size, sum(SIZES), epochs=epochs, mix=Mix(SIZES, WEIGHTS))


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_epoch_keeps_the_weights_within_a_row(world_size):
    order = mixed_order(world_size)
    steps = steps_of(order)
    a_epoch = order.rows_per_epoch // 16
    assert order.rows_per_epoch == 992 and len(steps) == 4 * a_epoch
    for epoch in range(4):
        rows = sum(steps[epoch * a_epoch : (epoch + 1) * a_epoch], [])
        assert sources_of(rows) == pytest.approx([weight * 992 for weight in WEIGHTS], abs=1)
    assert [sorted(step) for step in steps] == [sorted(step) for step in steps_of(mixed_order())]


def test_a_source_is_walked_through_before_a_row_comes_again():
    rows = [row for step in steps_of(mixed_order(epochs=4)) for row in step]
    times = Counter(rows)
    large, middle, small = ([times[row] for row in range(*part)] for part in ((0, 700), (700, 950), (950, 1000)))
    assert sum(large) == 4 * 198 and set(large) == {1, 2}  # 1.13 times 700
    assert sum(middle) == 4 * 298 and set(middle) == {4, 5}
    assert sum(small) == 4 * 496 and set(small) == {39, 40}
    first_epoch = [row for step in steps_of(mixed_order())[:62] for row in step]
    assert max(times for row, times in Counter(first_epoch).items() if row < 700) == 1


def test_draws_go_on_from_any_step_and_differ_from_epoch_to_epoch_and_seed_to_seed():
    order = mixed_order()
    steps = steps_of(order)
    for first in (1, 61, 62, 100):
        assert steps_of(order, first) == steps[first:]
    assert len({tuple(epoch) for epoch in (order.steps(number).flatten().tolist() for number in range(4))}) == 4
    assert dataclasses.replace(order, seed=6).steps(0).tolist() != order.steps(0).tolist()


def test_the_order_without_weights_is_what_it_was():
    generator = torch.Generator().manual_seed(5 * 1_000_003 + 1)
    expected = torch.randperm(300, generator=generator)[:296].sort().values
    assert make_order().steps(1).flatten().sort().values.tolist() == expected.tolist()


def test_shares_are_rounded_by_the_largest_remainder_and_add_up():
    mix = Mix((10, 10, 10), (0.5, 0.3, 0.2))
    assert [mix.shares(rows) for rows in (7, 10, 11)] == [[4, 2, 1], [5, 3, 2], [6, 3, 2]]
    with pytest.raises(UserError, match=r"8 rows, of which a source with weight 0.001 gives none"):
        make_order(samples=15, mix=Mix((10, 5), (0.999, 0.001)))


def test_rows_of_like_length_share_a_step_as_without_weights():
    order = mixed_order(epochs=1)
    spread = torch.stack([order.lengths[step].float().std() for step in order.steps(0)]).mean()
    assert spread < order.lengths.float().std() / 3


# ---- the real script


def mixed_run(folder, weights=(0.5, 0.3, 0.2), **changes):
    """24, 8 and 4 texts, of which an epoch of 18 steps takes 18, 11 and 7."""
    counts = {"cats": 24, "dogs": 8, "birds": 4}
    for name, count in counts.items():
        lines = [{"text": f"There are {n} {name} and a dog" + " or two" * (n % 4)} for n in range(count)]
        write_jsonl(folder / f"{name}.jsonl", lines)
    ends = [f":{weight}" for weight in weights] or [""] * len(counts)
    paths = ",".join(f"{folder / name}.jsonl{end}" for name, end in zip(counts, ends, strict=True))
    return small_run(folder, **{"data_path": paths, "epochs": 2, **changes})


@pytest.mark.parametrize("changes", [{}, {"num_workers": 2, "pack_tokens": 80, "max_seq_len": 40}], ids=str)
def test_an_interrupted_mix_equals_an_unbroken_one(changes, tmp_path, monkeypatch, capsys):
    unbroken = mixed_run(tmp_path, save_dir=str(tmp_path / "unbroken"), **changes)
    stage.run_stage(unbroken)
    said = capsys.readouterr().out
    assert "birds.jsonl" in said and "weight 0.2, seen" in said
    broken = mixed_run(tmp_path, **changes)
    run_until(broken, 3, monkeypatch)
    run_until(dataclasses.replace(broken, from_resume=1), 4, monkeypatch)
    stage.run_stage(dataclasses.replace(broken, from_resume=1))
    assert outcome(broken) == outcome(unbroken)


def loaded(config, processor) -> tuple[StageData, str]:
    """The data of a run, and what was said of them."""
    said: list[str] = []
    config.run_dir.mkdir(parents=True, exist_ok=True)
    runtime = SimpleNamespace(is_main=True, world_size=1, print0=said.append)
    return StageData.load(config, processor, runtime), "\n".join(said)


def test_how_often_rows_are_seen_is_said(tmp_path, processor):
    said = loaded(mixed_run(tmp_path), processor)[1]
    assert "cats.jsonl: 24 rows, weight 0.5, seen 0.75 times an epoch" in said
    assert "birds.jsonl: 4 rows, weight 0.2, seen 1.8 times an epoch" in said
    assert "dogs.jsonl: 8 rows, seen once an epoch" in loaded(mixed_run(tmp_path, weights=()), processor)[1]


def test_other_weights_are_another_run_the_same_proportions_are_not(tmp_path, monkeypatch):
    config = mixed_run(tmp_path)
    run_until(config, 3, monkeypatch)
    other = dataclasses.replace(mixed_run(tmp_path, weights=(0.4, 0.4, 0.2)), from_resume=1)
    said = refusal_of(other)
    assert "weights in --data_path: expected 0.5, 0.3, 0.2, found 0.4, 0.4, 0.2" in said
    assert "weights in --data_path" in refusal_of(dataclasses.replace(other, allow_data_change=1))
    assert "found nothing" in refusal_of(dataclasses.replace(mixed_run(tmp_path, weights=()), from_resume=1))
    run_until(dataclasses.replace(mixed_run(tmp_path, weights=(5, 3, 2)), from_resume=1), 1, monkeypatch)


def refusal_of(config) -> str:
    with pytest.raises(SystemExit) as stopped:
        stage.run_stage(config)
    return str(stopped.value)


def test_checkpoints_without_weights_hold_no_word_of_them(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    run_until(config, 3, monkeypatch)
    (path,) = whole_in(config.run_dir / "checkpoints")
    assert "weights in" not in (path / "manifest.json").read_text()


def test_packed_rows_hold_one_source(tmp_path, processor):
    packed, said = loaded(mixed_run(tmp_path, pack_tokens=80, max_seq_len=40), processor)
    bounds = torch.tensor([24, 32, 36])
    sources = [set(torch.bucketize(torch.tensor(row), bounds, right=True).tolist()) for row in packed.rows.contents]
    assert all(len(of_row) == 1 for of_row in sources) and len(sources) < 36
    assert f"cats.jsonl: {sources.count({0})} packed rows, weight 0.5" in said
    assert packed.order.mix.sizes == tuple(sources.count({source}) for source in range(3)) == tuple(packed.rows.sizes)


def test_files_that_are_absent_are_told_together(tmp_path):
    config = mixed_run(tmp_path, data_path=f"{tmp_path}/texts.jsonl,{tmp_path}/gone.jsonl")
    refusal(config, "gone.jsonl does not exist")
    refusal(dataclasses.replace(config, data_path=f"{tmp_path}/texts.jsonl:1,b.jsonl"), "b.jsonl has no weight")


def test_validation_may_be_several_files_and_held_back_rows_come_from_all(tmp_path, processor):
    config = mixed_run(tmp_path, weights=())
    both = dataclasses.replace(config, val_path=f"{tmp_path}/dogs.jsonl,{tmp_path}/birds.jsonl")
    assert len(loaded(both, processor)[0].validation) == 12
    with pytest.raises(UserError, match="only --data_path takes weights"):
        data.load_data(dataclasses.replace(both, val_path="a.jsonl:1,b.jsonl:2"), processor, None)
