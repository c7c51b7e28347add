"""The proof of a GGUF folder: llama.cpp loads it in a process of its own and must answer what our own model answered.

    python scripts/export/gguf_proof.py FOLDER REFERENCE

llama.cpp of October 2026 puts CLIP's class token behind the patches and then drops the first token, so that the model
reads patches 2 to 196 and the class token (its issue 25814, open in pull request 25844). Nothing in a file cures all of
that; a table of positions that is rolled by one place gives each patch its own position again. So there are two
references, ours and ours with the tokens taken in that wrong way, and two files. The proof takes the file whose answers
are those of its reference, deletes the other, and counts how many answers llama.cpp's way changes.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from model.command_line import CommandLine
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.pictures import open_picture
from model.vision_encoder import leading_tokens
from scripts.export.llama_cpp import MODEL, ROLLED, SIGHT, LlamaCpp, Reply, Settings, need_xllamacpp
from scripts.export.proof import MAX_NEW_TOKENS, PICTURES, draw_picture, own_reader, prompts

AS_TRAINED, CLASS_LAST = "as_trained", "class_token_last"
FILES = {AS_TRAINED: SIGHT, CLASS_LAST: ROLLED}
QUESTIONS = ("\nWhat do you see?", "\n图里有什么？", "\nHow many things are there?", "\nIs it red, at 100 % or 7?")
TEXTS = (  # that tokenizers cut in ways of their own
    "It's 1234567 cats.\n\n\n  @@ x", "me@here.org: @@@@@  @'s @", "你好，世界！１２３ 四五", "🙂👨‍👩‍👧★…—“”",
    "café\t naïve\r\n日本語 한국어 العربية", "x = {'a': [1, 2.5]}  # 100 %",
)  # fmt: skip
FURTHER_PICTURES = 4  # each is asked all QUESTIONS: twenty conversations with those of proof.py
TOP = 20  # first tokens whose log probabilities are compared
TOLERANCE = 0.05  # of a log probability, float32
FIRST_WORDS = 0.95  # of the answers that begin with the same token, in other numbers


def conversations(sees: bool, folder: Path) -> list[list[dict]]:
    """Those of proof.py, and enough further ones for a share of FIRST_WORDS to be told."""
    asked = prompts(sees, folder)
    for number in range(FURTHER_PICTURES):
        for question in QUESTIONS:
            content = [{"type": "text", "text": question if sees else f"{question.strip()} {number}"}]
            if sees:
                content.insert(0, {"type": "image", "path": str(folder / f"further{number}.png")})
            asked.append([{"role": "user", "content": content}])
    return asked


def write_references(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, sees: bool) -> None:
    """What the project's own model answers, in its own way and in llama.cpp's, and the pictures that it saw."""
    sizes = PICTURES | {f"further{number}.png": (256, 192) for number in range(FURTHER_PICTURES)}
    for seed, (name, size) in enumerate(sizes.items()):
        draw_picture(size, seed).save(folder / name)
    _write(model, tokenizer, folder, sees, AS_TRAINED)
    if sees and leading_tokens(model.vision_encoder.config):
        with class_token_last(model):
            _write(model, tokenizer, folder, sees, CLASS_LAST)


@torch.no_grad()
def _write(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, sees: bool, way: str) -> None:
    """One reference: `way`.json and .safetensors, with the log probabilities of the first tokens."""
    read, first, answers = own_reader(model, tokenizer), [], []
    for messages in conversations(sees, folder):
        inputs = read(messages)
        length = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        probabilities = torch.cat(output.logits).log_softmax(-1)  # [new tokens, vocabulary]
        first.append(probabilities[0])
        ids, (best, second) = output.sequences[0, length:], probabilities.topk(2).values.T
        texts = [tokenizer.decode(ids[:count], skip_special_tokens=True) for count in range(len(ids) + 1)]
        answers.append({
            "prompt": str(messages), "prompt_tokens": length, "text": texts[-1], "first": int(ids[0]),
            "steps": [[len(_whole(text)), gap] for text, gap in zip(texts, (best - second).tolist(), strict=False)],
        })  # fmt: skip
    save_file({"first": torch.stack(first)}, folder / f"{way}.safetensors")
    cut = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    (folder / f"{way}.json").write_text(json.dumps({"sees": sees, "answers": answers, "cut": cut}))


@contextmanager
def class_token_last(model: MiniMindForCausalLM) -> Iterator[None]:
    """The model reads as llama.cpp does: the first patch is dropped, and the class token follows the last one."""

    def roll(tower, inputs, output):
        output.last_hidden_state = output.last_hidden_state.roll(-1, dims=1)
        return output

    hook = model.vision_encoder.register_forward_hook(roll)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Comparison:
    """What llama.cpp answered with a file, beside a reference."""

    way: str
    replies: list[Reply]
    expected: list[dict]  # as _write has them
    other_tokens: list[str]  # those of TEXTS that llama.cpp cuts otherwise
    difference: float  # the largest of a log probability of a first token

    def count(self, alike: Callable[[Reply, dict], bool]) -> int:
        return sum(map(alike, self.replies, self.expected))


def same_text(reply: Reply, expected: dict) -> bool:
    return _whole(reply.text) == _whole(expected["text"])


def same_or_tie(reply: Reply, expected: dict) -> bool:
    """Whether they are the same, or part where our model holds two tokens for equally likely, within TOLERANCE.

    expected["steps"]: for each token the characters before it, and how much likelier than the second one it is.
    """
    if same_text(reply, expected):
        return True
    alike = len(os.path.commonprefix([reply.text, expected["text"]]))
    last = max(characters for characters, _ in expected["steps"] if characters <= alike)
    return min(gap for characters, gap in expected["steps"] if characters == last) <= TOLERANCE


def _whole(text: str) -> str:
    """Without the character that a cut answer leaves unfinished, which llama.cpp does not tell."""
    return text.rstrip("\ufffd")


def same_first(reply: Reply, expected: dict) -> bool:
    if not reply.token_ids:
        return reply.text[:1] == expected["text"][:1]
    return reply.token_ids[0] == expected["first"]


def compare(folder: Path, reference: Path, way: str) -> Comparison:
    """Ask llama.cpp all that the reference was asked."""
    facts = json.loads((reference / f"{way}.json").read_text())
    expected = load_file(reference / f"{way}.safetensors")["first"]
    engine, replies, differences = LlamaCpp(folder, Settings(exact=True, sight=FILES[way])), [], []
    for number, messages in enumerate(conversations(facts["sees"], reference)):
        pictures = [open_picture(part["path"]) for part in messages[0]["content"] if part["type"] == "image"]
        reply = engine.ask(messages, pictures, MAX_NEW_TOKENS, TOP)
        differences += [abs(float(expected[number, token]) - value) for token, value in reply.first.items()]
        replies.append(reply)
    other = [text for text, ids in zip(TEXTS, facts["cut"], strict=True) if engine.tokens(text) != ids]
    return Comparison(way, replies, facts["answers"], other, max(differences, default=torch.inf))


def examine(folder: Path, reference: Path) -> dict:
    """The comparison with the file that fits, which is SIGHT afterwards, as what result.json holds."""
    ways = [way for way in FILES if (reference / f"{way}.json").is_file()]
    found = min((compare(folder, reference, way) for way in ways), key=lambda one: one.difference)
    if len(ways) > 1:
        (folder / FILES[found.way]).replace(folder / SIGHT)
        (folder / ROLLED).unlink(missing_ok=True)
    trained = json.loads((reference / f"{AS_TRAINED}.json").read_text())["answers"]
    return {
        "way": found.way if len(ways) > 1 else None,
        "answers": len(found.replies),
        "same_texts": found.count(same_text),
        "same_or_tie": found.count(same_or_tie),
        "same_first": found.count(same_first),
        "as_trained": sum(map(same_text, found.replies, trained)),
        "difference": found.difference,
        "other_tokens": found.other_tokens + [
            ours["prompt"] for reply, ours in zip(found.replies, found.expected, strict=True)
            if reply.prompt_tokens != ours["prompt_tokens"]
        ],
        "texts": [[reply.text, ours["text"]] for reply, ours in zip(found.replies, found.expected, strict=True)],
    }  # fmt: skip


def prove_gguf(folder: Path, reference: Path, vision_model: str | None = None, trains: bool = False) -> dict:
    """Run this file in a fresh process; returns what the manifest keeps.

    Raises:
        UserError: llama.cpp does not load the folder, cuts texts into other tokens, or answers otherwise: in float32
            any answer, in other numbers more than one first word in twenty.
    """
    command = list(map(str, [sys.executable, __file__, folder.resolve(), reference.resolve()]))
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError(f"llama.cpp does not load the converted folder:\n{process.stderr[-2000:]}")
    found = json.loads((reference / "result.json").read_text())
    if other := found["other_tokens"]:
        raise UserError(
            f"llama.cpp cuts {other[0]!r:.200} into other tokens: the tokenizer splits texts in a way that it does "
            "not know"
        )
    full = found["numbers"] == "F32"
    if full and not found["difference"] <= TOLERANCE:
        raise UserError(f"llama.cpp's log probabilities differ by {found['difference']:.2g}, more than {TOLERANCE}")
    if full and found["same_or_tie"] < found["answers"]:
        other = [pair for pair in found["texts"] if pair[0] != pair[1]]
        raise UserError(f"llama.cpp answers {other[0][0]!r} and not {other[0][1]!r}")
    if found["same_first"] < FIRST_WORDS * found["answers"]:
        raise UserError(
            f"only {found['same_first']} of {found['answers']} answers of llama.cpp begin with the same word, less "
            f"than {FIRST_WORDS:.0%}: take a finer --dtype"
        )
    return _manifest(found)


def _manifest(found: dict) -> dict:
    full = found["numbers"] == "F32"
    same, what = (
        found["same_texts" if full else "same_first"],
        "the same greedy text" if full else "the same first word",
    )
    if full and same < found["answers"]:
        what += f" (but for ties within {TOLERANCE})"
    proved = (
        f"llama.cpp (xllamacpp {found['xllamacpp']}), from a fresh process: {what} in {same} of {found['answers']} "
        f"answers, largest difference of a log probability {found['difference']:.2g}"
    )
    if found["way"] == CLASS_LAST:
        proved += (
            f". It reads the class token in place of the first patch (its issue 25814; {SIGHT} has its positions "
            f"rolled for that), which leaves {found['as_trained']} of {found['answers']} answers as trained, to the "
            "last word"
        )
    keys = ("xllamacpp", "answers", "same_texts", "same_first", "as_trained", "difference")
    positions = {CLASS_LAST: "rolled by -1", AS_TRAINED: "as trained", None: None}[found["way"]]
    return {"proved": proved, "llama_cpp": {key: found[key] for key in keys} | {"position_embd": positions}}


def numbers_of(path: Path) -> str:
    """The type of a file's embeddings of tokens."""
    from gguf import GGUFReader

    return next(tensor.tensor_type.name for tensor in GGUFReader(path).tensors if tensor.name == "token_embd.weight")


if __name__ == "__main__":
    parser = CommandLine(__doc__)
    parser.add_argument("folder", type=Path, help="the conversion")
    parser.add_argument("reference", type=Path, help="folder that write_references has filled")
    options = parser.parse_args()
    for path in (options.folder / MODEL, options.reference / f"{AS_TRAINED}.json"):
        if not path.exists():
            parser.error(f"{path} does not exist")
    outcome = examine(options.folder, options.reference)
    outcome |= {"numbers": numbers_of(options.folder / MODEL), "xllamacpp": need_xllamacpp().__version__}
    (options.reference / "result.json").write_text(json.dumps(outcome))
