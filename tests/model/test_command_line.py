"""What a mistyped flag or name is answered with: one line, with the name that was meant."""

import json
import runpy
import sys

import pytest

from dataset.readers.opening import read_samples
from helpers.data import make_picture, write_jsonl
from helpers.repository import ROOT, python_files
from model.command_line import CommandLine
from model.inference.stock_reader import load_folder
from model.messages import counted, did_you_mean
from model.tower_folder import read_tower
from model.weights import load_model
from scripts import estimate
from trainer.config import parse_config
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM


def parser() -> CommandLine:
    made = CommandLine("words", prog="tool.py")
    made.add_argument("--learning_rate", type=float, default=0.0)
    made.add_argument("--weight", required=True)
    made.add_argument("--prompt", nargs="+")
    return made


def test_dashes_are_underscores_and_values_stay_as_they_are():
    options = parser().parse_args(["--learning-rate=3", "--weight", "a-b-c", "--prompt", "what-is-it", "-x-y z"])
    assert options.learning_rate == 3 and options.weight == "a-b-c" and options.prompt == ["what-is-it", "-x-y z"]
    assert parser().parse_args(["--weight", "w", "--learning", "2"]).learning_rate == 2  # shortened, as ever
    assert parse_config(SFT_VLM, ["--learning-rate", "0.25"]).learning_rate == 0.25


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["--wieght", "x"], "tool: there is no --wieght: did you mean --weight?"),  # and not: --weight is required
        (["--weight", "w", "--learnin-rat", "3"], "there is no --learnin-rat: did you mean --learning_rate?"),
        (["--weight", "w", "--colour", "3"], "tool: there is no --colour (--help"),
        (["--weight", "w", "more", "words"], "tool: 'more words' belongs to no flag"),
        (["--weight", "w", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        ([], "tool: the following arguments are required: --weight"),
    ],
)
def test_a_mistake_is_one_line_without_the_usage(capsys, typed, said):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args(typed)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1 and "usage" not in error


def test_flags_in_groups_are_flags_too(capsys):
    made = parser()
    made.add_argument_group("speed").add_argument("--num_workers", type=int)
    assert made.parse_args(["--weight", "w", "--num-workers", "3"]).num_workers == 3
    assert made.parse_args(["--weight", "w", "--num-work=3"]).num_workers == 3
    with pytest.raises(SystemExit):
        made.parse_args(["--weight", "w", "--num_worker5", "3"])
    assert "there is no --num_worker5: did you mean --num_workers?" in capsys.readouterr().err


def test_every_command_reads_its_flags_alike():
    own = [path for path in python_files("scripts", "trainer", "eval_vlm") if "ArgumentParser(" in path.read_text()]
    assert not own


def test_the_name_that_was_meant(tmp_path):
    path = tmp_path / "quickstart" / "sft_vlm_192.safetensors"
    path.parent.mkdir()
    path.write_text("")
    for typed in ("quikstart/sft_vlm_192.safetensors", "quickstart/sft_vlm192.safetensors"):
        assert did_you_mean(tmp_path / typed) == f": did you mean {path}?"
    assert did_you_mean(tmp_path / "quikstart") == f": did you mean {path.parent}?"
    assert did_you_mean(tmp_path / "cat.png") == did_you_mean(path) == did_you_mean("a\0b") == ""


# weights and towers, in each tool's own words


def test_weights_that_are_none_name_what_is_there_and_nothing_dangerous(tmp_path):
    path = tmp_path / "out" / "sft_vlm_32.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"")
    data = write_jsonl(tmp_path / "out" / "held_out.jsonl", [{"text": "hello"}])
    for load, given, said in (
        (load_model, tmp_path / "out" / "sft_vlm_23.safetensors", f"does not exist: did you mean {path}?"),
        (
            load_model,
            tmp_path / "out" / "mine.pth",
            f"does not exist: name one of the weights in {path.parent}, {path}",
        ),
        (load_model, data, f"is no weights file, those end in .safetensors, .pth, .pt, .bin: name one of .*{path}"),
        (load_model, path.parent, f"is a folder without a config.json.*{path}"),
        (load_folder, path.parent, f"is no model folder: .*: name one of the weights in {path.parent}, {path}"),
        (load_folder, tmp_path, f": name one of the weights in {tmp_path}, {path}"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            load(given)
        assert "--from_weight" not in str(caught.value) and "weights_only" not in str(caught.value)


def test_a_text_called_pth_and_a_pickle_bring_no_advice_of_torch(tmp_path):
    import torch

    path = tmp_path / "llm.pth"
    path.write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match="is no weights file of torch: copy or download it again$"):
        load_model(path)
    torch.save({"config": parser}, path)
    with pytest.raises(ValueError, match=r"holds more than tensors \(Unsupported global: GLOBAL test_command_line.pa"):
        load_model(path)


def test_weights_that_lack_a_tensor_name_no_flag_that_only_training_has(make_vlm, tmp_path):
    from safetensors.torch import load_file

    from helpers.models import rewrite
    from model.weights import save_weights

    path = tmp_path / "cut.safetensors"
    save_weights(make_vlm(), path)
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    rewrite(path, tensors)
    with pytest.raises(
        ValueError, match="does not fit the model in 1 tensor: missing model.norm.weight. It is cut"
    ) as e:
        load_model(path)
    assert "--hidden_size" not in str(e.value)


def test_a_mistyped_tower_is_not_told_to_fetch_clip_into_it(tower_folder):
    with pytest.raises(ValueError, match=f"does not exist: did you mean {tower_folder}") as caught:
        read_tower(f"{tower_folder}s")
    assert "download.py" not in str(caught.value)


# data


TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A cup of tea."}]


def test_what_needed_a_program_to_be_read_is_read_as_it_is(tmp_path):
    (tmp_path / "images").mkdir()
    make_picture(1).save(tmp_path / "images" / "a.png")
    (tmp_path / "llava.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": TURNS}]))
    (sample,) = read_samples(tmp_path / "llava.json")
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant"] and sample.extra == {"id": "1"}


def test_estimate_leaves_out_what_is_broken_and_finds_at_once_what_is_missing(data_folder, capsys, monkeypatch):
    def later(*_: object) -> None:
        raise AssertionError("asked too late")

    tiny = ["--hidden_size", "32", "--num_hidden_layers", "1", "--num_attention_heads", "4", "--num_key_value_heads",
            "2", "--stage", "pretrain_vlm", "--tflops", "0.5", "--batch_size", "2"]  # fmt: skip
    path = data_folder / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["nonsense", *lines[1:]]) + "\n")
    estimate.main([*tiny, "--data", str(path)])
    assert f"left out 1 of {len(lines)} samples: {path}:1: this line is no JSON" in capsys.readouterr().out
    monkeypatch.setattr(estimate, "step_of", later)
    with pytest.raises(SystemExit, match=f"estimate: .*trian.jsonl does not exist: did you mean {path}"):
        estimate.main([*tiny, "--data", str(data_folder / "trian.jsonl")])


# the rest


def test_one_is_not_plural():
    assert [counted(n, "bad samples") for n in (0, 1, 2000)] == ["0 bad samples", "1 bad sample", "2,000 bad samples"]


def test_a_run_stopped_before_its_first_step_promises_no_checkpoint(monkeypatch, capsys, tmp_path):
    from trainer import stage
    from trainer.guard.signals import Stopped

    def stopped(*_: object) -> None:
        raise Stopped(2)

    monkeypatch.setattr(stage, "check_needs", stopped)
    with pytest.raises(SystemExit):
        run_stage(parse_config(SFT_VLM, ["--save_dir", str(tmp_path), "--from_weight", "none", "--device", "cpu"]))
    said = capsys.readouterr().out
    assert "sft_vlm: stopped by SIGINT; before its first step" in said and "checkpoint" not in said


def test_the_proof_has_a_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["proof.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "scripts/export/proof.py"), run_name="__main__")
    assert stopped.value.code == 0 and "scripts/export/proof.py FOLDER REFERENCE" in capsys.readouterr().out
