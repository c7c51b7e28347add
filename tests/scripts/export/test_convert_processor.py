"""The processor that ships in a `transformers` folder: what pipelines and chat templates call, ours underneath."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig, TextStreamer, pipeline

from helpers.models import SIZES, enliven
from model.messages import UserError
from model.pictures import open_picture
from model.processing import IMAGE_TAG, VLMProcessor
from model.tokenizer_files import load_tokenizer
from model.weights import build_vlm
from scripts.export.formats import FORMATS, Source, export_transformers
from scripts.export.gguf_sight import check_sight

BLACK = Image.new("RGB", (9, 9))


@pytest.fixture(scope="module")
def enlivened(tmp_path_factory, tower_folder):
    """A folder whose model says something else at each picture."""
    folder = tmp_path_factory.mktemp("enlivened")
    export_transformers(Source(enliven(build_vlm(SIZES, tower_folder)).eval(), load_tokenizer(), "tiny"), folder)
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


def words(pipe, count: int) -> dict:
    """Not as max_new_tokens=..., over which transformers 5.4's own pipeline scolds itself."""
    return {"generation_config": GenerationConfig.from_dict({**pipe.model.generation_config.to_dict(),
                                                             "max_new_tokens": count})}  # fmt: skip


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
    whole = processor.render(turns).input_ids.tolist()
    assert found == whole[: len(found)] and len(whole) - len(found) == 2


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
        (lambda p: inputs_of(p, [{"role": "user", "content": "x"}], tools=[{"name": "x"}]), "tools .* is not offered"),
        (lambda p: inputs_of(p, [{"role": "user", "content": "x"}], chat_template="x"), "chat_template is used with"),
        (lambda p: p(text="what?", padding="max_length"), "padding 'max_length' is not offered"),
        (lambda p: p(text="what?", images_kwargs={"do_resize": True}), "images_kwargs .* is not offered"),
        (lambda p: p(text="what?", truncation="only_second", max_length=3), "truncation 'only_second' is not"),
        (lambda p: p(text=f"a{IMAGE_TAG}b", images=[BLACK], truncation=True, max_length=4), "a part of a picture"),
        (
            lambda p: inputs_of(
                p, [{"role": "user", "content": "x" * 99}], add_generation_prompt=True, truncation=True, max_length=9
            ),
            "lose the opening of the answer",
        ),
        (lambda p: p(text=IMAGE_TAG, images=np.zeros((9, 9, 2))), r"shape \(9, 9, 2\) is no picture"),
        (lambda p: p(text=IMAGE_TAG, images=torch.zeros(3, 9, 9) - 1), "holds -1.0 to -1.0"),
        (lambda p: p(text=IMAGE_TAG, images=np.full((9, 9, 3), 256)), "holds 256 to 256"),
    ],
)
def test_mistakes(shipped, call, message):
    with pytest.raises(ValueError, match=message):
        call(shipped)


@pytest.mark.parametrize("kind", ["numpy", "torch", "floats", "bfloat16", "behind", "one array"])
def test_arrays_are_pictures(shipped, processor, picture, kind):
    """uint8 or 0..1, colours behind as NumPy has them or in front as torch has them."""
    pictures = [picture(1, size=40), picture(2, size=40)]
    arrays = [np.asarray(one) for one in pictures]
    if kind in ("torch", "floats", "bfloat16"):
        arrays = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    if kind in ("floats", "bfloat16"):
        arrays = [(array / 255).to(torch.float32 if kind == "floats" else torch.bfloat16) for array in arrays]
    if kind == "behind":
        arrays = [np.moveaxis(array, 2, 0) for array in arrays]
    found = shipped(text=IMAGE_TAG * 2, images=np.stack(arrays) if kind == "one array" else arrays)["pixel_values"][0]
    part = {"type": "image", "image": arrays[0]}
    if kind != "bfloat16":  # which rounds
        assert torch.equal(found, torch.stack([processor.pixels(one) for one in pictures]))
    assert (found[0].float() - processor.pixels(pictures[0])).abs().max() <= 1
    assert torch.equal(inputs_of(shipped, [{"role": "user", "content": [part]}])["pixel_values"][0, 0], found[0])


@pytest.mark.parametrize("shape", [(9, 9), (1, 9, 9), (9, 9, 1)])
def test_grey_arrays(shipped, processor, shape):
    grey = np.arange(81, dtype=np.uint8)
    found = shipped(text=IMAGE_TAG, images=grey.reshape(shape))["pixel_values"][0, 0]
    assert torch.equal(found, processor.pixels(open_picture(Image.fromarray(grey.reshape(9, 9)))))


def test_truncation_cuts_the_end(shipped, processor, saved):
    turns = [{"role": "user", "content": [{"type": "image", "path": saved(1)}, {"type": "text", "text": "What?" * 9}]},
             {"role": "assistant", "content": "a cat"}]  # fmt: skip
    whole = inputs_of(shipped, turns)
    for options in (
        {"truncation": True, "max_length": 15},
        {"processor_kwargs": {"truncation": True, "max_length": 15}},
    ):
        found = inputs_of(shipped, [turns, turns], **options)
        assert torch.equal(found["input_ids"], whole["input_ids"][:, :15].expand(2, -1))
        assert found["image_mask"].shape == (2, 15) and found["pixel_values"].shape[:2] == (2, 1)
    assert torch.equal(inputs_of(shipped, turns, max_length=15)["input_ids"], whole["input_ids"])  # as in transformers
    assert shipped(text="a b c d e f", truncation=True, max_length=3)["input_ids"].shape == (1, 3)


def test_mask_of_what_is_to_be_learnt(shipped, processor):
    talks = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}] for answer in ("yes", "a cat")
    ]
    found = inputs_of(shipped, talks, return_assistant_tokens_mask=True)
    assert found["assistant_masks"].shape == found["input_ids"].shape
    for row, talk in enumerate(talks):
        rendered = processor.render(talk)
        learnt = [token for token, trained in zip(rendered.input_ids, rendered.trained, strict=True) if trained]
        assert found["input_ids"][row][found["assistant_masks"][row].bool()].tolist() == learnt


def test_pipeline_in_batches(saved, enlivened):
    """Rows with one picture, two and none, of different lengths, answer as they do one by one."""
    talks = [
        [{"role": "user", "content": [*({"type": "image", "path": saved(n)} for n in numbers),
                                      {"type": "text", "text": "What " * (1 + len(numbers))}]}]
        for numbers in ((1,), (2, 3), (), (4,), (5, 6, 7))
    ]  # fmt: skip
    pipe = pipeline("image-text-to-text", model=str(enlivened), trust_remote_code=True)
    options = {"generate_kwargs": words(pipe, 6), "return_full_text": False}

    def answers(talks: list, **more) -> list[str]:
        return [row[0]["generated_text"] for row in pipe(text=talks, **options, **more)]

    single = answers(talks)
    assert len(set(single)) == 5
    assert answers(talks, batch_size=2) == single == answers(talks, batch_size=5)
    assert pipe(text=talks[1], **options)[0]["generated_text"] == single[1]
    assert pipe(images=saved(1), text=f"{IMAGE_TAG}what?", **options)[0]["generated_text"]


def test_pipeline_and_streamer(folder, shipped, saved, caplog):
    asked = [{"role": "user", "content": [{"type": "image", "path": saved(1)}, {"type": "text", "text": "\nWhat?"}]}]
    pipe = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    answer = pipe(text=asked, generate_kwargs=words(pipe, 5), return_full_text=False)[0]["generated_text"]
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


def test_a_model_that_cuts_pictures_does_so_there(tmp_path, tower_folder, picture):
    model = enliven(build_vlm(SIZES, tower_folder, {"tiles": 4})).eval()
    (tmp_path / "cut").mkdir()
    export_transformers(Source(model, load_tokenizer(), "tiny"), tmp_path / "cut")
    shipped = AutoProcessor.from_pretrained(tmp_path / "cut", trust_remote_code=True)
    ours = VLMProcessor.for_config(model.config)
    pictures = [picture(1, size=70), picture(2, size=20)]
    turns = [{"role": "user", "content": [{"type": "image", "image": one} for one in pictures]
              + [{"type": "text", "text": "\nWhat differs?"}]}]  # fmt: skip
    expected = ours.prompts([(turns, pictures)])
    assert expected["pixel_values"].shape[1] == 6
    found = inputs_of(shipped, turns, add_generation_prompt=True)
    text = shipped.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for inputs in (found, shipped(images=pictures, text=text)):
        assert set(inputs) == set(expected)
        for name, value in expected.items():
            assert torch.equal(inputs[name], value), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", trust_remote_code=True).eval()
    assert loaded.config.tiles == 4
    with torch.no_grad():
        assert torch.equal(loaded(**found).logits, model(**expected).logits)
        wanted = model.generate(**expected, max_new_tokens=8, do_sample=False)
        assert torch.equal(loaded.generate(**found, max_new_tokens=8, do_sample=False), wanted)
    pipe = pipeline("image-text-to-text", model=loaded, processor=shipped)
    answer = pipe(text=turns, generate_kwargs=words(pipe, 8), return_full_text=False)[0]["generated_text"]
    assert answer == shipped.tokenizer.decode(wanted[0, expected["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["llava", "minimind"])
def test_formats_without_tiles_refuse_them(kind, tmp_path, tower_folder):
    model = build_vlm(SIZES, tower_folder, {"tiles": 4}).eval()
    with pytest.raises(UserError, match="pictures cut into up to 4 tiles"):
        FORMATS[kind](Source(model, load_tokenizer(), "tiny"), tmp_path / kind)
    with pytest.raises(UserError, match="pictures cut into up to 4 tiles"):
        check_sight(model.config)  # of gguf, whose packages may be missing
