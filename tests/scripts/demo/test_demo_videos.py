"""Videos sent to the demo: seen as eval_vlm.py sees them, shown as a strip, refused in a sentence."""

import io
import sys

import pytest
import torch
from PIL import Image

from helpers.models import IMAGE_SIZE, enliven
from helpers.videos import make_video, numbered
from model.inference.answerer import Answerer
from model.inference.attention_map import look
from model.video import open_video
from model.views import Frames, Sight
from model.weights import save_weights
from scripts.demo.chat import Reply, Turn, conversation, new_turn
from scripts.demo.limits import Refused, read_upload
from scripts.demo.remote import _as_weight
from scripts.demo.text import LANGUAGES, translate

pytest.importorskip("av", reason="videos are read with the package av: pip install -r requirements/video.txt")

SIGHT = Sight(IMAGE_SIZE)


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> bytes:
    return make_video(tmp_path_factory.mktemp("film") / "a.mp4", numbered(24), rate=2).read_bytes()


def refusal(content: bytes, sight: Sight = SIGHT) -> str:
    with pytest.raises(Refused) as raised:
        read_upload(content, sight)
    assert all(translate(language, raised.value.key) for language in LANGUAGES)
    return raised.value.key


def test_a_video_is_seen_as_in_the_terminal_and_shown_as_a_strip(film):
    taken = read_upload(film, SIGHT)
    wanted = open_video(film, 8, SIGHT.square)
    assert isinstance(taken.seen, Frames) and taken.seen.times == wanted.times
    assert [a.tobytes() for a in taken.seen.pictures] == [b.tobytes() for b in wanted.pictures]
    strip = Image.open(io.BytesIO(taken.shown))
    assert strip.format == "JPEG" and strip.size == (8 * 128, 64)


def test_what_cannot_be_seen_is_said(film, monkeypatch):
    assert refusal(film[: len(film) // 2]) == "no_video"
    assert refusal(film, Sight(IMAGE_SIZE, frames=0)) == "no_videos"
    assert _as_weight({"id": "served", "image_size": 224}, "http://x").sight.frames == 0
    monkeypatch.setitem(sys.modules, "av", None)
    assert refusal(film) == "no_video_package"


def test_a_video_takes_part_in_a_conversation(film, make_vlm, tmp_path, picture):
    """Beside a picture, with a map of attention over the strip."""
    save_weights(enliven(make_vlm()), tmp_path / "weights.safetensors")
    answerer = Answerer.from_weight(tmp_path / "weights.safetensors", device="cpu", dtype="float32")
    file = io.BytesIO()
    picture(1).save(file, "PNG")
    first = new_turn([], "What happens?", [film, file.getvalue()], SIGHT)
    first.replies.append(Reply(None, None))
    messages, shown = conversation([first, Turn("And then?")])
    prompt = answerer.prompt(messages, shown)
    assert len(prompt.pictures) == 9 and prompt.cuts[0].headings[:2] == ("0:00", "0:02")
    looked = look(answerer.model, prompt, [5, 6, 7])
    of_film, of_picture = looked.over_pictures()
    rows, columns = looked.grid
    assert of_film.shape == (rows, 8 * columns) and of_picture.shape == (rows, columns)
    assert torch.equal(of_film[:, columns : 2 * columns], looked.maps()[1])
