"""How a base writes a conversation: the texts around what is said, read off the chat template of its tokenizer.

A template is asked to write a few known conversations, and what it puts around their words is kept, once: so the
renderer joins pieces whose labels are known, and never has to search a finished text for markers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerFast

from model.messages import UserError

SYSTEM, USER, ANSWER, USER_AGAIN = "SystemWords", "UserWords", "AnswerWords", "OtherWords"
# What some templates ask beside the messages: a date that is not today's, so that rows are the same tomorrow, and no
# thoughts, which the data does not hold.
SETTINGS = {"date_string": "26 Jul 2024", "enable_thinking": False}
CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
PLAIN = """\
{%- for message in messages -%}
{{- message['role'].capitalize() + ': ' + message['content'] -}}
{{- eos_token if message['role'] == 'assistant' else '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"""
TEMPLATE = """\
{%%- set opening = %(openings)s -%%}
{%%- set closing = %(closings)s -%%}
{%%- if messages[0]['role'] != 'system' -%%}{{- %(beginning)s -}}{%%- endif -%%}
{%%- for message in messages -%%}
{{- opening[message['role']] -}}
{%%- set body -%%}
{%%- if message['content'] is string -%%}
{{- message['content'] -}}
{%%- else -%%}
{%%- for part in message['content'] -%%}
{{- '<image>' if part['type'] == 'image' else part['text'] -}}
{%%- endfor -%%}
{%%- endif -%%}
{%%- endset -%%}
{%%- if message['role'] == 'assistant' -%%}
{%%- generation -%%}{{- body + %(end)s -}}{%%- endgeneration -%%}
{{- closing['assistant'] -}}
{%%- else -%%}
{{- body + closing[message['role']] -}}
{%%- endif -%%}
{%%- endfor -%%}
{%%- if add_generation_prompt -%%}{{- opening['assistant'] -}}{%%- endif -%%}
"""
_KNOWN: dict[tuple[str, str], "ChatFormat"] = {}  # by template and special tokens: each is asked once a process


@dataclass(frozen=True)
class ChatFormat:
    """Texts around what is said, control tokens included.

    begin            <|im_start|>system\\nBe kind.<|im_end|>\\n    where no system message comes first; often nothing
    open user        <|im_start|>user\\n
    close user       <|im_end|>\\n
    open assistant   <|im_start|>assistant\\n
    end              <|im_end|>                                  closes an answer, and is learnt
    close assistant  \\n                                          behind that, and is not
    """

    begin: str
    open: tuple[tuple[str, str], ...]  # (role, text); without a system role where the template has none
    close: tuple[tuple[str, str], ...]
    end: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> "ChatFormat":
        """The format of a tokenizer's chat template; without one ChatML if its tokens are there, else `User: ...`.

        Raises:
            UserError: the template cannot be taken apart like this.
        """
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several by name
            template = template.get("default") or next(iter(template.values()))
        if template is None:
            template = CHATML if "<|im_end|>" in tokenizer.get_vocab() else PLAIN
        key = template, json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)
        if key not in _KNOWN:
            _KNOWN[key] = _take_apart(_writer(tokenizer, template), tokenizer.eos_token or "")
        return _KNOWN[key]

    def template(self) -> str:
        """A chat template that writes this format, with `<image>` for pictures and the answers marked."""
        return TEMPLATE % {
            "openings": json.dumps(dict(self.open), ensure_ascii=False),
            "closings": json.dumps(dict(self.close), ensure_ascii=False),
            "beginning": json.dumps(self.begin, ensure_ascii=False),
            "end": json.dumps(self.end, ensure_ascii=False),
        }


def _writer(tokenizer: PreTrainedTokenizerFast, template: str) -> Callable[..., str]:
    """(role, words) pairs to the text that the template makes of them."""

    def write(messages: Sequence[tuple[str, str]], add_generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages], chat_template=template,
            add_generation_prompt=add_generation_prompt, tokenize=False, **SETTINGS,
        )  # fmt: skip

    return write


def _take_apart(write: Callable[..., str], end_of_text: str) -> ChatFormat:
    """What a template writes around the words of known conversations. end_of_text: closes what it leaves open."""
    try:
        asked = write([("user", USER)], add_generation_prompt=True)
        question = write([("user", USER)])
        answered = write([("user", USER), ("assistant", ANSWER)])
        going_on = write([("user", USER), ("assistant", ANSWER), ("user", USER_AGAIN)])
        before, close_user = _around(question, USER)
        open_answer = _without_start(_around(asked, USER)[1], close_user)
        after_answer = _around(answered, ANSWER)[1]
        between = going_on.partition(ANSWER)[2].partition(USER_AGAIN)[0]
        open_user = _without_start(between, after_answer)
        begin = _without_end(before, open_user)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"the tokenizer's chat template cannot be taken apart ({str(error)[:200]}): it must write a user's turn, "
            "an answer, and a user's turn again, each with the same texts around the words. Put a simpler one into "
            "tokenizer_config.json"
        ) from error
    end, close_answer = _split_end(after_answer, end_of_text)
    system = _system(write, open_user)
    roles = {**system, "user": (open_user, close_user), "assistant": (open_answer, close_answer)}
    return ChatFormat(
        begin=begin, end=end, open=tuple((role, texts[0]) for role, texts in roles.items()),
        close=tuple((role, texts[1]) for role, texts in roles.items()),
    )  # fmt: skip


def _system(write: Callable, open_user: str) -> dict[str, tuple[str, str]]:
    """The texts around a system message that comes first; nothing where the template refuses or moves it."""
    try:
        text = write([("system", SYSTEM), ("user", USER)])
        opening, rest = _around(text, SYSTEM)
        return {"system": (opening, _without_end(rest.partition(USER)[0], open_user))}
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return {}


def _split_end(text: str, end_of_text: str) -> tuple[str, str]:
    """What closes an answer, up to its control token, and what follows it: line breaks, mostly."""
    ending = text.rstrip()
    if not ending:  # the template leaves answers open
        return end_of_text, text
    return ending, text[len(ending) :]


def _around(text: str, words: str) -> tuple[str, str]:
    before, found, after = text.partition(words)
    if not found or words in after:
        raise ValueError(f"{words!r} stands {text.count(words)} times in {text!r:.120}")
    return before, after


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError(f"{text!r:.80} does not begin with {start!r:.80}")
    return text.removeprefix(start)


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise ValueError(f"{text!r:.80} does not end with {end!r:.80}")
    return text.removesuffix(end)
