"""A fresh clone lacks nearly everything: a stage says so at once, and takes or offers what ships where that fits."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.models import SIZES
from helpers.repository import ROOT
from helpers.runs import refusal, tiny, untrained_weights
from model.files import SHIPPED_BASE, SHIPPED_TOWER
from model.messages import UserError
from trainer.config import StageConfig, parse_config
from trainer.guard import ending
from trainer.guard.needs import check_needs, with_base
from trainer.report.commands import command, shown
from trainer.train_llm import LLM
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM


@pytest.fixture
def fresh(tmp_path):
    """fresh(stage, ...): the stage as it stands, but for folders that hold nothing."""

    def configure(stage: StageConfig, **changes) -> StageConfig:
        absent = {name: str(tmp_path / name) for name in ("save_dir", "data_path", "vision_model")}
        return dataclasses.replace(stage, **{**absent, **changes})

    return configure


def offered(sentence: str) -> list[list[str]]:
    """The commands that a message offers from what ships, in parts."""
    (commands,) = re.findall("With what ships: `([^`]*)`", sentence)
    return [shlex.split(one) for one in commands.split(" && ")]


def test_all_that_is_absent_is_said_at_once_with_a_command_from_what_ships(fresh):
    config = fresh(PRETRAIN_VLM)
    said = refusal(config, config.data_path, "no llm_", config.vision_model, "download.py clip", "download.py llm")
    ((_, script, *flags),) = offered(said)
    assert Path(script).resolve() == ROOT / "trainer/train_pretrain_vlm.py"
    meant = parse_config(PRETRAIN_VLM, flags)
    assert (ROOT / meant.vision_model).samefile(
        ROOT / SHIPPED_TOWER
    ) and meant.start_path.resolve() == ROOT / SHIPPED_BASE
    assert meant.save_dir == config.save_dir


def test_an_exam_that_is_absent_is_said_with_the_rest(fresh, tmp_path):
    config = fresh(PRETRAIN_VLM, eval_tasks=f"{tmp_path}/a.jsonl:2,{tmp_path}/b.jsonl")
    refusal(config, f"{tmp_path}/a.jsonl and {tmp_path}/b.jsonl do not exist (--eval_tasks)", "(--data_path)")


def test_the_stage_before_is_part_of_the_offer(fresh):
    with pytest.raises(UserError) as refused:
        check_needs(fresh(SFT_VLM, data_path=SFT_VLM.data_path))
    scripts = [Path(parts[1]).name for parts in offered(str(refused.value))]
    assert scripts[-2:] == ["train_pretrain_vlm.py", "train_sft_vlm.py"]
    before = parse_config(PRETRAIN_VLM, offered(str(refused.value))[-2][2:])
    assert before.from_weight == "llm" and with_base(before, lambda _: None).start_path == ROOT / SHIPPED_BASE


def test_what_is_there_already_is_not_asked_for(data_folder, tower_folder, fresh):
    check_needs(tiny(SFT_VLM, data_folder, tower_folder))
    with pytest.raises(UserError) as refused:
        check_needs(tiny(SFT_VLM, data_folder, data_folder / "no_tower"))
    assert "--data_path" not in str(refused.value) and "--from_weight" not in str(refused.value)


def test_base_is_taken_where_there_is_no_other_and_it_fits(fresh, capsys):
    config = with_base(fresh(PRETRAIN_VLM, vision_model=SHIPPED_TOWER))
    assert config.start_path == ROOT / SHIPPED_BASE
    assert capsys.readouterr().out.startswith("--from_weight llm: none in ")
    assert with_base(fresh(LLM, from_weight="llm", hidden_size=192)).start_path == ROOT / SHIPPED_BASE


def test_base_is_left_where_it_does_not_fit(fresh, tower_folder, tmp_path):
    shipped = {"vision_model": SHIPPED_TOWER}
    for changes in ({"vision_model": str(tower_folder)}, {**shipped, "hidden_size": 512}, {**shipped, "use_moe": 1},
                    {**shipped, "from_weight": "pretrain_vlm"}, {**shipped, "from_weight": "none"}):  # fmt: skip
        config = fresh(PRETRAIN_VLM, **changes)
        assert with_base(config, pytest.fail) is config
    (tmp_path / "save_dir").mkdir()
    own = untrained_weights(tmp_path / "save_dir" / f"llm_{SIZES['hidden_size']}.safetensors")
    assert with_base(fresh(PRETRAIN_VLM, **shipped), pytest.fail).start_path == Path(own)


def test_commands_are_written_from_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert shown(ROOT / "out/my run") == "out/my run" and shown(tmp_path) == str(tmp_path)
    assert command("eval_vlm.py", "--weight", ROOT / "out/my run").endswith("eval_vlm.py --weight 'out/my run'")
    monkeypatch.setattr(sys, "executable", "/bin/another python")
    assert shlex.split(command("eval_vlm.py"))[0] == "/bin/another python"


def test_only_the_first_rank_of_a_machine_speaks_at_once(monkeypatch):
    slept = []
    monkeypatch.setattr(ending.time, "sleep", slept.append)
    for environment, expected in (
        ({}, 0),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"}, 0),
        ({"LOCAL_RANK": "1"}, 0),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1"}, 1),
    ):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            parse_config(SFT_VLM, ["--epochs", "0"])
        assert len(slept) == expected


def test_two_ranks_refuse_in_one_sentence_and_torchrun_repeats_it_at_its_end(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = ["--vision_model", tmp_path / "tower", "--save_dir", tmp_path, "--device", "cpu", "--data_path", "a.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, ROOT / "trainer/train_pretrain_vlm.py", *flags], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    said, _, report = (done.stdout + done.stderr).partition("Traceback")
    assert done.returncode == 1
    assert said.count("a.jsonl does not exist") == 1, said
    assert "traceback : pretrain_vlm: a.jsonl does not exist" in report
