"""Videos in data: whatever the format names them, they are seen as a view a frame, in training as in a prompt."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.exam.clips import about_videos, out_of_order, shuffled
from dataset.exam.questions import read_questions
from dataset.feature_cache import cache_features
from dataset.options import ReadOptions
from dataset.quarantine import Quarantine
from dataset.readers.opening import read_samples
from dataset.samples import BadSample, DataError
from dataset.vlm_dataset import ConversationDataset
from helpers.data import make_picture, write_jsonl
from helpers.runs import losses, tiny
from helpers.videos import frame_number, make_video, numbered
from model.inference.answerer import Answerer
from model.messages import UserError
from model.processing import VLMProcessor
from model.views import Frames, Sight, Times
from model.weights import read_weights, save_weights
from scripts.data.prepare.first_look import Surveyor
from scripts.tune.rows import read_talks
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM

pytest.importorskip("av", reason="videos are read with the package av: pip install -r requirements/video.txt")

LABELS = ("0:01", "0:03", "0:05", "0:07")  # of four frames of eight seconds
USER, ANSWER = "<video>\nWhat came last?", "a cat"


@pytest.fixture
def place(tmp_path) -> Path:
    """clips/0.mp4 and on, eight numbered frames each, one a second, and a picture among images/."""
    (tmp_path / "clips").mkdir()
    (tmp_path / "images").mkdir()
    for number in range(3):
        make_video(tmp_path / f"clips/{number}.mp4", numbered(8 * number + 8)[-8:], rate=1)
    make_picture(1).save(tmp_path / "images/a.png")
    return tmp_path


@pytest.fixture
def sees_four(tokenizer, processor) -> VLMProcessor:
    return VLMProcessor(tokenizer, processor.image_tokens, processor.image_size, frames=4)


def talk(user: str = USER) -> list[dict]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": ANSWER}]


def write(place: Path, *records: dict) -> Path:
    return write_jsonl(place / "clips.jsonl", list(records))


def shown_text(rendered: object, processor: VLMProcessor) -> str:
    """The words of a row, with an @ for each span."""
    pieces, spans = [], 0
    for token, placeholder in zip(rendered.input_ids.tolist(), rendered.image_mask.tolist(), strict=True):
        if not placeholder:
            pieces.append(processor.tokenizer.decode([token]))
        elif spans % processor.image_tokens == 0:
            pieces.append("@")
        spans += placeholder
    return "".join(pieces)


LLAVA = [{"from": "human", "value": USER}, {"from": "gpt", "value": ANSWER}]
PARTS = [{"type": "video"}, {"type": "text", "text": "What came last?"}]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": talk()}, {"conversations": LLAVA}, {"messages": talk()},
        {"messages": [{"role": "user", "content": PARTS}, talk()[1]]}, {"messages": talk("What came last?")},
        {"texts": [{"user": USER, "assistant": ANSWER}]}, {"question": "What came last?", "answer": ANSWER},
        {"text": ANSWER},
    ],
    ids=["minimind", "llava", "messages", "parts", "without_tag", "finevision", "questions", "captions"],
)  # fmt: skip
@pytest.mark.parametrize("field", ["video", "videos"])
def test_every_format_may_name_a_video(place, record, field, sees_four):
    named = "clips/1.mp4" if field == "video" else ["clips/1.mp4"]
    (sample,) = read_samples(write(place, {field: named, **record}))
    assert sample.pictures == (place / "clips/1.mp4",) and field not in sample.extra
    data = ConversationDataset([sample], sees_four, 512)
    said = shown_text(data.rendered(0), sees_four)
    assert "".join(f"{label}@" for label in LABELS) in said and said.count("@") == 4 and "video" not in said
    (row,) = [data[0]]
    assert len(row.pictures) == 4 == len(sample.open_shown(Sight(64, frames=4)).pop().pictures)
    want = [sees_four.pixels(picture) for picture in numbered(16)[8:][1::2]]
    assert all((a.float() - b.float()).abs().mean() < 12 for a, b in zip(row.pictures, want, strict=True))


def test_pictures_and_videos_stand_where_their_tags_do(place, sees_four):
    record = {"image": "a.png", "video": ["clips/0.mp4", "clips/2.mp4"],
              "conversations": talk("<video> then <image> then <video>")}  # fmt: skip
    (sample,) = read_samples(write(place, record))
    assert [path.name for path in sample.pictures] == ["0.mp4", "a.png", "2.mp4"]
    said = shown_text(ConversationDataset([sample], sees_four, 512).rendered(0), sees_four)
    film = "".join(f"{label}@" for label in LABELS)
    assert f"{film} then @ then {film}" in said


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"video": "clips/0.mp4", "conversations": talk("What?")}, "holds 0 <video> but the sample has 1 video"),
        ({"video": ["clips/0.mp4"], "conversations": talk("<video><video>")}, "2 <video> but the sample has 1 video"),
        ({"video": "clips/9.mp4", "conversations": talk()}, "9.mp4: the file does not exist"),
        ({"video": "../x.mp4", "conversations": talk()}, "lies outside"),
        ({"video": "https://x.org/a.mp4", "conversations": talk()}, "is an address: download it"),
        ({"video": "images/a.png", "conversations": talk()}, "has none of the endings .mp4"),
        ({"video": 3, "conversations": talk()}, "'video' is 3: it must be a file name"),
        ({"messages": [{"role": "user", "content": PARTS}, talk()[1]]}, "a content part must be text or an image"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(place, record, reason, processor):
    samples = read_samples(write(place, record))
    with pytest.raises(BadSample, match=f"clips.jsonl:1: .*{reason}"):
        ConversationDataset(samples, processor, 512, Quarantine(strict=True))


def test_a_video_that_is_cut_short_is_found_before_training(place, processor):
    content = make_video(place / "x.mp4", numbered(60, noise=True), options={"movflags": "faststart"}).read_bytes()
    (place / "clips/half.mp4").write_bytes(content[: len(content) // 2])
    samples = read_samples(write(place, {"video": "clips/half.mp4", "conversations": talk()}))
    with pytest.raises(BadSample, match="half.mp4: it (ends after|cannot be read)"):
        ConversationDataset(samples, processor, 512, Quarantine(strict=True))


def test_text_that_says_video_stays_text_where_no_video_is_named(place, processor):
    record = {"image": "a.png", "conversations": talk("<image> <video> is a tag")}
    (sample,) = read_samples(write(place, record))
    assert sample.messages[0]["content"] == "<image> <video> is a tag"


def test_bytes_are_a_video_by_their_content(place, sees_four):
    (sample,) = read_samples(write(place, {"video": "clips/1.mp4", "conversations": talk()}))
    content = (place / "clips/1.mp4").read_bytes()
    by_name, by_content = (
        s.open_views(0, sees_four) for s in (sample, type(sample)("x:1", sample.messages, (content,)))
    )
    assert all(map(torch.equal, by_name, by_content)) and len(by_name) == 4


def test_the_prompt_is_the_row_that_was_trained(place, make_vlm, tmp_path):
    """Ids and pixels of evaluation are those of training, up to the answer."""
    model = make_vlm()
    model.config.frames = 4
    save_weights(model, tmp_path / "weights.safetensors")
    answerer = Answerer.from_weight(tmp_path / "weights.safetensors", device="cpu", dtype="float32")
    assert answerer.processor.sight.frames == 4
    (sample,) = read_samples(write(place, {"video": "clips/2.mp4", "conversations": talk()}))
    row = ConversationDataset([sample], answerer.processor, 512)[0]
    prompt = answerer.prompt(sample.messages[:-1], sample.open_shown(answerer.processor.sight))
    assert prompt.ids == row.rendered.input_ids[: len(prompt.ids)].tolist() and len(prompt.pictures) == 4
    assert all(map(torch.equal, prompt.pictures, row.pictures))


def test_a_stage_trains_on_clips_with_and_without_cached_features(place, tower_folder, monkeypatch):
    """Real stages: the same losses from features in files, and the number of frames goes into the weights."""
    records = [{"video": f"clips/{n % 3}.mp4", "conversations": talk(f"<video>\nNumber {n}?")} for n in range(16)]
    found = {}
    for name, how in (("plain", "none"), ("cached", "pixels")):
        changes = {"data_path": str(write(place, *records)), "save_dir": str(place / name), "frames": 4}
        config = tiny(SFT_VLM, place, tower_folder, max_seq_len=256, cache_features=how, **changes)
        run_stage(config)
        found[name] = losses(config)
        assert read_weights(config.weight_path)[0]["frames"] == 4
    assert found["plain"] == found["cached"] and len(found["plain"]) >= 1


def test_another_number_of_frames_is_another_cache(place, tokenizer, processor, tmp_path):
    """A row rendered, or features encoded, for four frames are not taken for eight."""
    (sample,) = read_samples(write(place, {"video": "clips/1.mp4", "conversations": talk()}))
    prints, places = set(), set()
    for frames in (0, 4, 8):
        seen = VLMProcessor(tokenizer, processor.image_tokens, processor.image_size, frames=frames)
        data = ConversationDataset([sample], seen, 512)
        cache_features(data, torch.as_tensor, "", "pixels", tmp_path / "features", say=lambda _: None)
        prints.add(seen.fingerprint())
        places.add(data.features.folder)
        assert len(data[0].pictures) == (frames or 8)
    assert len(prints) == len(places) == 2  # 0 is 8


def test_frames_shuffled_are_another_order_under_the_same_times():
    frames = Frames(numbered(8), Times(tuple(f"0:0{n}" for n in range(8))))
    mixed = shuffled(frames, "held_out.jsonl:1")
    orders = [frame_number(picture) for picture in mixed.pictures]
    assert sorted(orders) == list(range(8)) and orders != list(range(8)) and mixed.times == frames.times
    assert [frame_number(picture) for picture in shuffled(frames, "held_out.jsonl:1").pictures] == orders
    alike = numbered(1) * 3
    two = Frames([*alike, *numbered(2)[1:]], frames.times)
    for seed in range(40):  # of four orders one looks the same
        assert [frame_number(p) for p in shuffled(two, str(seed)).pictures] != [0, 0, 0, 1]
    assert shuffled(Frames(alike, frames.times), "x").pictures == alike


def test_questions_about_videos_are_known_and_shown_out_of_order(place):
    records = [{"video": "clips/0.mp4", "conversations": talk(), "kind": "in"}] * 2
    questions = read_questions(write(place, *records))
    assert about_videos(questions) and not about_videos([])
    wrong = out_of_order(questions)
    (right,), (mixed,) = (q.sample.open_shown(Sight(128)) for q in (questions[0], wrong[0]))
    assert right.times == mixed.times and right.pictures[0].size == (128, 128)
    order = [picture.tobytes() for picture in right.pictures]
    assert [picture.tobytes() for picture in mixed.pictures] != order
    assert sorted(picture.tobytes() for picture in mixed.pictures) == sorted(order)
    pictured = read_questions(write(place, {"image": "a.png", "conversations": talk("<image>?")}))
    assert not about_videos([*questions, *pictured])


def test_for_people_a_video_is_its_frames_in_a_row(place):
    (sample,) = read_samples(write(place, {"video": "clips/0.mp4", "conversations": talk()}), ReadOptions())
    row = sample.open_picture(0)
    assert row.size == (8 * 128, 64) and frame_number(row.crop((3 * 128, 0, 4 * 128, 64))) == 3
    assert np.asarray(sample.open_picture(0, decode=False)).shape == (64, 128, 3)
    assert json.dumps(sample.extra) == "{}"


def test_who_takes_pictures_alone_refuses_videos(place):
    """TRL's recipes, the judges and what is prepared would else get frames in a row as one picture, unasked."""
    path = write(place, {"video": "clips/0.mp4", "conversations": talk()})
    (sample,) = read_samples(path)
    with pytest.raises(UserError, match="it shows a video, and a recipe takes pictures alone: leave the line out"):
        read_talks(str(path), ReadOptions(), 1, 0)
    with pytest.raises(BadSample, match=r"clips\.jsonl:1: it shows a video, and a judge takes pictures alone"):
        sample.refuse_videos("a judge")
    with pytest.raises(DataError, match="what is prepared takes pictures alone"):
        Surveyor([sample], Quarantine(strict=True)).run()
