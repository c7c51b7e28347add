"""Losses and gradients that are no numbers: skipped everywhere, named, and after three the end."""

import dataclasses
import json
import math
import re

import pytest
import torch

from helpers.faults import outcome, small_run
from helpers.runs import ORIGINAL_BUILD_MODEL, losses, records, run_until
from model.weights import read_facts
from trainer import loop, stage
from trainer.checkpoint import saver
from trainer.checkpoint.files import checkpoints_in, damage, read_manifest
from trainer.guard import finite
from trainer.optim import Muon


def spoil(monkeypatch, steps: set[int], value: float = math.nan, where: str = "loss") -> None:
    """Make the loss, or only the gradient, of these training steps `value`; they count from 1 in every new run."""
    count = [0]

    def spoil_loss(model, _, output):
        count[0] += model.training
        if model.training and count[0] in steps:
            output.loss = output.loss * value
        return output

    def spoil_gradient(loss):
        count[0] += 1
        return loss * value if count[0] in steps else loss

    def build_and_spoil(*arguments):
        model = ORIGINAL_BUILD_MODEL(*arguments)
        model.register_forward_hook(spoil_loss)
        return model

    if where == "loss":
        monkeypatch.setattr(stage, "build_model", build_and_spoil)
    else:
        monkeypatch.setattr(loop, "carry_to_gradient", spoil_gradient)


def test_gradient_is_the_same_to_the_bit_where_the_loss_is_finite():
    weight = torch.tensor([0.1, 0.7], requires_grad=True)
    ours, theirs = (
        torch.autograd.grad(change((weight**3).sum() / 3), weight)[0]
        for change in (finite.carry_to_gradient, lambda loss: loss)
    )
    assert torch.equal(ours, theirs)
    for bad in (math.nan, math.inf, -math.inf):
        # the gradient of `weight + bad` is 1, so without help the step would be taken
        (gradient,) = torch.autograd.grad(finite.carry_to_gradient(weight.sum() + bad), weight)
        assert gradient.isnan().all()


def adamw_or_muon(model: torch.nn.Linear, kind: str) -> torch.optim.AdamW:
    if kind == "muon":
        groups = [{"params": [model.weight], "muon": True}, {"params": [model.bias], "muon": False}]
        return Muon(groups, lr=1e-2, fused=True)
    return torch.optim.AdamW(model.parameters(), fused=kind == "fused")


@pytest.mark.parametrize("kind", ["fused", "plain", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_optimizer_is_unchanged_to_the_bit_by_a_skipped_step(kind, bad):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = adamw_or_muon(model, kind)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def state() -> list[torch.Tensor]:
        moments = [value for values in optimizer.state.values() for value in values.values()]
        return [tensor.clone() for tensor in [*model.parameters(), *moments]]

    def step(norm: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, norm)
        finite.step_if_finite(optimizer, scaler, torch.tensor(norm))

    step(1.0)
    before = state()
    step(bad)
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    step(2.0)
    taken = state()
    assert not torch.equal(before[0], taken[0])
    torch.manual_seed(0)  # as if the bad step had not been
    model = torch.nn.Linear(3, 2)
    optimizer = adamw_or_muon(model, kind)
    step(1.0)
    step(2.0)
    assert all(torch.equal(a, b) for a, b in zip(taken, state(), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_step_is_skipped_and_its_samples_are_named(value, where, tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path, log_interval=1)
    spoil(monkeypatch, {4, 8}, value, where)
    stage.run_stage(config)
    assert [record["step"] for record in records(config)] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 12]
    assert all(math.isfinite(loss) for loss in losses(config))
    named = [json.loads(line) for line in (config.run_dir / finite.SKIPPED).read_text().splitlines()]
    assert [record["step"] for record in named] == [4, 8]
    for record in named:
        assert len(set(record["samples"])) == 2 and all(
            sample.startswith(f"{config.data_path}:") for sample in record["samples"]
        )
        assert record["ranks"] == ([0] if where == "loss" else [])
    said = capsys.readouterr().out
    assert "step 4 skipped: " in said and str(config.run_dir / finite.SKIPPED) in said
    status = json.loads((config.run_dir / "status.json").read_text())
    assert (status["state"], status["steps_skipped"], status["samples_skipped"]) == ("done", 2, 4)


def test_three_in_a_row_end_the_run_with_the_older_checkpoint_whole(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path)
    spoil(monkeypatch, {6, 7, 8})
    with pytest.raises(SystemExit, match="3 steps in a row .* step 8: .*skipped_steps.jsonl.*--learning_rate"):
        stage.run_stage(config)
    found = checkpoints_in(config.run_dir / "checkpoints")
    assert [path.name for path in found] == ["step-00000004", "step-00000006"] and not any(map(damage, found))
    status = json.loads((config.run_dir / "status.json").read_text())
    assert status["state"] == "fatal-nonfinite" and "3 steps in a row" in status["reason"]


def test_two_in_a_row_twice_do_not_end_it(tmp_path, monkeypatch):
    config = small_run(tmp_path)
    spoil(monkeypatch, {2, 3, 5, 6})
    stage.run_stage(config)
    assert len(losses(config)) == 8


def test_skipped_steps_survive_an_interruption(tmp_path, monkeypatch):
    unbroken = small_run(tmp_path, save_dir=str(tmp_path / "unbroken"), log_interval=3)
    spoil(monkeypatch, {3, 4, 9})
    stage.run_stage(unbroken)
    broken = small_run(tmp_path, log_interval=3)
    spoil(monkeypatch, {3, 4})
    run_until(broken, 5, monkeypatch)
    spoil(monkeypatch, {9 - 4})
    stage.run_stage(dataclasses.replace(broken, from_resume=1))
    assert outcome(broken) == outcome(unbroken)
    names = [(run.run_dir / finite.SKIPPED).read_text() for run in (broken, unbroken)]
    assert names[0] == names[1]


def test_spike_of_the_loss_is_told_once(tmp_path, monkeypatch, capsys):
    config = small_run(tmp_path, learning_rate=1e-6, epochs=2)
    original, count = loop._means, [0]

    def means(window, runtime):
        count[0] += 1
        values = original(window, runtime)
        return {**values, "loss": 3 * values["loss"]} if count[0] == 15 else values

    monkeypatch.setattr(loop, "_means", means)
    stage.run_stage(config)
    said = capsys.readouterr().out
    assert said.count("the loss jumped") == 1 and "step 15: the loss jumped to 2" in said
    assert [record["step"] for record in records(config) if "loss_spike" in record] == [15]


# ---- validation losses


def validating_run(tmp_path, values: list[float], monkeypatch):
    """A run that saves and validates after each of its five steps, and finds these losses."""
    found = iter(values)
    monkeypatch.setattr(saver, "validation_loss", lambda *_: next(found))
    return small_run(tmp_path, batch_size=4, save_interval=1, keep_last=1, val_samples=2)


def best_of(config) -> tuple[str, str]:
    facts = read_facts(config.weight_path.with_name(f"{config.weight_name}_best.safetensors"))
    return facts["step"], facts["val_loss"]


def test_only_a_finite_validation_loss_becomes_the_best(tmp_path, monkeypatch, capsys):
    config = validating_run(tmp_path, [math.nan, 2.0, -math.inf, math.nan, 2.5], monkeypatch)
    stage.run_stage(config)
    assert best_of(config) == ("2", "2.0000")
    said = capsys.readouterr().out
    assert "step 2: validation loss 2.0000, the best\n" in said and said.count(", the best\n") == 1
    assert "step 4: validation loss nan, which is never the best\n" in said
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    written = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    assert [record["val_loss"] for record in written if "val_loss" in record] == [None, 2.0, None, None, 2.5]
    assert read_facts(config.weight_path)["val_loss"] == "2.5000"
    kept = {path.name: read_manifest(path)["val_loss"] for path in checkpoints_in(config.run_dir / "checkpoints")}
    assert kept == {"step-00000002": 2.0, "step-00000005": 2.5}


def test_a_checkpoint_whose_best_is_no_number_heals(tmp_path, monkeypatch, capsys):
    config = validating_run(tmp_path, [2.0, math.nan, 3.0, 2.5, 1.5], monkeypatch)
    whole = saver.state_to_json
    with monkeypatch.context() as patch:  # as older versions wrote it
        patch.setattr(saver, "state_to_json", lambda *arguments: {**whole(*arguments), "best": math.nan})
        run_until(config, 2, monkeypatch)
    stage.run_stage(dataclasses.replace(config, from_resume=1))
    # 2.5 is the lowest since the resumption, and no better than the 2.0 of step 1
    assert re.findall("step (.): .*, the best", capsys.readouterr().out) == ["1", "5"]
    assert best_of(config) == ("5", "1.5000")
