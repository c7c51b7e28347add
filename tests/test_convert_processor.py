"""The processor that ships in a `transformers` folder: what pipelines and chat templates call, ours underneath."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, TextStreamer, pipeline

from model.processing import IMAGE_TAG, VLMProcessor, load_tokenizer, open_picture
from scripts.export_formats import Source, export_transformers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tower_folder):
    from conftest import SIZES

    from model.weights import build_vlm

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("converted")
    export_transformers(Source(build_vlm(SIZES, tower_folder).eval(), load_tokenizer(), "tiny"), folder)
    return folder


@pytest.fixture(scope="module")
def shipped(folder):
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture
def saved(tmp_path, picture):
    """saved(number): the path of a picture."""

    def save(number: int, mode: str = "RGB", **options):
        path = tmp_path / f"{number}.png"
        picture(number, size=40).convert(mode).save(path, **options)
        return str(path)

    return save


def inputs_of(shipped, messages, **options):
    return shipped.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


def test_messages_are_rendered_as_in_training(shipped, processor, saved):
    paths = [saved(1), saved(2)]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "First"}, {"type": "image", "path": paths[0]},
                                     {"type": "image", "url": paths[1]}, {"type": "text", "text": " 和 @@"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        {"role": "user", "content": [{"type": "text", "text": "<image> <|im_end|> typed"}]},
    ]  # fmt: skip
    found = inputs_of(shipped, turns, add_generation_prompt=True)
    expected = processor.prompts([(turns, [open_picture(path) for path in paths])])
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert int(found["image_mask"].sum()) == 8  # what was typed stays text


def test_prefilled_answer_is_left_open(shipped, processor):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It is"}]
    found = inputs_of(shipped, turns, continue_final_message=True)["input_ids"][0].tolist()
    whole = processor.render(turns).input_ids
    assert found == whole[: len(found)] and len(whole) - len(found) == 1 + len(processor.new_line)


def test_text_and_pictures_apart(shipped, saved):
    """The older way: the template's text, and the pictures beside it."""
    turns = [[{"role": "user", "content": [{"type": "image", "path": saved(n)}, {"type": "text", "text": f"n {n}"}]}]
             for n in (1, 2)]  # fmt: skip
    texts = shipped.apply_chat_template(turns, add_generation_prompt=True)
    assert texts[0] == f"<|im_start|>user\n{IMAGE_TAG}n 1<|im_end|>\n<|im_start|>assistant\n"
    whole = inputs_of(shipped, turns, add_generation_prompt=True)
    for images in ([saved(1), saved(2)], [[Image.open(saved(1))], [saved(2)]]):
        apart = shipped(images=images, text=texts)
        assert all(torch.equal(apart[name], value) for name, value in whole.items())


@pytest.mark.parametrize("source", ["path", "pil"])
def test_pictures_are_opened_as_in_training(shipped, processor, saved, source):
    path = saved(3, "RGBA")
    opened = Image.open(path)
    opened.putalpha(100)
    opened.save(path)
    part = {"type": "image", "path": path} if source == "path" else {"type": "image", "image": Image.open(path)}
    pixels = inputs_of(shipped, [{"role": "user", "content": [part]}])["pixel_values"][0, 0]
    assert torch.equal(pixels, processor.pixels(open_picture(path)))
    assert pixels.float().mean() > 140  # transparent stands on white


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(text=f"{IMAGE_TAG} what?"), "holds 1 <image> but there are 0 pictures"),
        (lambda p: p(text="what?", images=[Image.new("RGB", (9, 9))]), "1 picture too many"),
        (lambda p: inputs_of(p, [{"role": "user", "content": [{"type": "image"}]}]), "holds no picture"),
        (lambda p: inputs_of(p, [{"role": "user", "content": f"{IMAGE_TAG} x"}]), "but there are 0 pictures"),
        (lambda p: inputs_of(p, [{"role": "cat", "content": "x"}]), "one of system, user, assistant"),
        (lambda p: p.apply_chat_template([{"role": "user", "content": "x"}], tokenize=True, return_tensors="np"), "np"),
    ],
)
def test_mistakes(shipped, call, message):
    with pytest.raises(ValueError, match=message):
        call(shipped)


def test_pipeline_and_streamer(folder, shipped, saved, caplog):
    asked = [{"role": "user", "content": [{"type": "image", "path": saved(1)}, {"type": "text", "text": "\nWhat?"}]}]
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    answer = pipe(text=asked, max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    assert "is not supported" not in caplog.text
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs, pieces = inputs_of(shipped, asked, add_generation_prompt=True), []
    streamer = TextStreamer(shipped.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: pieces.append(text)
    model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert "".join(pieces) == answer and answer


def test_saved_again_it_is_the_same(folder, shipped, tmp_path):
    """save_pretrained, as fine-tuning elsewhere does it."""
    shipped.save_pretrained(tmp_path / "again")
    again = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert isinstance(again.renderer, object) and again.image_tokens == 4 and again.image_size == 32
    assert VLMProcessor(again.tokenizer).encode("cat") == VLMProcessor(shipped.tokenizer).encode("cat")
