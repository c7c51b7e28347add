"""How the browser demo names weights, what a conversation keeps, and what of it is taken home."""

import ast
import base64
import json
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from helpers.data import make_picture
from helpers.models import IMAGE_SIZE, answered
from helpers.repository import ROOT
from model.inference.answerer import Options
from model.views import Sight
from scripts.demo.chat import Reply, Turn, conversation
from scripts.demo.export import as_html, as_json
from scripts.demo.limits import MAX_CHARACTERS, Refused, prepare_picture
from scripts.demo.weights import Weight, about, file_name, find_weights, names, runs

HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & ![x](https://example.org/x.png)"

TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "section", "img", "br", "small", "p"}


def weight(path: str, stage: str = "sft_vlm", **facts: str) -> Weight:
    return Weight(Path(path), 1, stage, IMAGE_SIZE, **facts)


def a_turn(text: str) -> Turn:
    name, options = weight('/w/x"><script>.safetensors'), Options(seed=3)
    replies = [Reply(name, options, answer=answered(answer)) for answer in (text, "second " + text)]
    return Turn(text, [prepare_picture(make_picture(1), Sight(IMAGE_SIZE))], text, replies=replies)


# how weights are named


def test_the_best_is_folded_into_its_run():
    last, best = weight("/a/sft_vlm_32.safetensors"), weight("/a/sft_vlm_32_best.safetensors")
    alone = weight("/b/sft_vlm_32_best.safetensors")
    assert runs([last, best, alone]) == {last: best, alone: None}


def test_names_say_what_weights_do_and_no_two_are_alike():
    one, two = weight("/a/run/sft_vlm_32.safetensors"), weight("/b/run/sft_vlm_32.safetensors")
    wide, captions = weight("/a/run/sft_vlm_64.safetensors"), weight("/a/run/p.safetensors", "pretrain_vlm")
    other = weight("/a/run/my_stage_32.safetensors", "my_stage")
    found = names([one, two, wide, captions, other], "en")
    assert found[captions] == "Captions (stage 1) · run" and found[other] == "my_stage_32 · run"
    assert found[wide] == "Picture Q&A · run · sft_vlm_64"
    assert found[one] == "Picture Q&A · /a/run/sft_vlm_32.safetensors" and len(set(found.values())) == 5
    best = weight("/a/run/sft_vlm_64_best.safetensors")
    assert names([best], "en") == {best: "Picture Q&A, best checkpoint · run"}
    assert names([wide], "zh") == {wide: "看图问答 · run"}


def test_what_weights_were_trained_on_is_told(make_vlm, tmp_path):
    from model.weights import save_weights

    facts = {"stage": "sft_vlm", "step": "1234", "val_loss": "0.4192",
             "stage_config": json.dumps({"data_path": "/home/me/quickstart/data/sft.jsonl"})}  # fmt: skip
    save_weights(make_vlm(), tmp_path / "sft_vlm_32.safetensors", facts)
    (found,) = find_weights([tmp_path])
    told = about(found, "en")[0]
    assert told == (
        "Trained on `quickstart/data/sft.jsonl` · 1,234 steps · validation loss `0.4192` · `sft_vlm_32.safetensors`"
    )
    drawings = about(weight("/a/x.safetensors", tower="emoji-clip"), "en")
    assert "does not say" in drawings[0] and "photographs mean nothing" in drawings[1]


@pytest.mark.parametrize("stage_config", ["[1]", "{", '{"data_path": null}', '{"data_path": 7}'])
def test_odd_facts_in_a_file_are_no_error(make_vlm, tmp_path, stage_config):
    from model.weights import save_weights

    for name, step in [("a", "²x"), ("b", "²")]:
        facts = {"stage_config": stage_config, "step": step, "val_loss": "`"}
        save_weights(make_vlm(), tmp_path / f"{name}.safetensors", facts)
    assert all(about(found, "en") for found in find_weights([tmp_path]))


def test_what_a_file_says_of_itself_is_no_markdown():
    bad = weight("/a/![x`](https:example.org).safetensors", data="`![x](//example.org)`\n# x", val_loss="` :red[x]")
    told = about(bad, "en")[0] + file_name(bad)
    outside = "".join(told.split("`")[::2])  # of the code spans
    assert told.count("`") == 8 and "example" not in outside and "red" not in outside and "\n" not in told


# editing, and two at once


def test_a_question_asked_otherwise_keeps_its_pictures_and_nothing_of_the_answer():
    turn = a_turn("one")
    turn.suggestions = ["two", "three"]
    anew = turn.asked_anew("two")
    assert (anew.question, anew.pictures, anew.credit) == ("two", turn.pictures, turn.credit)
    assert anew.replies == [] and anew.suggestions == ["three"]
    with pytest.raises(Refused, match="too_many_characters"):
        turn.asked_anew("x" * (MAX_CHARACTERS + 1))


def test_each_of_two_hears_its_own_answers():
    turns = [a_turn("one"), Turn("two", replies=[Reply(None, Options(), answer=answered("both"))]), Turn("three")]
    said = [
        [message["content"][0]["text"] for message in conversation(turns, side)[0] if message["role"] == "assistant"]
        for side in (0, 1)
    ]
    assert said == [["one", "both"], ["second one", "both"]]


# taken home


def test_json_holds_the_conversation_and_its_pictures():
    (facts,) = json.loads(as_json([a_turn(HOSTILE)]))["conversation"]
    assert facts["question"] == HOSTILE and [answer["text"] for answer in facts["answers"]] == [
        HOSTILE, "second " + HOSTILE
    ]  # fmt: skip
    assert facts["answers"][0]["settings"]["seed"] == 3
    picture = Image.open(BytesIO(base64.b64decode(facts["pictures"][0].split(",")[1])))
    assert picture.size == make_picture(1).size


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_taken_home_shows_everything_and_runs_nothing(language):
    tags, texts = [], []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            tags.append((tag, dict(attributes)))

        def handle_data(self, text):
            texts.append(text)

    page = as_html([a_turn(HOSTILE)], language).decode()
    Reader().feed(page)
    assert {tag for tag, _ in tags} <= TAGS
    assert all(not name.startswith("on") for _, attributes in tags for name in attributes)
    assert [attributes["src"][:16] for tag, attributes in tags if tag == "img"] == ["data:image/jpeg;"]
    assert texts.count(HOSTILE) == 3 and "second " + HOSTILE in texts  # credit, question, answer: as they were typed
    policy = [attributes["content"] for tag, attributes in tags if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


# its files


def test_the_page_takes_no_html():
    """But for its style, which is a file of the demo."""
    style = (ROOT / "scripts/demo/page.css").read_text()
    assert "script" not in style and "<" not in style
    for path in [ROOT / "web_demo.py", *(ROOT / "scripts/demo").glob("*.py")]:
        source = path.read_text()
        if path.stem == "view":
            assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
            (style,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "STYLE"]
            assert ast.unparse(style) == "Path(__file__).with_name('page.css')" and source.count("STYLE") == 1
        if path.stem == "web_demo":
            assert source.count("STYLE") == 2  # imported, and shown
            source = source.replace("st.html(STYLE)", "")
        for word in ("unsafe-allow", "unsafe_", "st.markdown", "st.write", "st.html", "components"):
            assert word not in source, path


def test_screenshots_are_small_files():
    shots = list((ROOT / "docs").glob("demo_*.png"))
    assert shots and all(shot.stat().st_size < 300_000 for shot in shots)
