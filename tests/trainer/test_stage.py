"""Training in small: what learns and what stays, the loss, the rate, going on after a stop, what is written."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors import safe_open

from helpers.models import SIZES
from helpers.runs import (
    ORIGINAL_TRAIN_STEP,
    SPEEDS,
    assert_bit_equal,
    losses,
    plain_sgd,
    records,
    run_until,
    stopped_run,
    tiny,
    watched_run,
    weights_of,
    write_texts,
)
from model.weights import load_model, read_weights
from trainer import loop, stage
from trainer.checkpoint import files as checkpoint
from trainer.checkpoint import resume, saver
from trainer.optim import build_optimizer, freeze_all_but, lr_factor, set_learning_rate
from trainer.train_llm import LLM
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM

# what learns


@pytest.mark.parametrize("use_moe", [0, 1])
@pytest.mark.parametrize(
    ("config", "learning"),
    [
        (PRETRAIN_VLM, ("vision_proj.", "model.layers.1.")),
        (SFT_VLM, ("vision_proj.", "model.", "lm_head.")),
        (LLM, ("model.", "lm_head.")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_three_steps_change_exactly_the_parts_that_the_stage_names(
    config, learning, use_moe, data_folder, tower_folder, monkeypatch
):
    config = tiny(config, data_folder, tower_folder, use_moe=use_moe)
    if config.name == "llm":
        config = dataclasses.replace(config, data_path=str(write_texts(data_folder)))
    before, model = watched_run(config, monkeypatch)
    after = model.state_dict()
    assert [record["step"] for record in records(config)] == [1, 2, 3]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(learning)}
    assert config.with_vision == any(name.startswith("vision_encoder.") for name in set(before) - changed)
    if config.with_vision:
        assert model.training and not any(module.training for module in model.vision_encoder.modules())


def test_llm_learns_from_texts_and_conversations(data_folder, tower_folder, capsys):
    config = tiny(LLM, data_folder, tower_folder, data_path=str(write_texts(data_folder)), epochs=10)
    stage.run_stage(config)
    assert "24 conversations, 0 pictures" in capsys.readouterr().out
    assert losses(config)[0] > 8 and losses(config)[-1] < 2


def test_stages_follow_each_other_by_name_and_start_from_what_the_last_one_saved(
    data_folder, tower_folder, monkeypatch, capsys
):
    base = tiny(LLM, data_folder, tower_folder, data_path=str(write_texts(data_folder)), epochs=6)
    stage.run_stage(base)
    before, _ = watched_run(tiny(PRETRAIN_VLM, data_folder, tower_folder, from_weight="llm"), monkeypatch)
    saved = weights_of(base)
    assert_bit_equal({name: before[name] for name in saved}, saved)
    assert "new and untrained: vision_proj" in capsys.readouterr().out
    before, _ = watched_run(tiny(SFT_VLM, data_folder, tower_folder, from_weight="pretrain_vlm"), monkeypatch)
    saved = weights_of(tiny(PRETRAIN_VLM, data_folder, tower_folder))
    assert any(name.startswith("vision_proj.") for name in saved)
    assert_bit_equal({name: before[name] for name in saved}, saved)
    assert "matched 100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loss_falls_on_a_few_samples(dtype, data_folder, tower_folder, monkeypatch):
    config = tiny(SFT_VLM, data_folder, tower_folder, dtype=dtype, epochs=8)
    _, model = watched_run(config, monkeypatch)
    assert all(math.isfinite(loss) for loss in losses(config))
    assert losses(config)[0] > 8 and losses(config)[-1] < 3
    kept = {parameter.dtype for name, parameter in model.named_parameters() if not name.startswith("vision_encoder.")}
    assert kept == {torch.float32}  # whatever the arithmetic; the frozen tower is no file's concern


@pytest.mark.parametrize("use_moe", [0, 1])
def test_step_is_the_same_however_it_is_split_into_micro_batches(use_moe, data_folder, tower_folder, monkeypatch):
    monkeypatch.setattr(resume, "build_optimizer", plain_sgd)
    runs = []
    for batch_size, accumulation_steps in ((8, 1), (4, 2), (1, 8)):
        config = tiny(
            SFT_VLM, data_folder, tower_folder, use_moe=use_moe, batch_size=batch_size, learning_rate=0.3,
            accumulation_steps=accumulation_steps, grad_clip=1e9, save_dir=str(data_folder / f"split_{batch_size}"),
        )  # fmt: skip
        before, model = watched_run(config, monkeypatch)
        runs.append((model.state_dict(), records(config)))
    whole, whole_records = runs[0]
    assert max(float((whole[name] - before[name]).abs().max()) for name in whole) > 1e-2  # the steps were no trifle
    assert len(whole_records) == 3
    for split, split_records in runs[1:]:
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)
        for ours, theirs in zip(split_records, whole_records, strict=True):
            for name in ("loss", "grad_norm", *(["aux_loss"] if use_moe else [])):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5)


# how fast


def test_rate_rises_in_a_line_and_falls_in_a_cosine():
    shares = [lr_factor(step, 101, 0.1) for step in range(101)]
    assert shares[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert shares[10] == 1.0
    assert shares[55] == pytest.approx(0.55)  # half-way between 1 and a tenth
    assert shares[33] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 23 / 90)) / 2)
    assert shares[100] == pytest.approx(0.1)
    assert all(earlier > later for earlier, later in zip(shares[10:], shares[11:], strict=False))


def test_rate_is_never_above_the_peak_or_zero():
    for total in (1, 2, 3, 7, 100):
        for warmup in (0.0, 0.03, 0.5, 1.0):
            assert all(0 < lr_factor(step, total, warmup) <= 1 for step in range(total))


@pytest.mark.parametrize("projector_rate", [0.0, 3e-3])
def test_norms_and_biases_do_not_decay_and_the_projector_has_its_own_rate(projector_rate, make_vlm):
    model = make_vlm()
    freeze_all_but(model, SFT_VLM.trainable)
    rates = {"learning_rate": 1e-3, "projector_learning_rate": projector_rate, "weight_decay": 0.1}
    optimizer = build_optimizer(model, dataclasses.replace(SFT_VLM, **rates))
    set_learning_rate(optimizer, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {
        names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    for name, (rate, decay) in found.items():
        assert rate == (projector_rate or 1e-3 if name.startswith("vision_proj.") else 1e-3) / 2, name
        assert decay == (0.0 if name.endswith((".bias", "norm.weight")) else 0.1), name
    assert found["vision_proj.vision_proj.0.bias"][1] == 0.0 and found["model.norm.weight"][1] == 0.0


# going on after a stop


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"accumulation_steps": 2}], ids=str)
def test_stopped_and_resumed_run_equals_an_unbroken_one(changes, data_folder, tower_folder, monkeypatch, capsys):
    settings = {"batch_size": 2, "epochs": 1, "save_interval": 2, "val_samples": 4, **changes}
    unbroken = tiny(SFT_VLM, data_folder, tower_folder, save_dir=str(data_folder / "unbroken"), **settings)
    stage.run_stage(unbroken)
    broken = tiny(SFT_VLM, data_folder, tower_folder, **settings)
    run_until(broken, 3, monkeypatch)  # a record of step 3 is written, the last checkpoint is of step 2
    assert losses(broken) == losses(unbroken)[:3]
    stage.run_stage(dataclasses.replace(broken, from_resume=1))
    assert "step-00000002" in capsys.readouterr().out
    assert_bit_equal(weights_of(broken), weights_of(unbroken))
    kept = [[{k: v for k, v in r.items() if k not in SPEEDS} for r in records(run)] for run in (broken, unbroken)]
    assert kept[0] == kept[1]
    steps = [record["step"] for record in records(broken) if "loss" in record]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) in (5, 11)


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(data_folder, tower_folder, monkeypatch, capsys):
    settings = {"batch_size": 4, "save_dir": str(data_folder / "unbroken")}
    unbroken = tiny(PRETRAIN_VLM, data_folder, tower_folder, **settings)
    stage.run_stage(unbroken)
    config = stopped_run(data_folder, tower_folder, monkeypatch)
    damaged = config.run_dir / "checkpoints/step-00000004/trained.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    capsys.readouterr()
    stage.run_stage(config)
    said = capsys.readouterr().out
    assert "step-00000004 is damaged (trained.safetensors differs from its sha256)" in said
    assert f"resumed from {damaged.parent.with_name('step-00000002')}" in said
    assert_bit_equal(weights_of(config), weights_of(unbroken))
    assert [record["step"] for record in records(config)] == [1, 2, 3, 4, 5, 6]


def test_any_damage_is_seen(data_folder, tower_folder, monkeypatch, capsys):
    folder = stopped_run(data_folder, tower_folder, monkeypatch).run_dir / "checkpoints"
    newest, older = folder / "step-00000004", folder / "step-00000002"
    assert checkpoint.newest_checkpoint(folder) == newest
    shutil.copytree(newest, data_folder / "whole")
    for damage in (
        lambda: (newest / "manifest.json").unlink(),
        lambda: (newest / "optimizer.safetensors").unlink(),
        lambda: (newest / "optimizer.safetensors").write_bytes((newest / "optimizer.safetensors").read_bytes()[:-9]),
        lambda: (newest / "state.json").write_text((newest / "state.json").read_text().replace("4", "5")),
        lambda: (newest / "manifest.json").write_text("{"),
    ):
        damage()
        assert checkpoint.newest_checkpoint(folder) == older
        assert str(newest) in capsys.readouterr().out
        shutil.rmtree(newest)
        shutil.copytree(data_folder / "whole", newest)
    assert checkpoint.newest_checkpoint(folder) == newest


def test_resume_uses_the_learning_rate_that_it_logs_or_refuses(data_folder, tower_folder, monkeypatch):
    config = dataclasses.replace(stopped_run(data_folder, tower_folder, monkeypatch), learning_rate=1e-3)
    used = []

    def step_and_note(run, *rest):
        used.append(run.optimizer.param_groups[0]["lr"])
        return ORIGINAL_TRAIN_STEP(run, *rest)

    monkeypatch.setattr(loop, "train_step", step_and_note)
    try:
        stage.run_stage(config)
    except SystemExit as refusal:
        assert "learning_rate" in str(refusal)
        return
    assert [record["learning_rate"] for record in records(config)][4:] == pytest.approx(used, abs=1e-6)


def test_resume_survives_what_a_sudden_end_leaves_behind(data_folder, tower_folder, monkeypatch):
    config = stopped_run(data_folder, tower_folder, monkeypatch)
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # a line that was being written
    stage.run_stage(config)
    assert [record["step"] for record in records(config)] == [1, 2, 3, 4, 5, 6]


def test_checkpoint_half_written_by_a_process_of_the_same_number_is_no_obstacle(data_folder, tower_folder, monkeypatch):
    config = tiny(PRETRAIN_VLM, data_folder, tower_folder, save_interval=2)
    folder = config.run_dir / "checkpoints"
    monkeypatch.setattr(checkpoint.os, "getpid", lambda: 1)  # in a container every run has the same
    (folder / ".tmp-2-1").mkdir(parents=True)
    (folder / ".tmp-2-1/trained.safetensors").write_bytes(b"half")
    stage.run_stage(config)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]


# what is written


def test_metrics_hold_loss_rate_speed_and_validation(data_folder, tower_folder):
    config = tiny(SFT_VLM, data_folder, tower_folder, batch_size=4, warmup_ratio=0.5, save_interval=2, val_samples=2)
    stage.run_stage(config)
    training = [record for record in records(config) if "loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5]
    for record in training:
        assert {"loss", "learning_rate", "conversations_per_second", "supervised_tokens_per_second"} <= record.keys()
        assert record["conversations_per_second"] > 0 and record["supervised_tokens_per_second"] > 0
        assert 0 < record["data_wait"] < 1 and 0.05 < record["memory_gb"] < 100
        assert record["learning_rate"] == pytest.approx(1e-2 * lr_factor(record["step"] - 1, 5, 0.5), abs=1e-6)
    assert training[-1]["epoch"] == 1
    validations = {record["step"]: record["val_loss"] for record in records(config) if "val_loss" in record}
    assert validations.keys() == {2, 4, 5} and all(math.isfinite(loss) for loss in validations.values())
    seldom = dataclasses.replace(config, log_interval=3, save_dir=str(data_folder / "seldom"))
    stage.run_stage(seldom)  # the same run in fewer lines: a line is the mean since the one before
    means = [sum(r["loss"] for r in rows) / len(rows) for rows in (training[:3], training[3:])]
    assert losses(seldom) == pytest.approx(means, abs=1e-5)


def test_validation_loss_is_the_mean_over_supervised_tokens(data_folder, tower_folder, monkeypatch):
    config = tiny(SFT_VLM, data_folder, tower_folder, use_moe=1, learning_rate=1e-9, val_path="same", epochs=1)
    config = dataclasses.replace(config, val_path=config.data_path, batch_size=5, save_interval=1)
    stage.run_stage(config)
    validations = [record["val_loss"] for record in records(config) if "val_loss" in record]
    trained = [record for record in records(config) if "loss" in record]
    assert len(validations) == len(trained) == 4
    whole = dataclasses.replace(config, batch_size=24, save_dir=str(data_folder / "whole"))
    stage.run_stage(whole)  # its one step holds every sample, so its loss is that mean and the balance loss
    first = records(whole)[0]
    assert validations == pytest.approx([first["loss"] - first["aux_loss"]] * 4, abs=1e-4)


def test_weights_of_the_lowest_validation_loss_are_kept(data_folder, tower_folder, monkeypatch):
    validations = iter([3.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(saver, "validation_loss", lambda *_: next(validations))
    copies, original = {}, saver.save_weights

    def save_and_remember(model, path, facts, tensors):
        copies[facts["step"]] = {name: value.clone() for name, value in model.state_dict().items()}
        original(model, path, facts, tensors)

    monkeypatch.setattr(saver, "save_weights", save_and_remember)
    config = tiny(SFT_VLM, data_folder, tower_folder, batch_size=5, save_interval=1, val_samples=2)
    run_until(config, 3, monkeypatch)
    stage.run_stage(dataclasses.replace(config, from_resume=1))  # the best so far is remembered
    best_path = config.weight_path.with_name("sft_vlm_32_best.safetensors")
    with safe_open(best_path, framework="pt") as file:
        assert (file.metadata()["step"], float(file.metadata()["val_loss"])) == ("2", 1.0)
    best = read_weights(best_path)[1]
    assert_bit_equal(best, {name: copies["2"][name] for name in best})
    assert_bit_equal(weights_of(config), {name: copies["4"][name] for name in best})


@pytest.mark.parametrize("config", [SFT_VLM, LLM], ids=lambda config: config.name)
def test_weights_file_says_what_it_is_and_loads(config, data_folder, tower_folder, monkeypatch):
    config = tiny(config, data_folder, tower_folder, data_path=str(write_texts(data_folder)), use_moe=1, epochs=2)
    _, model = watched_run(config, monkeypatch)
    assert config.weight_path == data_folder / f"out/{config.name}_32_moe.safetensors"
    with safe_open(config.weight_path, framework="pt") as file:
        facts = file.metadata()
    assert (facts["stage"], facts["step"]) == (config.name, "6")
    assert json.loads(facts["stage_config"])["learning_rate"] == 1e-2
    sizes = json.loads(facts["config"])
    assert {name: sizes[name] for name in (*SIZES, "use_moe")} == {**SIZES, "use_moe": True}
    assert_bit_equal(load_model(config.weight_path).state_dict(), model.state_dict())


def test_tracker_works_offline_without_a_key(data_folder, tower_folder, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(data_folder))  # no .netrc there
    config = tiny(PRETRAIN_VLM, data_folder, tower_folder, use_wandb=1, val_samples=2)
    stage.run_stage(config)
    assert config.weight_path.is_file() and len(losses(config)) == 2
    assert list((config.run_dir / "wandb").glob("offline-run-*/*.wandb"))
