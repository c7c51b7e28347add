"""A conversation of the browser demo to take home: as JSON for programs, as one HTML page to read.

What people and models wrote is escaped in the page, and the page may fetch and run nothing, whatever stands in it.
"""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict

from model.messages import plain
from scripts.demo.chat import Turn
from scripts.demo.text import translate

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """body { max-width: 42rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; }
section { border-top: 1px solid #ccc; padding: 1rem 0; } img { max-width: 14rem; border-radius: .5rem; margin: .25rem; }
p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; } .question { font-weight: 600; }
small { color: #666; overflow-wrap: anywhere; }"""


def as_json(turns: Sequence[Turn]) -> bytes:
    """UTF-8. Pictures as data URIs, so that the file needs no others."""
    facts = {"conversation": [_facts(turn) for turn in turns]}
    return f"{json.dumps(facts, ensure_ascii=False, indent=1)}\n".encode()


def as_html(turns: Sequence[Turn], language: str) -> bytes:
    """One page with everything in it, UTF-8. language: a key of scripts.demo.text.LANGUAGES."""
    title = html.escape(translate(language, "title"))
    return (
        f'<!DOCTYPE html>\n<html lang="{html.escape(language)}">\n<head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        + "\n".join(_section(_facts(turn), language) for turn in turns)
        + "\n</body></html>\n"
    ).encode()


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
