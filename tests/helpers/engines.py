"""Folders for other engines, and whether they say what ours says: what tests/engines asks of each of them."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers.data import make_picture
from model.inference.answerer import Answerer, Options
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.tokenizer_files import load_tokenizer
from scripts.export.formats import Source, export_llava
from scripts.measure.apart import ask_folders, python_of

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
        python_of(name)
    except UserError as error:
        pytest.skip(str(error), allow_module_level=True)


def disagreements(name: str, models: Mapping[str, MiniMindVLM], folder: Path) -> dict[str, tuple[str, str]]:
    """What ours says and what the engine says, of folders that are written for it, where that is not the same.

    Raises:
        UserError: the engine does not read one of them.
    """
    folders, ours = {}, {}
    for kind, model in models.items():
        exported = folder / kind / "llava"
        exported.mkdir(parents=True)
        export_llava(Source(model, load_tokenizer(), "tiny", engine=name), exported)
        folders[exported], said = asked_of(model, folder / kind)
        assert len(set(said)) == len(said), f"{kind} says the same to two questions, which shows nothing"
        ours |= {f"{kind}: {content}": text for content, text in zip(CONTENTS, said, strict=True)}
    theirs = [text for texts in ask_folders(name, folders, NEW_TOKENS) for text in texts]
    pairs = {asked: _whole(ours[asked], text) for asked, text in zip(ours, theirs, strict=True)}
    return {asked: pair for asked, pair in pairs.items() if pair[0] != pair[1]}


def asked_of(model: MiniMindVLM, folder: Path) -> tuple[list[dict], list[str]]:
    """Every content of CONTENTS, with pictures that are written into the folder, and what our engine says to it."""
    answerer, questions, said = Answerer(model), [], []
    for number, content in enumerate(CONTENTS.values()):
        # of the size that the tower sees: vLLM scales with torchvision, whose pixels differ in the last of 256 steps
        pictures = [make_picture(10 * number + k) for k in range(content.count(PICTURE))]
        paths = [folder / f"{number}_{k}.png" for k in range(len(pictures))]
        for picture, path in zip(pictures, paths, strict=True):
            picture.save(path)
        messages = [{"role": "user", "content": content}]
        questions.append({"messages": messages, "pictures": list(map(str, paths))})
        said.append(answerer.stream(answerer.prompt(messages, pictures), Options(max_new_tokens=NEW_TOKENS)).text)
    return questions, said


def _whole(*texts: str) -> tuple[str, ...]:
    return tuple(text.replace(NO_CHARACTER, "") for text in texts)
