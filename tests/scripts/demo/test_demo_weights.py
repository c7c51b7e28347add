"""What is asked where nobody names weights: what was trained last, else what ships, else a sentence says what to do."""

import os
import sys
from pathlib import Path

import pytest

import eval_vlm
import model.files
from helpers.models import enliven
from helpers.repository import ROOT
from model.files import SHIPPED_MODEL, SHIPPED_TOWER
from model.weights import read_facts, save_weights
from scripts import score, serve
from scripts.demo import weights
from scripts.demo.weights import Weight, about, is_finished, names, offered, weights_or_newest

MODEL = ROOT / SHIPPED_MODEL


@pytest.fixture
def save(make_vlm, tmp_path):
    """save("out/run/sft_vlm_32"): tiny weights of that stage under tmp_path, younger than those before."""
    saved = []

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.safetensors"
        stage = next((stage for stage in ("sft_vlm", "pretrain_vlm", "llm") if stage in name), "sft_vlm")
        save_weights(enliven(make_vlm()), path, {"stage": stage})
        saved.append(path)
        os.utime(path, ns=(len(saved) * 10**9,) * 2)
        return path

    return write


def stems(found: list[Weight]) -> list[str]:
    return [f"{weight.path.parent.name}/{weight.path.stem}" for weight in found]


def test_what_was_trained_stands_before_what_ships(save, tmp_path):
    assert offered([], tmp_path) == []
    save("model/emoji-vlm")
    assert [weight.ships for weight in offered([], tmp_path)] == [True]
    save("out/quickstart/pretrain_vlm_32")  # halfway, and the smaller model beside it answers questions
    assert stems(offered([], tmp_path)) == ["model/emoji-vlm", "quickstart/pretrain_vlm_32"]
    run = save("out/mine/sft_vlm_32").with_suffix("")
    run.mkdir()
    (run / "status.json").write_text('{"state": "running"}')
    save("out/mine/sft_vlm_32_best")
    assert stems(offered([], tmp_path))[:2] == ["model/emoji-vlm", "mine/sft_vlm_32"]
    save("out/quickstart/sft_vlm_32")
    assert stems(offered([], tmp_path))[:2] == ["quickstart/sft_vlm_32", "mine/sft_vlm_32"]
    (run / "status.json").write_text('{"state": "done"}')
    (run.parent / "sft_vlm_32_best.safetensors").unlink()
    save("out/mine/sft_vlm_32")
    found = offered([], tmp_path)
    assert stems(found) == [
        "mine/sft_vlm_32", "quickstart/sft_vlm_32", "quickstart/pretrain_vlm_32", "model/emoji-vlm"
    ]  # fmt: skip
    assert [weight.ships for weight in found] == [False, False, False, True]


def test_what_somebody_names_comes_first_and_nothing_comes_twice(save, tmp_path):
    save("model/emoji-vlm")
    save("named/pretrain_vlm_32")
    assert stems(offered([tmp_path / "named"], tmp_path)) == ["named/pretrain_vlm_32", "model/emoji-vlm"]
    assert stems(offered([tmp_path / "model"], tmp_path)) == ["model/emoji-vlm"]


def test_its_name_says_that_it_ships(save, tmp_path):
    save("model/emoji-vlm")
    save("out/quickstart/sft_vlm_32")
    trained, ships = offered([], tmp_path)
    assert names([trained, ships], "en") == {
        trained: "Picture Q&A · quickstart",
        ships: "Ships with the project (small)",
    }
    assert names([ships], "zh") == {ships: "随项目提供的小模型"}
    assert (
        about(ships, "en")[0].startswith("This small model ships")
        and "`emoji-vlm.safetensors`" in about(ships, "en")[0]
    )
    assert about(ships, "zh")[0].startswith("这是随项目提供的小模型")
    assert about(trained, "en")[0].startswith("The file does not say")


def test_commands_take_the_newest_or_what_ships_and_say_which(save, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    assert weights_or_newest(tmp_path / "any.pth") == tmp_path / "any.pth" and not capsys.readouterr().err
    ships = save("model/emoji-vlm")
    assert weights_or_newest(None) == ships
    said = capsys.readouterr().err
    assert f"{ships}, the small model that ships" in said and "--weight FILE takes others" in said
    save("out/old/sft_vlm_32")
    newest = save("out/sft_vlm_32")
    assert weights_or_newest(None) == newest and f"{newest}, the newest in out/" in capsys.readouterr().err


def test_a_question_is_answered_without_naming_weights(save, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    answers = []
    for flags in ([], ["--weight", str(save("model/emoji-vlm"))]):
        monkeypatch.setattr(sys, "argv", ["eval_vlm.py", *flags, "--prompt", "what?", "--max_new_tokens", "5"])
        eval_vlm.main()
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()


@pytest.mark.parametrize(
    ("command", "flags"),
    [(eval_vlm, ["--prompt", "what?"]), (score, ["--data", "train.jsonl"]), (serve, ["--port", "0"])],
    ids=["eval_vlm", "score", "serve"],
)
def test_where_there_are_none_at_all_a_sentence_says_what_to_do(command, flags, data_folder, monkeypatch):
    monkeypatch.chdir(data_folder)
    monkeypatch.setattr(weights, "ROOT", data_folder)
    (data_folder / "model").mkdir()
    (data_folder / SHIPPED_MODEL).write_bytes(b"damaged")
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as ended:
        command.main()
    said = str(ended.value)
    assert f"{data_folder / 'out'} holds no weights" in said and f"`git checkout {SHIPPED_MODEL}`" in said
    assert "`make quickstart`" in said and "\n" not in said


def test_the_page_begins_with_what_ships_until_something_is_trained(save, tmp_path, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1", reason="the demo needs streamlit")
    monkeypatch.setattr(model.files, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["web_demo.py"])
    save("model/emoji-vlm")

    def listed() -> list[str]:
        page = testing.AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=30).run()
        assert not page.exception and page.chat_input
        box = page.selectbox(key="weight")
        assert names([box.value], "en")[box.value] == box.options[0]
        return box.options

    assert listed() == ["Ships with the project (small)"]
    save("out/quickstart/sft_vlm_32")
    assert listed() == ["Picture Q&A · quickstart", "Ships with the project (small)"]


@pytest.mark.skipif(not MODEL.is_file(), reason=f"{SHIPPED_MODEL} is not there")
def test_the_file_that_ships_is_small_and_tells_no_machine(monkeypatch, capsys):
    assert MODEL.stat().st_size <= 12 * 1000**2
    # A stage writes its whole StageConfig, with the folders of whoever trained: that is taken out before it ships.
    assert {"stage", "step", "val_loss"} <= read_facts(MODEL).keys() and "stage_config" not in read_facts(MODEL)
    (ships,) = (weight for weight in offered([], ROOT) if weight.ships)
    assert is_finished(ships) and ships.tower == Path(SHIPPED_TOWER).name
    monkeypatch.setattr(weights, "offered", lambda *_: [ships])  # whatever was trained here
    monkeypatch.setattr(sys, "argv", ["eval_vlm.py", "--prompt", "What is a dog?", "--max_new_tokens", "4"])
    eval_vlm.main()
    assert capsys.readouterr().out.strip()
