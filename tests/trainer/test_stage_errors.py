"""What a user can get wrong ends in one sentence that names it and the cure, before the first step; and the flags."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from helpers.runs import records, refusal, stopped_run, tiny, untrained_weights, write_texts
from trainer.config import ROOT, StageConfig, parse_config
from trainer.stage import run_stage
from trainer.train_llm import LLM
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM

SCRIPTS = {"train_llm": LLM, "train_pretrain_vlm": PRETRAIN_VLM, "train_sft_vlm": SFT_VLM}


def change_line(config: StageConfig, number: int, line: str | dict) -> str:
    """Replace a line of the data; where it stands, as messages say it."""
    path = Path(config.data_path)
    lines = path.read_text().splitlines()
    lines[number - 1] = line if isinstance(line, str) else json.dumps(line)
    path.write_text("\n".join(lines) + "\n")
    return f"{path}:{number}"


def sample(image: list[str], question: str) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a cat"}]
    return {"image": image, "conversations": turns}


# weights and tower


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pth"])
def test_missing_weights_file(name, config, data_folder):
    path = data_folder / name
    refusal(dataclasses.replace(config, from_weight=str(path)), str(path), "does not exist", "--from_weight")


def test_missing_weights_of_the_stage_before(config):
    refusal(
        dataclasses.replace(config, from_weight="pretrain_vlm"), "pretrain_vlm_", "--from_weight", "train that stage"
    )


def test_damaged_weights_file(config, data_folder):
    path = Path(untrained_weights(data_folder / "cut.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    refusal(dataclasses.replace(config, from_weight=str(path)), str(path), "damaged")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_key_value_heads": 4}], ids=str
)
def test_weights_of_other_sizes(changes, config, data_folder):
    path = untrained_weights(data_folder / "other.safetensors", **changes)
    ((name, size),) = changes.items()
    refusal(dataclasses.replace(config, from_weight=path), path, "does not fit", "--hidden_size", f"{name} {size}")


def test_weights_of_another_stage_kind(data_folder, tower_folder):
    config = tiny(SFT_VLM, data_folder, tower_folder, use_moe=1)
    path = untrained_weights(data_folder / "dense.safetensors")
    refusal(dataclasses.replace(config, from_weight=path), path, "does not fit", "--use_moe")


@pytest.mark.parametrize("present", [False, True])
def test_missing_tower(present, config, data_folder):
    folder = data_folder / "no_tower"
    if present:
        folder.mkdir()
    said = refusal(
        dataclasses.replace(config, vision_model=str(folder)), str(folder), "--vision_model", "download.py clip"
    )
    assert ("does not exist" in said) == (not present)


# data


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_missing_data_file(name, config, data_folder):
    path = str(data_folder / name)
    refusal(dataclasses.replace(config, data_path=path), path, "does not exist", "--data_path")


def test_missing_validation_file_names_its_own_flag(config, data_folder):
    path = str(data_folder / "absent.jsonl")
    refusal(dataclasses.replace(config, val_path=path), path, "does not exist", "--val_path")


def test_data_file_of_unknown_kind(config, data_folder):
    path = data_folder / "train.xlsx"
    path.write_text("a,b\n")
    refusal(dataclasses.replace(config, data_path=str(path)), str(path), ".jsonl", ".parquet")


def test_empty_data_file(config):
    Path(config.data_path).write_text("\n")
    refusal(config, config.data_path, "no sample")


@pytest.mark.parametrize("damage", ["no picture", "cut short", "missing", "a folder"])
def test_unreadable_picture(damage, config, data_folder):
    name = "9_0.png"  # the picture of line 10
    path = data_folder / "images" / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(b"not a picture" if damage == "no picture" else content[: len(content) // 2])
    refusal(config, f"{config.data_path}:10:", name)


@pytest.mark.parametrize("line", ['{"conversations": [', "<html>", "[1, 2]", '"text"'])
def test_line_that_is_no_json_object(line, config):
    refusal(config, change_line(config, 5, line), "this line")


@pytest.mark.parametrize(
    ("image", "question", "counts"),
    [(["0_0.png"], "<image><image> What?", ("2 <image>", "1 picture")),
     (["0_0.png"], "What?", ("0 <image>", "1 picture")), ([], "<image> What?", ("1 <image>", "0 picture"))],
)  # fmt: skip
def test_tags_and_pictures_of_different_number(image, question, counts, config):
    where = change_line(config, 7, sample(image, question))
    refusal(config, where, *counts)


def test_unknown_role(config):
    turns = [{"role": "robot", "content": "What?"}, {"role": "assistant", "content": "a cat"}]
    refusal(config, change_line(config, 24, {"conversations": turns}), "role", "assistant")


def test_no_usable_sample_says_where_and_which_flag_would_help(config):
    with pytest.raises(SystemExit, match="no sample of 24 can be used") as stopped:
        run_stage(dataclasses.replace(config, max_seq_len=3))
    assert f"{config.data_path}:1: " in str(stopped.value) and "--max_seq_len" in str(stopped.value)


def test_too_few_samples_for_a_step(config):
    changed = dataclasses.replace(config, batch_size=5, accumulation_steps=5)
    refusal(changed, "24 rows", "one step of 25", "--batch_size 5", "--accumulation_steps 5")


@pytest.mark.parametrize(
    ("lines", "changes", "reason"),
    [
        (20, {}, "samples: expected 24, found 20.*--allow_data_change 1"),
        (24, {"batch_size": 6}, "8 rows are left, which steps of 6 .--batch_size 6 .*takes 4 as before"),
    ],
)
def test_resume_refuses_other_data_and_other_batches(lines, changes, reason, data_folder, tower_folder, monkeypatch):
    config = dataclasses.replace(stopped_run(data_folder, tower_folder, monkeypatch), **changes)
    data = Path(config.data_path)
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:lines]))
    before, weights = records(config), config.weight_path.read_bytes()
    with pytest.raises(SystemExit, match=f"{reason}.*--from_resume 0"):
        run_stage(config)
    assert records(config) == before and config.weight_path.read_bytes() == weights


# flags


def test_part_that_the_model_does_not_have(data_folder, tower_folder):
    config = tiny(LLM, data_folder, tower_folder, data_path=str(write_texts(data_folder)), trainable=("projector",))
    refusal(config, "--trainable projector", "this model has no projector")


def test_cuda_without_cuda(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(dataclasses.replace(config, device="cuda"), "--device cuda", "--device cpu")


def test_tracker_that_is_not_installed(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    refusal(dataclasses.replace(config, use_wandb=1), "--use_wandb", "pip install wandb")


def run_script(name: str, monkeypatch, flags: dict) -> None:
    """The stage script as a user starts it, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *(f"--{flag}={value}" for flag, value in flags.items())])
    runpy.run_path(str(ROOT / f"trainer/{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("trainable", "tower"), ("trainable", ""), ("with_vision", "2"), ("epochs", "0"), ("epochs", "many"),
     ("batch_size", "0"), ("accumulation_steps", "-1"), ("log_interval", "0"), ("save_interval", "0"),
     ("max_seq_len", "0"),
     ("learning_rate", "0"), ("learning_rate", "nan"), ("grad_clip", "-1"), ("dtype", "float8"),
     ("hidden_size", "30"), ("num_hidden_layers", "-1"), ("num_attention_heads", "-4"), ("dropout", "1.5"),
     ("weight_decay", "-0.1"), ("warmup_ratio", "1.5"), ("projector_learning_rate", "-1"), ("val_samples", "-5"),
     ("num_workers", "-1"), ("device", "tpu")],
)  # fmt: skip
def test_wrong_value_ends_the_script_with_the_name_of_its_flag(flag, value, config, monkeypatch, capsys):
    flags = {name: v for name, v in vars(config).items() if name not in ("trainable", "with_vision", "name")}
    with pytest.raises(SystemExit) as stopped:
        run_script("train_sft_vlm", monkeypatch, {**flags, flag: value})
    assert stopped.value.code not in (0, None)
    said = f"{stopped.value} {capsys.readouterr().err.splitlines()[-1:]}"
    assert flag in said
    assert not config.weight_path.exists() and not (config.run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_of_every_stage_lists_every_flag(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / f"trainer/{name}.py"), run_name="__main__")
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for field in dataclasses.fields(StageConfig):
        assert f" --{field.name} {field.name.upper()} " in said


def test_every_field_is_a_flag():
    examples = {bool: ("0", False), int: ("7", 7), float: ("0.25", 0.25), str: ("words", "words")}
    special = {"trainable": ("projector,last_layer", ("projector", "last_layer")), "min_rating": ("4", 4)}
    special["checkpoint_activations"] = ("1", 1)
    choices = {item.name: item.metadata["choices"] for item in dataclasses.fields(StageConfig)}
    special |= {name: (values[-1], values[-1]) for name, values in choices.items() if values}
    for field in dataclasses.fields(StageConfig):
        text, value = special.get(field.name) or examples[type(getattr(SFT_VLM, field.name))]
        changed = parse_config(SFT_VLM, [f"--{field.name}", text])
        assert getattr(changed, field.name) == value
        assert dataclasses.replace(changed, **{field.name: getattr(SFT_VLM, field.name)}) == SFT_VLM
    assert parse_config(SFT_VLM, []) == SFT_VLM
