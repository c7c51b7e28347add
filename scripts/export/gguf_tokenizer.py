"""A tokenizer as llama.cpp's: its tokens, merges, template, and the one of its ways of splitting that is the same."""

import json
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from model.messages import UserError
from model.tokenizer_files import special_ids

if TYPE_CHECKING:
    import gguf

GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
BYTES = {**GPT2, "use_regex": False}
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")  # fmt: skip
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# llama.cpp's name to the steps of a tokenizer.json that split a text so.
SPLITS = {
    "gpt-2": [GPT2],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT2],
    "qwen2": [{"type": "Split", "pattern": {"Regex": QWEN2}, "behavior": "Isolated", "invert": False}, BYTES],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}, BYTES],
}


def add_tokenizer(writer: "gguf.GGUFWriter", tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    """All of it. vocab_size: rows of the embeddings, of which the last may stand for no text.

    Raises:
        UserError: it splits or merges texts in a way that llama.cpp does not know.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    name, apart = way_of_splitting(content)
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        kind = content["model"]["type"] + (" with bytes as a fallback" if content["model"].get("byte_fallback") else "")
        raise UserError(
            f"--to gguf: this writes tokenizers of GPT-2's kind, and this one is {kind}: --to llava keeps it"
        )
    texts, kinds = _tokens(content, vocab_size, apart)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    merges = content["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    special = special_ids(tokenizer)
    if special["bos_token_id"] is not None:
        writer.add_bos_token_id(special["bos_token_id"])
    writer.add_eos_token_id(special["eos_token_id"])
    writer.add_pad_token_id(special["pad_token_id"])
    writer.add_add_bos_token(False)  # where a conversation begins with one, the template writes it
    writer.add_add_eos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def way_of_splitting(content: dict) -> tuple[str, set[str]]:
    """llama.cpp's name for how a tokenizer.json splits texts, and the single characters that it takes apart before.

    Raises:
        UserError: a way that is not in SPLITS.
    """
    steps = _steps(content["pre_tokenizer"])
    first = next((number for number, step in enumerate(steps) if not _character_apart(step)), len(steps))
    apart = {text for step in steps[:first] for text in step["pattern"].values()}
    for name, wanted in SPLITS.items():
        pairs = zip(wanted, steps[first:], strict=False)
        if len(steps) - first == len(wanted) and all(wish.items() <= step.items() for wish, step in pairs):
            return name, apart
    raise UserError(
        f"--to gguf: the tokenizer splits texts in a way that has no name here ({json.dumps(steps)[:300]}): known are "
        f"{', '.join(SPLITS)}; llama.cpp's own convert_hf_to_gguf.py may know it, for the folder of --to llm"
    )


def _steps(step: dict | None) -> list[dict]:
    if step is None:
        return []
    return step["pretokenizers"] if step["type"] == "Sequence" else [step]


def _character_apart(step: dict) -> bool:
    """Whether a step does nothing but part one character from its neighbours, as ours does `@`."""
    if step["type"] != "Split" or step["behavior"] != "Isolated" or step["invert"]:
        return False
    (text,) = step["pattern"].values()
    return len(text) == 1 and text.isascii() and (text.isalnum() or text in "@#%&=_~")  # means itself in a pattern


def _tokens(content: dict, vocab_size: int, apart: set[str]) -> tuple[list[str], list[int]]:
    """Every token's text and kind.

    A character that stands apart is told as one that a user defined: those are looked for before a text is split, and
    that is what standing apart is.
    """
    import gguf

    texts = {number: text for text, number in content["model"]["vocab"].items()}
    kinds = {number: gguf.TokenType.USER_DEFINED for number, text in texts.items() if text in apart}
    for token in content["added_tokens"]:
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    unused = set(range(vocab_size)) - texts.keys()
    texts |= {number: f"[unused{number}]" for number in unused}
    kinds |= dict.fromkeys(unused, gguf.TokenType.UNUSED)
    return [texts[number] for number in range(vocab_size)], [
        int(kinds.get(number, gguf.TokenType.NORMAL)) for number in range(vocab_size)
    ]
