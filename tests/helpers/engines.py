"""Folders for other engines, and whether they say what ours says: what tests/engines asks of each of them."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from helpers.data import make_picture
from model.inference.answerer import Answerer, Options
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.tokenizer_files import load_tokenizer
from scripts.export.formats import Source, export_llava
from scripts.measure.agreement import ENGINES, ask

NEW_TOKENS = 12
NO_CHARACTER = "\ufffd"  # for bytes that are none: some engines write it, some leave it out
HEADS = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # 32 wide: the least that vLLM takes
PICTURE, TWO_AND_TWO = {"type": "image"}, {"type": "text", "text": "What is two and two?"}
CONTENTS = {
    "a picture first": [PICTURE, {"type": "text", "text": "\nWhat is in the picture?"}],
    "in Chinese": [PICTURE, {"type": "text", "text": "\n图里有什么？"}],
    "a picture behind": [{"type": "text", "text": "What is this?\n"}, PICTURE],
    "two pictures": [PICTURE, {"type": "text", "text": " or "}, PICTURE, {"type": "text", "text": ": which?"}],
    "none": [TWO_AND_TWO],
}


def require(name: str) -> None:
    """Skip the module, in one line that says what would install the engine, where it is not there."""
    try:
        ENGINES[name].python  # noqa: B018
    except UserError as error:
        pytest.skip(str(error), allow_module_level=True)


def disagreements(
    name: str, model: MiniMindVLM, folder: Path, contents: Iterable[str] = tuple(CONTENTS)
) -> dict[str, tuple[str, str]]:
    """What our engine says and what the other does, of the folder that is written for it, where these are not the same.

    Raises:
        UserError: the engine does not read the folder.
    """
    exported = folder / "llava"
    exported.mkdir(parents=True)
    export_llava(Source(model, load_tokenizer(), "tiny", engine=name), exported)
    answerer = Answerer(model)
    questions, ours = [], []
    for number, content in enumerate(map(CONTENTS.get, contents)):
        pictures = [make_picture(10 * number + k, size=40) for k in range(content.count(PICTURE))]
        paths = [folder / f"{number}_{k}.png" for k in range(len(pictures))]
        for picture, path in zip(pictures, paths, strict=True):
            picture.save(path)
        messages = [{"role": "user", "content": content}]
        questions.append({"messages": messages, "pictures": list(map(str, paths))})
        prompt = answerer.prompt(messages, pictures)
        ours.append(answerer.stream(prompt, Options(max_new_tokens=NEW_TOKENS)).text)
    assert len(set(ours)) == len(ours), "a model that says the same to everything shows nothing"
    theirs = ask(ENGINES[name], exported, questions, NEW_TOKENS)
    pairs = [tuple(text.replace(NO_CHARACTER, "") for text in pair) for pair in zip(ours, theirs, strict=True)]
    return {asked: pair for asked, pair in zip(contents, pairs, strict=True) if pair[0] != pair[1]}
