"""Tokenizers with their chat templates: the shipped one, a base's own, and the one that travels in a weights file.

Whatever a tokenizer comes from, its template is one that places pictures and marks answers: see model.chat_format.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.chat_format import ChatFormat
from model.config import END_OF_TEXT_ID
from model.messages import UserError

TOKENIZER = "tokenizer"  # its name in a weights file's metadata
TOKENIZER_FILE = "tokenizer.json"
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # of which all is in tokenizer.json
PICTURE_TOKENS = ("<|image_pad|>", "@")  # texts that stand for a picture where a base knows them as one token


def load_tokenizer(folder: str | Path | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, by default the shipped one."""
    return PreTrainedTokenizerFast.from_pretrained(folder or Path(__file__).parent)


def read_tokenizer(path: str | Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer that belongs to weights: in the file's metadata, beside a .pth, or in the base's folder or GGUF.

    path: None, or a file that says nothing of it: the shipped one.

    Raises:
        UserError: a base without a tokenizer, or with one that cannot be read.
    """
    path = Path(path) if path is not None else Path()
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(TOKENIZER)
        return tokenizer_from_text(text) if text else load_tokenizer()
    if path.suffix == ".gguf":
        return _of_base(path.parent, gguf_file=path.name)
    if path != Path() and (path.is_dir() or has_tokenizer(path)):
        return _of_base(path if path.is_dir() else path.parent)
    return load_tokenizer()


def has_tokenizer(path: str | Path) -> bool:
    """Whether a tokenizer lies beside a file, or in a folder."""
    path = Path(path)
    return ((path if path.is_dir() else path.parent) / TOKENIZER_FILE).is_file()


def _of_base(folder: Path, **options: str) -> PreTrainedTokenizerFast:
    if not options and not (folder / TOKENIZER_FILE).is_file():
        raise UserError(f"{folder} holds no {TOKENIZER_FILE}: put the base's own there, its words are its own")
    try:
        reader = PreTrainedTokenizerFast if _is_plain(folder) else AutoTokenizer
        tokenizer = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        raise UserError(f"{folder} holds a tokenizer that cannot be read: {str(error)[:300]}") from error
    return in_our_form(tokenizer)


def _is_plain(folder: Path) -> bool:
    """Whether a folder says that its tokenizer.json is all there is: then nobody asks for code that lies beside it."""
    path = folder / "tokenizer_config.json"
    return path.is_file() and json.loads(path.read_text("utf-8")).get("tokenizer_class") in PLAIN_CLASSES


def in_our_form(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer with a chat template of the same format that places pictures and marks answers.

    Raises:
        UserError: its template cannot be taken apart.
    """
    chat = ChatFormat.of(tokenizer)
    if tokenizer(chat.end, add_special_tokens=False)["input_ids"][-1:] != [_last_control_token(tokenizer, chat.end)]:
        raise UserError(
            f"the tokenizer's chat template closes answers with {chat.end!r}, which ends with none of its control "
            "tokens: nothing could tell where an answer ends. Put the right one into tokenizer.json"
        )
    return tokenizer_from_text(tokenizer_text(tokenizer, chat.template()))


def _last_control_token(tokenizer: PreTrainedTokenizerFast, text: str) -> int | None:
    added = tokenizer.added_tokens_decoder
    return next((number for number, token in added.items() if token.special and text.endswith(token.content)), None)


def tokenizer_text(tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> str:
    """All of a tokenizer in one text, for a weights file. template: instead of the tokenizer's own."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None}  # the last call's, not the tokenizer's
    settings = {name: str(token) for name in SPECIAL if (token := getattr(tokenizer, name)) is not None}
    settings["model_max_length"] = tokenizer.model_max_length
    facts = {TOKENIZER_FILE: content, "settings": settings, "chat_template": template or tokenizer.chat_template}
    return json.dumps(facts, ensure_ascii=False)


def tokenizer_from_text(text: str) -> PreTrainedTokenizerFast:
    """The tokenizer that tokenizer_text wrote. Raises UserError where the text is something else."""
    from tokenizers import Tokenizer

    try:
        facts = json.loads(text)
        backend = Tokenizer.from_str(json.dumps(facts[TOKENIZER_FILE]))
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=facts["chat_template"], clean_up_tokenization_spaces=False,
            **facts["settings"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"the weights carry a tokenizer that cannot be read ({str(error)[:200]})") from error
    except Exception as error:  # what the tokenizers library raises has no class of its own
        raise UserError(f"the weights carry a damaged tokenizer ({str(error)[:200]})") from error


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    """Arguments of MiniMindConfig: what begins a text, ends an answer, and fills rows up."""
    ending = tokenizer(ChatFormat.of(tokenizer).end, add_special_tokens=False)["input_ids"]
    padding = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": ending[-1],
        "pad_token_id": END_OF_TEXT_ID if padding is None else padding,
    }  # fmt: skip


def picture_token(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> int:
    """The id that stands for a patch of a picture: a token for it, `@`, or an id that no text uses.

    vocab_size: rows of the base's embeddings, of which many have more than their tokenizer has tokens.

    Returns vocab_size itself where every id is taken: the embeddings must grow by one.
    """
    known = tokenizer.get_vocab()
    first_unused = min(max(known.values()) + 1, vocab_size)
    return next((known[text] for text in PICTURE_TOKENS if text in known), first_unused)
