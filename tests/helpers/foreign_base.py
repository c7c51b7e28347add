"""Base models of other people in small: decoder, tokenizer and chat template in a folder as hubs publish them.

write_base(folder, "smollm2") and so on: four families that differ in all that can surprise a renderer. Random weights.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from helpers.models import enliven_all

VOCABULARY = 400  # of the tokenizer, the special tokens with it
WORDS = (
    "system user assistant What is in the picture ? A red cat sits on a green mat . How many cats are there ? Two . "
    "The capital of France is Paris . Describe this image in one sentence . You are a helpful assistant . No Yes @ @@"
)

# ChatML, and a system message of its own where the conversation has none.
SMOLLM2_TEMPLATE = """\
{%- if messages and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant named Tiny<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# Zephyr's: roles are ordinary text, only the end is a token; the tokenizer adds <s> by itself.
TINYLLAMA_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

# Always a system turn, with today's date; contents are stripped; the template adds the first token by itself.
LLAMA3_TEMPLATE = """\
{%- if date_string is not defined -%}
{%- if strftime_now is defined -%}{%- set date_string = strftime_now('%d %b %Y') -%}
{%- else -%}{%- set date_string = '26 Jul 2024' -%}{%- endif -%}
{%- endif -%}
{%- set system = '' -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] | trim -%}{%- set messages = messages[1:] -%}
{%- endif -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\\n\\n' -}}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

# ChatML; the answer to the last question gets an empty think block, earlier answers lose theirs.
QWEN3_TEMPLATE = """\
{%- set found = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set found.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set answer = message.content.split('</think>')[-1].lstrip('\\n') -%}
{%- set thought = '<think>\\n\\n</think>\\n\\n' if loop.last and loop.index0 > found.last else '' -%}
{{- '<|im_start|>assistant\\n' + thought + answer + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""


@dataclass(frozen=True)
class Family:
    """What one publisher's folder holds beside the weights."""

    template: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str | None
    unk: str | None = None
    first: bool = True  # the special tokens' ids stand before the words', else after them
    plain: tuple[str, ...] = ()  # added tokens that are no special ones
    adds_bos: bool = False  # the tokenizer puts it before every text
    tokenizer_class: str = "PreTrainedTokenizerFast"
    config: dict = field(default_factory=dict)  # beyond SIZES


SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 256}  # fmt: skip
FAMILIES = {
    "smollm2": Family(
        SMOLLM2_TEMPLATE,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<filename>", "<empty_output>"),
        bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>", unk="<|endoftext|>", tokenizer_class="GPT2Tokenizer",
        config={"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 100_000},
    ),
    "tinyllama": Family(
        TINYLLAMA_TEMPLATE, ("<unk>", "<s>", "</s>"),
        bos="<s>", eos="</s>", pad="</s>", unk="<unk>", adds_bos=True, tokenizer_class="LlamaTokenizer",
        config={"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0},
    ),
    "llama3": Family(
        LLAMA3_TEMPLATE,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>",
         "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>", eos="<|eot_id|>", pad=None, first=False, adds_bos=True,
        config={"tie_word_embeddings": True, "head_dim": 8, "rope_theta": 500_000.0, "rope_scaling": LLAMA3_ROPE},
    ),
    "qwen3": Family(
        QWEN3_TEMPLATE, ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>"),
        bos=None, eos="<|im_end|>", pad="<|endoftext|>", first=False, plain=("<think>", "</think>"),
        tokenizer_class="Qwen2Tokenizer",
        config={"tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000},
    ),
}  # fmt: skip


def write_base(folder: Path, family: str, template_file: bool = False, **changes) -> Path:
    """A folder of one of FAMILIES; returns it.

    template_file: the chat template in chat_template.jinja, as today; else inside tokenizer_config.json, as before.
    changes: of config.json, e.g. num_hidden_layers=3. The vocabulary is rounded up, as publishers do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(family)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(family, not template_file))
    if template_file:
        (folder / "chat_template.jinja").write_text(FAMILIES[family].template, encoding="utf-8")
    ids = special_ids(tokenizer, family)
    model = make_model(family, tokenizer.get_vocab_size(), **ids, **changes)
    model.save_pretrained(folder)
    write_json(folder / "config.json", published_config(folder / "config.json", FAMILIES[family].config, ids))
    write_json(folder / "generation_config.json", {"do_sample": True, **ids})
    return folder


def make_model(family: str, tokens: int, seed: int = 1, **changes) -> PreTrainedModel:
    """The decoder as transformers' own class; every matrix is large enough to show in the logits."""
    config_class, model_class = (
        (Qwen3Config, Qwen3ForCausalLM) if family == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    )
    vocab_size = 64 * -(-tokens // 64)
    settings = {**SIZES, "vocab_size": vocab_size, **FAMILIES[family].config, **changes}
    rope = settings.pop("rope_scaling", None) or {"rope_type": "default"}
    config = config_class(**settings, rope_parameters={**rope, "rope_theta": settings["rope_theta"]})
    return enliven_all(model_class(config).to(torch.float32), seed).eval()


def make_tokenizer(family: str) -> Tokenizer:
    about = FAMILIES[family]
    tokenizer = underlined_bpe(about) if family == "tinyllama" else byte_level_bpe(about)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in about.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in about.plain])
    if about.adds_bos:
        bos = (about.bos, tokenizer.token_to_id(about.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{about.bos} $A", None, [bos])
    return tokenizer


def byte_level_bpe(about: Family) -> Tokenizer:
    """Every byte is a character; "@@" is merged, which MiniMind's tokenizer never does."""
    tokenizer = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(r" ?\p{L}+|\d| ?[^\s\p{L}\d]+|\s+(?!\S)|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    later = 0 if about.first else len(about.special)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - later - len(about.plain), special_tokens=list(about.special if about.first else ()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([WORDS] * 2, trainer)
    return tokenizer


def underlined_bpe(about: Family) -> Tokenizer:
    """TinyLlama's: a space is an underline, every text begins with one, unknown characters become tokens of bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token=about.unk, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    reserved = [*about.special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=reserved, show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 2, trainer)
    # what only training needed: bytes are no special tokens, and words are split by their merges alone
    content = {**json.loads(tokenizer.to_str()), "added_tokens": [], "pre_tokenizer": None}
    return Tokenizer.from_str(json.dumps(content))


def tokenizer_config(family: str, with_template: bool) -> dict:
    about = FAMILIES[family]
    named = {"bos_token": about.bos, "eos_token": about.eos, "pad_token": about.pad, "unk_token": about.unk}
    config = {
        **named, "add_bos_token": about.adds_bos, "clean_up_tokenization_spaces": False, "model_max_length": 4096,
        "tokenizer_class": about.tokenizer_class,
    }  # fmt: skip
    return {**config, "chat_template": about.template} if with_template else config


def special_ids(tokenizer: Tokenizer, family: str) -> dict[str, int | list[int] | None]:
    """As configs state them; Llama 3 names all that may end a text."""
    about = FAMILIES[family]
    ends = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>") if family == "llama3" else (about.eos,)
    eos = [tokenizer.token_to_id(token) for token in ends]
    bos = about.bos or about.pad  # Qwen's config names one that its tokenizer never uses
    return {
        "bos_token_id": tokenizer.token_to_id(bos), "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": tokenizer.token_to_id(about.pad) if about.pad else None,
    }  # fmt: skip


def published_config(path: Path, settings: dict, ids: dict) -> dict:
    """config.json under the names that it was published with: transformers 5 writes others."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("rope_parameters", None)
    config["torch_dtype"] = config.pop("dtype", "float32")
    config["transformers_version"] = "4.51.0"
    rope = {"rope_theta": settings["rope_theta"], "rope_scaling": settings.get("rope_scaling")}
    return {**config, **rope, **{name: value for name, value in ids.items() if value is not None}}


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def conversations() -> Iterator[list[dict]]:
    """What a renderer must turn into the ids that template and tokenizer give: one turn, two, with a system's."""
    question = {"role": "user", "content": "What is in the picture?"}
    answer = {"role": "assistant", "content": "A red cat sits on a green mat."}
    more = [{"role": "user", "content": "How many cats are there?\nTwo?"}, {"role": "assistant", "content": "Yes."}]
    system = {"role": "system", "content": "You are a helpful assistant."}
    yield [question]
    yield [question, answer]
    yield [question, answer, more[0]]
    yield [question, answer, *more]
    yield [system, question, answer, *more]
    yield [question, {"role": "assistant", "content": "猫, 2 cats @@ @."}]
