"""The body of a request: which of OpenAI's parameters are known, what they mean here, what is refused by name."""

import difflib
import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from model.inference.answerer import Options
from scripts.server.errors import Refused
from scripts.server.limits import Limits

# They change nothing of an answer.
IGNORED = ("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
           "service_tier", "store", "user")  # fmt: skip
# They would change it, and are not done here; null, or one of these values, asks for nothing.
NOT_DONE: dict[str, tuple] = {
    "audio": (), "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],), "logit_bias": ({},),
    "modalities": (["text"],), "n": (1,), "prediction": (), "presence_penalty": (0,), "reasoning_effort": (),
    "response_format": ({"type": "text"},), "tool_choice": ("none", "auto"), "tools": ([],), "verbosity": (),
    "web_search_options": (),
}  # fmt: skip
WISHES = {  # in our words, by pydantic's kinds of errors
    "bool_type": "true or false", "dict_type": "an object", "float_type": "a number", "int_type": "a whole number",
    "list_type": "a list", "model_type": "an object", "string_type": "a text", "too_long": "{max_length} at most",
    "too_short": "{min_length} at least", "string_too_short": "a text that is not empty",
    "string_too_long": "a text of at most {max_length} characters",
}  # fmt: skip


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageUrl(Strict):
    url: str
    detail: str | None = None  # every picture is seen in the one size of the tower


class Part(Strict):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


def as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def without_nothing(message: Any) -> Any:
    """What clients send back of an earlier answer has fields that hold nothing."""
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if name == "content" or value not in (None, [])}


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(as_parts)]
    name: str | None = None  # one person or several: the model is not told


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # of use against who listens to the lengths of pieces: left out


class ChatRequest(Strict):
    messages: list[Annotated[Message, BeforeValidator(without_nothing)]] = Field(min_length=1)
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1000)  # none of OpenAI's, and what others call it
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]] | None,
                    BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop),
                    Field(max_length=4)] = None  # fmt: skip
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def options(self, limits: Limits) -> Options:
        """How to sample, with eval_vlm.py's defaults. Raises Refused."""
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if self.max_tokens not in (None, most):
            raise Refused(f"is {self.max_tokens} and max_completion_tokens {most}: leave one of them out", "max_tokens")
        if most is not None and most > limits.new_tokens:
            raise Refused(f"is {most:,}: this server's answers have {limits.new_tokens:,} tokens at most "
                          "(--max_new_tokens): ask for fewer", name)  # fmt: skip
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("is given, and logprobs is not: add `logprobs: true`", "top_logprobs")
        default = Options()
        return Options(
            max_new_tokens=min(default.max_new_tokens, limits.new_tokens) if most is None else most,
            temperature=self.temperature or 0.0,
            top_p=default.top_p if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def parse(body: bytes) -> ChatRequest:
    """Raises Refused."""
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(f"the body is not JSON ({error}): send an object with `messages`") from None
    if not isinstance(given, dict):
        raise Refused("the body is JSON, but no object: send one with `messages`")
    said = {name: value for name, value in given.items() if value is not None and name not in IGNORED}
    for name in [name for name in said if name in NOT_DONE]:
        if said.pop(name) not in NOT_DONE[name]:
            raise Refused(_not_done(name), name)
    try:
        return ChatRequest.model_validate(said)
    except ValidationError as error:
        raise _refusal(error) from None


def _not_done(name: str) -> str:
    nothing = " or ".join(map(repr, NOT_DONE[name]))
    return f"asks for what this server does not do: leave it out{nothing and f' or send {nothing}'}"


def _refusal(error: ValidationError) -> Refused:
    """The first of what pydantic found, with its place as people write it."""
    errors = error.errors(include_url=False)
    # A misspelt name explains what is missing, and a part of an unknown type what is too much.
    found = min(errors, key=lambda one: ("literal_error", "extra_forbidden", one["type"]).index(one["type"]))
    where, kind = place(found["loc"]), found["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(found["loc"][-1]), _known_at(found["loc"][:-1]), 1)
        return Refused(f"is not known here: {f'did you mean {near[0]}?' if near else 'leave it out'}", where)
    if kind == "missing":
        return Refused("is missing: docs/server.md shows what a request holds", where)
    wish = WISHES.get(kind, found["msg"].removeprefix("Input should be ")).format(**found.get("ctx", {}))
    return Refused(f"is {reprlib.repr(found['input'])}: it must be {wish}", where)


def _known_at(place: tuple) -> Sequence[str]:
    """Names that may stand in the object at this place."""
    if not place:
        return (*ChatRequest.model_fields, *IGNORED, *NOT_DONE)
    if place[-1] in ("image_url", "stream_options"):
        return tuple((ImageUrl if place[-1] == "image_url" else StreamOptions).model_fields)
    return tuple((Message if len(place) == 2 else Part).model_fields)


def place(location: tuple) -> str:
    """("messages", 2, "content", 0) -> messages[2].content[0]"""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location)
    return text.removeprefix(".")
