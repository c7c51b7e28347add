"""A conversation of the browser demo to take home: as JSON for programs, as one HTML page to read.

What people and models wrote is escaped in the page, and the page may fetch and run nothing, whatever stands in it.
"""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template

from model.messages import plain
from scripts.demo.chat import Turn
from scripts.demo.text import translate

PAGE = Template(Path(__file__).with_name("conversation.html").read_text(encoding="utf-8"))


def as_json(turns: Sequence[Turn]) -> bytes:
    """UTF-8. Pictures as data URIs, so that the file needs no others."""
    facts = {"conversation": [_facts(turn) for turn in turns]}
    return f"{json.dumps(facts, ensure_ascii=False, indent=1)}\n".encode()


def as_html(turns: Sequence[Turn], language: str) -> bytes:
    """One page with everything in it, UTF-8. language: a key of scripts.demo.text.LANGUAGES."""
    title = html.escape(translate(language, "title"))
    sections = "\n".join(_section(_facts(turn), language) for turn in turns)
    return PAGE.substitute(language=html.escape(language), title=title, turns=sections).encode()


def _facts(turn: Turn) -> dict:
    return {
        "question": turn.question,
        "pictures": [f"data:image/jpeg;base64,{base64.b64encode(p.shown).decode()}" for p in turn.pictures],
        "credit": turn.credit,
        "answers": [
            {
                "text": reply.answer.text if reply.answer else None,
                "failure": reply.failure,
                "weights": plain(reply.weight.path.name),
                "settings": asdict(reply.options),
            }
            for reply in turn.replies
        ],
    }


def _section(facts: dict, language: str) -> str:
    lines = [f'<img src="{html.escape(picture)}" alt="">' for picture in facts["pictures"]]
    if facts["credit"]:
        lines.append(f"<br><small>{html.escape(facts['credit'])}</small>")
    lines.append(f'<p class="question">{html.escape(facts["question"])}</p>')
    for answer in facts["answers"]:
        text = answer["text"] or translate(language, "nothing")
        lines.append(f"<p>{html.escape(text)}</p><small>{html.escape(answer['weights'])}</small>")
    return "<section>" + "\n".join(lines) + "</section>"
