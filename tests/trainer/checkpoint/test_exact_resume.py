"""Going on from a checkpoint: equal to the bit to a run that nobody interrupted, or refused with the reason."""

import dataclasses
import itertools
import json

import pytest
import torch

from helpers.faults import outcome, small_run
from helpers.runs import make_order, records, run_until, steps_of, tiny
from model.weights import read_facts
from trainer import distributed, stage
from trainer.checkpoint import resume
from trainer.checkpoint.files import load_state
from trainer.order import Order
from trainer.train_pretrain_vlm import PRETRAIN_VLM

EPOCH = 12  # steps of small_run


def interrupt_and_finish(config, steps_a_time: list[int], monkeypatch) -> None:
    """Run so many steps, die, go on from the last checkpoint; after the last interruption to the end."""
    for steps in steps_a_time:
        run_until(config, steps, monkeypatch)
        config = dataclasses.replace(config, from_resume=1)
    stage.run_stage(config)


@pytest.mark.parametrize(
    ("changes", "steps_a_time"),
    [
        ({}, [3, 4, 3]),  # three times in one epoch; each resume goes back to an even step
        ({"log_interval": 3, "save_interval": 4}, [5, 6]),  # a log line half full at the save
        ({"epochs": 2}, [0, EPOCH, EPOCH - 1]),  # before the first step, at the edge, just before the end
        ({"accumulation_steps": 2, "batch_size": 1, "epochs": 2}, [5, EPOCH]),
        ({"accumulation_steps": 4, "batch_tokens": 50, "epochs": 4, "num_workers": 1}, [3, 4]),
        ({"num_workers": 2}, [3, 5]),
        ({"use_moe": 1, "optimizer": "muon"}, [3, 5]),
        ({"cache_features": "int8", "num_workers": 1}, [3, 5]),
        ({"val_samples": 2, "save_interval": 3}, [4, 2, 4]),  # the second is killed before it saves anything
    ],
    ids=str,
)
def test_interrupted_run_equals_an_unbroken_one(changes, steps_a_time, tmp_path, monkeypatch):
    unbroken = small_run(tmp_path, save_dir=str(tmp_path / "unbroken"), **changes)
    stage.run_stage(unbroken)
    broken = small_run(tmp_path, **changes)
    interrupt_and_finish(broken, steps_a_time, monkeypatch)
    assert outcome(broken) == outcome(unbroken)


def test_restart_by_torchrun_resumes_without_being_told(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path)
    run_until(config, 5, monkeypatch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    stage.run_stage(config)
    assert "resumed from" in capsys.readouterr().out
    assert [record["step"] for record in records(config)] == list(range(1, EPOCH + 1))


@pytest.mark.parametrize("kinds", [("bfloat16", "float16"), ("float16", "bfloat16")])
def test_run_goes_on_where_auto_chooses_another_arithmetic(kinds, tmp_path, monkeypatch, capsys):
    """As on an older card, which has no bfloat16."""
    before, after = (getattr(torch, kind) for kind in kinds)
    config = small_run(tmp_path, dtype="auto")
    monkeypatch.setattr(distributed, "choose_dtype", lambda *_: before)
    run_until(config, 5, monkeypatch)
    monkeypatch.setattr(distributed, "choose_dtype", lambda *_: after)
    stage.run_stage(dataclasses.replace(config, from_resume=1))
    assert "resumed from" in capsys.readouterr().out
    assert records(config)[-1]["step"] == EPOCH
    state = load_state(config.run_dir / f"checkpoints/step-{EPOCH:08d}")
    assert bool(state["scaler"]) == (after == torch.float16)


def test_new_run_moves_an_earlier_runs_checkpoints_out_of_the_way(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path)
    run_until(config, 7, monkeypatch)
    run_until(config, 1, monkeypatch)  # a new run, lost before its first checkpoint
    folder = config.run_dir / "checkpoints"
    assert f"moved to {config.run_dir / resume.SET_ASIDE}" in capsys.readouterr().out
    assert not list(folder.glob("step-*"))
    names = sorted(path.name for path in (config.run_dir / resume.SET_ASIDE).iterdir())
    assert names == ["step-00000004", "step-00000006"]
    run_until(dataclasses.replace(config, from_resume=1), 1, monkeypatch)  # nothing of its own: it starts at step 0
    assert [record["step"] for record in records(config)] == [1]


def test_new_run_that_never_validates_leaves_no_best_of_another_run(tmp_path, capsys):
    first = small_run(tmp_path, val_samples=2)
    stage.run_stage(first)
    assert first.best_path.is_file()
    capsys.readouterr()
    again = dataclasses.replace(first, val_samples=0, from_resume=0)
    stage.run_stage(again)
    aside = first.run_dir / resume.SET_ASIDE / first.best_path.name
    assert not first.best_path.exists() and read_facts(aside)["val_loss"]
    assert f"{first.best_path.name} moved to {aside.parent}" in capsys.readouterr().out
    stage.run_stage(again)  # sets the second run's checkpoints aside in the place of the first one's
    assert not aside.exists() and len(list(aside.parent.glob("step-*"))) == 2


def test_best_that_a_run_starts_from_stays_for_its_resumption(tmp_path, monkeypatch, capsys):
    first = small_run(tmp_path, val_samples=2)
    stage.run_stage(first)
    again = dataclasses.replace(first, val_samples=0, from_weight=str(first.best_path))
    run_until(again, 3, monkeypatch)
    assert f"{first.best_path} is an earlier run's and stays" in capsys.readouterr().out
    stage.run_stage(dataclasses.replace(again, from_resume=1))


# ---- steps of another size


def positions(order: Order, first: int, last: int) -> list[int]:
    """Sample numbers in global order that the ranks of an order take from step to step."""
    return sum(steps_in_order(order, first)[: last - first], [])


def steps_in_order(order: Order, first: int) -> list[list[int]]:
    """As steps_of, but in the global order: batch_size samples of each rank in turn."""
    size, steps = order.batch_size, []
    for by_rank in order.rows_by_rank(first):
        rounds = range(0, len(by_rank[0]), size)
        steps.append([row for start in rounds for rows in by_rank for row in rows[start : start + size]])
    return steps


def resumed(whole: Order, step: int, position: int, *split: int) -> Order:
    """(batch size, accumulation steps, ranks) of a run that goes on after so many steps and rows of another."""
    batch_size, accumulation_steps, ranks = split
    new = dataclasses.replace(
        whole, batch_size=batch_size, accumulation_steps=accumulation_steps, world_size=ranks, first_batch=0
    )
    return new.resumed_at(step, position, whole.first_batch)


@pytest.mark.parametrize("splits", [
    [(4, 1, 1), (4, 1, 2), (4, 1, 1)], [(4, 1, 1), (2, 1, 2), (4, 1, 1)], [(2, 2, 1), (4, 2, 1), (1, 1, 2)],
    [(4, 1, 2), (4, 1, 1), (4, 1, 4), (8, 1, 1)],
])  # fmt: skip
def test_other_ranks_and_steps_take_the_same_samples_in_the_same_order(splits):
    """(batch size, accumulation steps, ranks), each for four steps or so and the last to the end; two epochs."""
    whole = make_order(*splits[0], samples=163, epochs=2)
    expected = sum(steps_in_order(whole, 0), [])
    order, step, taken = whole, 0, []
    for number, split in enumerate(splits):
        if number:
            order = resumed(whole, step, order.position(step), *split)
        last = order.total_steps if number == len(splits) - 1 else step + 4
        taken += positions(order, step, last)
        step = last
        assert order.position(step) == len(taken)
    assert taken == expected
    shares = [order.schedule(n)[0] / order.schedule(n)[1] for n in range(step - 1, step + 1)]
    assert shares[0] < 1 and shares[1] == 1 and order.epoch(step) == 2


def test_resplit_order_goes_on_from_any_step():
    whole = make_order(4, samples=98, epochs=2)  # 24 steps an epoch
    order = resumed(whole, 3, 12, 3, 1, 2)
    assert order.first_batch == 4 and order.total_steps == 3 + (48 * 4 - 12) // 6
    steps = steps_of(order, 3)
    for first in range(3, order.total_steps + 1):
        assert steps_of(order, first) == steps[first - 3 :]


def test_steps_that_do_not_divide_what_is_left_are_refused_with_the_numbers():
    whole = make_order(4, samples=42, epochs=1)
    with pytest.raises(ValueError, match="36 rows are left, which steps of 10 .--batch_size 5 x --acc.* x 2 ranks"):
        resumed(whole, 1, 4, 5, 1, 2)


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"batch_size": 1}, {"batch_size": 1, "accumulation_steps": 2}])
def test_run_goes_on_with_steps_of_another_size_and_back(change, tmp_path, monkeypatch):
    seen, original = [], Order.resumed_at
    config = small_run(tmp_path, epochs=2, dropout=0.0)
    run_until(config, 5, monkeypatch)
    other = dataclasses.replace(config, from_resume=1, **change)
    monkeypatch.setattr(Order, "resumed_at", lambda *a: seen.append(original(*a)) or seen[-1])
    run_until(other, 3, monkeypatch)
    stage.run_stage(dataclasses.replace(config, from_resume=1))
    logged = records(config)
    assert [record["step"] for record in logged] == list(range(1, len(logged) + 1))
    assert logged[-1]["epoch"] == 2 and all(a["epoch"] < b["epoch"] for a, b in itertools.pairwise(logged))
    rates = [record["learning_rate"] for record in logged]
    assert all(a > b for a, b in itertools.pairwise(rates)) and rates[-1] == pytest.approx(1e-3, rel=0.05)
    same_size = change.get("accumulation_steps") == 2
    assert any(order.first_step for order in seen) != same_size


# ---- another run's checkpoint


def refused(config, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        stage.run_stage(dataclasses.replace(config, from_resume=1))
    capsys.readouterr()
    assert "--from_resume 0" in str(stopped.value) and "\n" not in str(stopped.value)
    return str(stopped.value)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    run_until(config, 5, monkeypatch)
    return config


def test_other_flags_are_refused_one_by_one(interrupted, capsys):
    said = refused(dataclasses.replace(interrupted, learning_rate=1e-3, seed=1, hidden_size=32, dropout=0.2), capsys)
    for part in ("--learning_rate: expected 0.01, found 0.001", "--seed: expected 42, found 1", "--dropout: expected"):
        assert part in said
    assert "--allow_data_change" not in said


@pytest.mark.parametrize("change", ["a line more", "another word"])
def test_other_data_is_refused_unless_allowed(change, interrupted, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    lines = path.read_text().splitlines()
    if change == "a line more":
        lines.append(json.dumps({"text": "One more."}))
    else:
        lines[3] = lines[3].replace("dog", "cow")
    path.write_text("\n".join(lines) + "\n")
    said = refused(interrupted, capsys)
    assert "data: expected" in said and "--allow_data_change 1" in said and len(said) < 500
    stage.run_stage(dataclasses.replace(interrupted, from_resume=1, allow_data_change=1))
    assert "the training data has changed" in capsys.readouterr().out
    assert [record["step"] for record in records(interrupted)] == list(range(1, EPOCH + 1))


@pytest.mark.parametrize("lines", [8, 6])
def test_data_of_which_nothing_is_left_is_refused(lines, interrupted, tmp_path, capsys):
    """The checkpoint has taken 8 rows."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    said = refused(dataclasses.replace(interrupted, allow_data_change=1), capsys)
    assert f"has taken 8 rows, and --epochs 1 of the changed data are {lines}. Give more data" in said
    assert f"--from_weight {interrupted.weight_path} keeps what was learnt" in said and interrupted.weight_path.exists()
    assert json.loads((interrupted.run_dir / "status.json").read_text())["state"] == "fatal-input"


def test_less_data_that_suffices_is_trained_on(interrupted, tmp_path, capsys):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:10]))
    stage.run_stage(dataclasses.replace(interrupted, from_resume=1, allow_data_change=1))
    assert [record["step"] for record in records(interrupted)] == [1, 2, 3, 4, 5]


def test_another_tokenizer_is_refused_even_when_other_data_is_allowed(interrupted, monkeypatch, capsys):
    original = resume.read_manifest

    def with_another_tokenizer(path):
        manifest = original(path)
        manifest["fingerprints"]["tokenizer"] = "f" * 64
        return manifest

    monkeypatch.setattr(resume, "read_manifest", with_another_tokenizer)
    said = refused(dataclasses.replace(interrupted, allow_data_change=1), capsys)
    assert "tokenizer: expected ffffffffffff, found " in said


def test_frozen_weights_that_have_changed_are_refused(data_folder, tower_folder, monkeypatch, capsys):
    config = tiny(PRETRAIN_VLM, data_folder, tower_folder, batch_size=4, save_interval=2, seed=1)
    run_until(config, 5, monkeypatch)
    build_model = stage.build_model

    def with_other_frozen_weights(*arguments):
        model = build_model(*arguments)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        return model

    monkeypatch.setattr(stage, "build_model", with_other_frozen_weights)
    assert "frozen weights: expected" in refused(config, capsys)


def test_all_checkpoints_damaged_is_refused_and_nothing_is_overwritten(interrupted, capsys):
    folder = interrupted.run_dir / "checkpoints"
    for path in folder.iterdir():
        (path / "state.json").write_text("{}")
    before = sorted(path.name for path in folder.iterdir()), records(interrupted)
    said = refused(interrupted, capsys)
    assert "step-00000002 (state.json has 2 of" in said and "step-00000004 (state.json" in said
    assert (sorted(path.name for path in folder.iterdir()), records(interrupted)) == before
