"""The terminal: pictures and folders, turns, JSON, files of questions, weights in files and in folders."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import eval_vlm
from dataset.box_drawing import draw_boxes
from helpers.data import write_jsonl
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS, SIZES, enliven
from helpers.videos import make_video, numbered
from model.inference.answerer import Answer, Answerer, Options, user_turn
from model.video import open_video
from model.vision_encoder import normalize_pixels
from model.weights import save_weights


@pytest.fixture
def weight(make_vlm, tmp_path):
    save_weights(enliven(make_vlm()), tmp_path / "sft_vlm_32.safetensors")
    return tmp_path / "sft_vlm_32.safetensors"


@pytest.fixture
def run(monkeypatch, capsys, weight):
    """run(arguments...) -> what it printed; the weight may be replaced."""

    def call(*arguments, weight=weight) -> str:
        options = ["--weight", weight, "--device", "cpu", "--dtype", "float32", "--max_new_tokens", 8, *arguments]
        monkeypatch.setattr(sys, "argv", ["eval_vlm.py", *map(str, options)])
        eval_vlm.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def files(picture, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in (1, 2):
        picture(seed).save(folder / f"{seed}.png")
    return [folder / "1.png", folder / "2.png"]


def expected(weight, turns: list[str], pictures: list) -> str:
    messages = [user_turn(turns[0], len(pictures))]
    answerer = Answerer.from_weight(weight, device="cpu", dtype="float32")
    return answerer.stream(answerer.prompt(messages, pictures), Options(8)).text


def test_a_question_about_several_pictures(run, weight, files, picture):
    assert run("--image", *files, "--prompt", "what?") == expected(weight, ["what?"], [picture(1), picture(2)]) + "\n"


def test_a_pth_is_told_how_many_heads_it_has(run, weight, files, tower_folder, make_vlm, tmp_path):
    torch.save(enliven(make_vlm()).state_dict(), tmp_path / "old.pth")
    asked = ("--image", *files, "--prompt", "what?")
    heads = ("--vision_model", tower_folder, "--num_attention_heads")
    assert run(*asked, *heads, 4, weight=tmp_path / "old.pth") == run(*asked)
    assert run(*asked, *heads, 8, weight=tmp_path / "old.pth") != run(*asked)


def test_a_folder_is_asked_picture_by_picture(run, weight, files, picture):
    answers = "".join(f"{seed}.png: {expected(weight, ['what?'], [picture(seed)])}\n" for seed in (1, 2))
    assert run("--image", files[0].parent, "--prompt", "what?") == answers


def test_turns_as_json(run, files):
    found = [
        json.loads(line) for line in run("--json", "--image", files[0], "--prompt", "what?", "where?").splitlines()
    ]
    assert [record["question"] for record in found] == ["what?", "where?"]
    assert found[0]["pictures"] == [str(files[0])] and found[0]["new_tokens"] == 8 and found[0]["answer"]
    assert found[1]["prompt_tokens"] > found[0]["prompt_tokens"] + 8 and not found[1]["stopped"]


def test_a_window_forgets_turns_and_says_so(run, files, monkeypatch):
    """One that the first two turns fill: the picture is forgotten with the first."""
    asked = ("--image", files[0], "--prompt", "what?", "where?", "why?")
    window = [json.loads(line)["prompt_tokens"] for line in run("--json", *asked).splitlines()][1]
    found = [json.loads(line) for line in run("--json", "--context_window", window, *asked).splitlines()]
    assert [record.get("forgotten_turns", 0) for record in found] == [0, 0, 1]
    assert found[2]["prompt_tokens"] <= window
    with pytest.raises(SystemExit, match="--context_window is 10: ask less at once"):
        run("--context_window", "10", *asked)
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    said = run("--context_window", window, *asked)
    assert said.count("[1 turn with 1 picture forgotten to stay within --context_window]") == 1


def test_typed_turns_end_with_an_empty_line(run, monkeypatch, files):
    typed = iter(["what?", "where?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert len(run("--json", "--image", files[0]).splitlines()) == 2


def test_a_file_of_questions(run, weight, files, picture, tmp_path):
    """Three lines: a right truth, a wrong one, none."""
    said = expected(weight, ["what?"], [picture(1)]).strip()
    asked = {"role": "user", "content": "<image>\nwhat?"}
    lines = [
        {"image": "1.png", "conversations": [asked, {"role": "assistant", "content": said}]},
        {"image": "2.png", "conversations": [asked, {"role": "assistant", "content": "a cat"}]},
        {"image": [], "conversations": [{"role": "user", "content": "hello"}]},
    ]
    data = write_jsonl(tmp_path / "asked.jsonl", lines)
    told = json.loads(run("--data", data, "--images_path", files[0].parent, "--batch_size", 2, "--json"))
    assert (told["answers"], told["judged"], told["exact"], told["exact_match"]) == (3, 2, 1, 0.5)
    records = [json.loads(line) for line in (tmp_path / "asked_answers.jsonl").read_text().splitlines()]
    assert [record.get("exact") for record in records] == [True, False, None]
    assert records[0]["answer"] == said and records[1]["truth"] == "a cat" and records[2]["question"] == "hello"
    text = run("--data", data, "--images_path", files[0].parent, "--limit", 1, "--output", tmp_path / "one.jsonl")
    assert (
        text.startswith("exactly right: 1 of 1 (100.0 %)")
        and len((tmp_path / "one.jsonl").read_text().splitlines()) == 1
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png", "--prompt", "x"], "eval_vlm: --image none.png: the file does not exist"),
        (["--prompt", "x", "--top_p", "2"], "eval_vlm: top_p is 2.0"),
        (["--prompt", "x", "--device", "tpu9"], "eval_vlm: --device tpu9: choose from"),
        (["--data", "none.jsonl"], "eval_vlm: none.jsonl does not exist"),
        (["--prompt", "x", "--boxes", "no/such/boxes"], "eval_vlm: --boxes no/such/boxes: there is no folder no/such"),
    ],
)
def test_mistakes_end_in_a_sentence(run, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*arguments)


def test_a_file_must_hold_questions(run, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"conversations": [{"role": "assistant", "content": "a cat"}]}])
    with pytest.raises(SystemExit, match="a.jsonl:1: there is no question to answer"):
        run("--data", data)
    with pytest.raises(SystemExit):
        run("--data", data, "--output", data)
    assert data.read_text().count("a cat") == 1


def test_control_c_stops_the_answer_and_not_the_program(run, monkeypatch, files):
    import os
    import signal

    stream = Answerer.stream

    def interrupted(self, prompt, options, show, stopped):
        os.kill(os.getpid(), signal.SIGINT)
        return stream(self, prompt, options, show, stopped)

    monkeypatch.setattr(Answerer, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    found = [json.loads(line) for line in run("--json", "--image", files[0], "--prompt", "a?", "b?").splitlines()]
    assert [(record["new_tokens"], record["stopped"]) for record in found] == [(1, True), (1, True)]
    assert signal.getsignal(signal.SIGINT) == before


# folders as transformers saves them


@pytest.fixture
def our_folder(make_vlm, tokenizer, tmp_path):
    folder = tmp_path / "ours"
    enliven(make_vlm()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llava_folder(tokenizer, tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **SIZES,
        "intermediate_size": 64,
        "vocab_size": 6401,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=IMAGE_SIZE, patch_size=16), text_config=LlamaConfig(**text),
        image_token_index=6400, image_seq_length=IMAGE_TOKENS, projector_hidden_act="linear", vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    folder = tmp_path / "llava"
    enliven(LlavaForConditionalGeneration(config).eval()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_our_folder_answers_as_our_file(run, our_folder, weight, files):
    arguments = ("--image", *files, "--prompt", "what?", "--json")
    one, other = (json.loads(run(*arguments, weight=path)) for path in (our_folder, weight))
    assert one["answer"] == other["answer"] and one["prompt_tokens"] == other["prompt_tokens"]


def test_a_stock_llava_folder_answers_as_its_generate(llava_folder, processor, picture):
    answerer = Answerer.from_weight(llava_folder, device="cpu", dtype="float32")
    model = LlavaForConditionalGeneration.from_pretrained(llava_folder)
    asked = [([user_turn("@@ what?", n)], [picture(k) for k in range(n)]) for n in (1, 2, 0)]
    expected = []
    for messages, pictures in asked:
        rendered = processor.render(messages, add_generation_prompt=True)
        ids = torch.tensor([rendered.input_ids.tolist()])
        ids[torch.tensor([rendered.image_mask.tolist()])] = 6400
        seen = {}
        if pictures:
            seen["pixel_values"] = normalize_pixels(torch.stack([processor.pixels(p) for p in pictures]))
        found = model.generate(ids, **seen, max_new_tokens=8, do_sample=False)
        expected.append(tuple(found[0, ids.shape[1] :].tolist()))
    assert len({*expected}) == 3 and len(set(expected[0])) > 3
    prompts = [answerer.prompt(*conversation) for conversation in asked]
    assert [answerer.stream(prompt, Options(8)).token_ids for prompt in prompts] == expected
    assert [answer.token_ids for answer in answerer.batch(prompts, Options(8))] == expected


def test_folders_that_are_none(run, our_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty is no model folder: its config.json cannot be read"):
        run("--prompt", "x", weight=tmp_path / "empty")
    with pytest.raises(SystemExit, match="leave --vision_model out"):
        run("--prompt", "x", "--vision_model", "tower", weight=our_folder)
    config = our_folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"minimind_vlm"', '"mamba"'))
    with pytest.raises(SystemExit, match="holds a model of type 'mamba': this reads minimind, minimind_vlm, llava"):
        run("--prompt", "x", weight=our_folder)
    config.write_text(text)
    (our_folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(SystemExit, match="is damaged or no weights file"):
        run("--prompt", "x", weight=our_folder)


# what is broken is left out


def test_a_broken_picture_does_not_end_a_folder(run, files, capsys):
    (files[0].parent / "0.png").write_text("no picture")
    assert [line[:5] for line in run("--image", files[0].parent, "--prompt", "what?").splitlines()] == [
        "1.png",
        "2.png",
    ]
    for path in files:
        path.write_text("no picture")
    with pytest.raises(
        SystemExit, match="eval_vlm: none of 3 pictures can be used: --image .*0.png: it cannot be read"
    ):
        run("--image", files[0].parent, "--prompt", "what?")


def test_broken_lines_do_not_end_a_file(run, files, tmp_path, capsys):
    def asked(image: list[str], role: str = "user") -> dict:
        return {"image": image, "conversations": [{"role": role, "content": "<image>" * len(image) + "what?"}]}

    (files[0].parent / "0.png").write_text("no picture")
    lines = [asked(["0.png"]), asked(["1.png"]), asked([], "robot"), asked(["absent.png"]), asked([]), asked(["2.png"])]
    lines.insert(2, {"conversations": [{"role": "robot", "content": "hm"}, {"role": "user", "content": "what?"}]})
    data = write_jsonl(tmp_path / "asked.jsonl", lines)
    found = json.loads(run("--data", data, "--images_path", files[0].parent, "--json"))
    assert (found["answers"], found["left_out"]) == (3, 4)
    records = [json.loads(line) for line in (tmp_path / "asked_answers.jsonl").read_text().splitlines()]
    assert [record["where"].rpartition(":")[2] for record in records] == ["2", "6", "7"]
    with pytest.raises(SystemExit, match="asked.jsonl:1: .*0.png: it cannot be read as a picture"):
        run("--data", data, "--images_path", files[0].parent, "--limit", 1)


def test_missing_data_and_pictures_are_found_before_the_model_is_loaded(run, files, tmp_path, monkeypatch):
    monkeypatch.setattr(Answerer, "from_weight", lambda *_: pytest.fail("loaded"))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "page.png").write_text("no picture")
    for arguments, said in (
        (["--data", tmp_path / "emty.jsonl"], f"emty.jsonl does not exist: did you mean {tmp_path}/empty.jsonl"),
        (["--data", tmp_path / "empty.jsonl"], "holds no sample"),
        (["--data", tmp_path / "empty.jsonl", "--images_path", f"{files[0].parent}s"], "does not exist: did you mean"),
        (["--image", files[0].parent / "1.pgn"], f"1.pgn: the file does not exist: did you mean {files[0]}"),
        (["--image", tmp_path / "page.png"], "page.png: it cannot be read as a picture"),
    ):
        with pytest.raises(SystemExit, match=said) as stopped:
            run(*arguments)
        assert not [
            flag for flag in ("data_path", "delete the line", "check --images_path") if flag in str(stopped.value)
        ]


def test_a_log_holds_no_carriage_returns(run, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "asked.jsonl", [{"conversations": [{"role": "user", "content": "hello"}]}] * 3)
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    run("--data", data, "--batch_size", 1)
    assert "tokens/s]" in log.getvalue() and "\r" not in log.getvalue() and " of 3" not in log.getvalue()


def test_one_picture_is_not_plural(run, monkeypatch, files, capsys):
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    assert run("--image", files[0]) == "1 picture. Ask; an empty line ends.\n"


def test_a_question_about_a_video(run, weight, tmp_path, picture):
    """With a picture before it; what cannot be read is said in a sentence."""
    pytest.importorskip("av", reason="videos are read with the package av: pip install -r requirements/video.txt")
    video = make_video(tmp_path / "a.mp4", numbered(16), rate=2)
    picture(1).save(tmp_path / "1.png")
    seen = [picture(1), open_video(video, 8)]
    asked = ("--image", tmp_path / "1.png", "--video", video, "--prompt", "what?")
    assert run(*asked) == expected(weight, ["what?"], seen) + "\n"
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(SystemExit, match="eval_vlm: --video .*b.mp4: it cannot be read as a video"):
        run("--video", tmp_path / "b.mp4", "--prompt", "what?")
    with pytest.raises(SystemExit, match="--video .*c.mp4: the file does not exist: did you mean"):
        run("--video", tmp_path / "c.mp4", "--prompt", "what?")


def test_boxes_of_answers_are_drawn_each_in_a_file(run, monkeypatch, files, tmp_path, capsys):
    said = iter(["cat <box> 10 10 50 50", "none", "<box> 0 0 99 99"])
    monkeypatch.setattr(Answerer, "stream", lambda *_: Answer(next(said), (300, 2), 9, 2, 0.1, 10.0))
    drawings = tmp_path / "drawings"
    with pytest.raises(SystemExit):
        run("--data", "x.jsonl", "--boxes", drawings)
    assert "--boxes is for --image and --prompt" in capsys.readouterr().err and not drawings.exists()
    run("--image", *files, "--prompt", "Where?", "And then?", "And the rest?", "--boxes", drawings)
    assert sorted(path.name for path in drawings.iterdir()) == ["1_2.png", "2_2.png"]  # of the last picture, 2.png
    for path, text in (("1_2.png", "cat <box> 10 10 50 50"), ("2_2.png", "<box> 0 0 99 99")):
        assert Image.open(drawings / path).tobytes() == draw_boxes(Image.open(files[1]), text).tobytes()


def test_stderr_says_where_boxes_were_drawn_or_that_there_are_none(picture, tmp_path, capsys):
    drawings, shown = eval_vlm.Drawings(tmp_path), {Path("cat.jpg"): picture(1)}
    drawings.draw(shown, "<box> 0 0 99 99")
    drawings.draw(shown, "a cat")
    drawings.draw({}, "<box> 0 0 99 99")
    assert capsys.readouterr().err.splitlines() == [
        f"[boxes: {tmp_path / '1_cat.png'}]", "[no box in the answer, nothing drawn]", "[no picture, nothing drawn]",
    ]  # fmt: skip
    eval_vlm.Drawings(None).draw(shown, "<box> 0 0 99 99")
    assert capsys.readouterr().err == "" and [path.name for path in tmp_path.iterdir()] == ["1_cat.png"]
