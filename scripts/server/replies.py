"""Answers in the form of OpenAI's: a completion, or the chunks that one is streamed in."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from model.inference.answerer import Answer
from model.inference.growing_text import TokenLogprob
from scripts.server.errors import Refused, error_object
from scripts.server.service import Running

# "stopped" is here out of time; a client that is gone reads nothing, and a server's end is an error.
FINISH = {"end": "stop", "stop": "stop", "length": "length", "stopped": "length"}


async def completion(running: Running) -> dict:
    """The whole answer. Raises Refused."""
    logprobs = [one async for piece in running.pieces() for one in getattr(piece, "logprobs", ())]
    answer = running.answer()
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": logprobs_object(logprobs) if running.asked.options.logprobs is not None else None,
        "finish_reason": FINISH[answer.ending],
    }
    return {**head(running, "chat.completion"), "choices": [choice], "usage": usage(answer)}


async def chunks(running: Running) -> AsyncIterator[str]:
    """Server-sent events. What goes wrong on the way is the last of them."""
    same = head(running, "chat.completion.chunk")
    with_logprobs, with_usage = running.asked.options.logprobs is not None, running.asked.include_usage
    if with_usage:
        same["usage"] = None

    def chunk(delta: dict, logprobs: Sequence[TokenLogprob] | None = None, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        choice["logprobs"] = logprobs_object(logprobs) if with_logprobs and logprobs is not None else None
        return event({**same, "choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for piece in running.pieces():
        if piece:
            yield chunk({"content": piece}, getattr(piece, "logprobs", ()))
    try:
        answer = running.answer()
    except Refused as error:
        yield event({"error": error_object(error)})
        return
    yield chunk({}, finish_reason=FINISH[answer.ending])
    if with_usage:
        yield event({**same, "choices": [], "usage": usage(answer)})
    yield "data: [DONE]\n\n"


def head(running: Running, kind: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()),
            "model": running.service.settings.name}  # fmt: skip


def event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage(answer: Answer) -> dict:
    forgotten = {"forgotten_turns": answer.forgotten.turns} if answer.forgotten.turns else {}  # ours, not OpenAI's
    return {**forgotten, "prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.new_tokens,
            "total_tokens": answer.prompt_tokens + answer.new_tokens}  # fmt: skip


def logprobs_object(logprobs: Sequence[TokenLogprob]) -> dict:
    return {"content": [{**token_object(one), "top_logprobs": list(map(token_object, one.top))} for one in logprobs]}


def token_object(one: TokenLogprob) -> dict:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.bytes)}
