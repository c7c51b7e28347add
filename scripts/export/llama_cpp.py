"""A GGUF folder in llama.cpp itself, by the wheel xllamacpp: loaded, asked, and what its answers took.

    engine = LlamaCpp(folder, Settings(threads=2))
    reply = engine.ask([user_turn("What do you see?", 1)], [picture])
    reply.text, reply.prompt_tokens / reply.prompt_seconds, reply.new_tokens / reply.seconds

Its server runs in this process; `engine.address` is where it listens, for clients of the OpenAI API.
"""

import base64
import io
import json
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from PIL import Image

from model.messages import UserError
from model.processing import content_parts

MODEL, SIGHT = "model.gguf", "mmproj.gguf"
LISTENING = 60.0  # seconds that its server may take until it answers
ROLLED = f"rolled-{SIGHT}"  # beside SIGHT until the proof has found which of them llama.cpp computes rightly
SIDE, FILTER = "clip.vision.image_size", "clip.vision.image_resize_algo"  # facts of the mmproj
HERE = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # its server is in this process: past any proxy
FILTERS = ("bilinear", "bicubic", "lanczos")  # Pillow's that llama.cpp has words for


@dataclass(frozen=True)
class Reply:
    """An answer, and llama.cpp's own measure of what it took."""

    text: str
    # With the one that ended the turn. None where no logprobs were asked for, or one was not told: llama.cpp keeps back
    # those of tokens that end within a character.
    token_ids: tuple[int, ...]
    first: dict[int, float]  # log probabilities of the likeliest first tokens, as many as were asked for
    prompt_tokens: int
    read_tokens: int  # of these, what was not remembered from a prompt before
    prompt_seconds: float  # to read them, pictures included
    new_tokens: int
    seconds: float  # from the first new token to the last


@dataclass(frozen=True)
class Settings:
    """How llama.cpp runs."""

    threads: int = 1
    rows: int = 1  # conversations at once
    context: int = 4096  # tokens of each
    exact: bool = False  # keys and values in full, and no flash attention, instead of its own defaults
    squeeze: bool = True  # make pictures square as training did, instead of letting it pad them
    sight: str = SIGHT  # the file with the tower, where there is one


DEFAULTS = Settings()


class LlamaCpp:
    """A loaded folder. Threads may share it; `rows` of them are answered at once, in one batch."""

    def __init__(self, folder: Path, settings: Settings = DEFAULTS):
        """Raises UserError where xllamacpp or gguf is not installed, or the folder does not load."""
        xllamacpp = need_xllamacpp()
        folder = Path(folder)
        if not (folder / MODEL).is_file():
            raise UserError(f"{folder} holds no {MODEL}: make it with scripts/convert_vlm.py --to gguf")
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / MODEL)
        self.squeeze, self.square_size, self.filter = settings.squeeze, None, Image.Resampling.BICUBIC
        if (folder / settings.sight).is_file():
            params.mmproj.path = str(folder / settings.sight)
            self.square_size, self.filter = _squares(folder / settings.sight)
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads
        params.n_parallel, params.n_ctx = settings.rows, settings.context * settings.rows
        params.warmup, params.verbosity = False, 0
        if settings.exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise UserError(f"llama.cpp does not load {folder} ({error}): convert the weights again") from error
        self.address, self.rows = self._server.listening_address, settings.rows
        # A server that is let go before it listens is never told to stop, and waits for itself for ever.
        HERE.open(f"{self.address}/health", timeout=LISTENING).close()

    @property
    def sees(self) -> bool:
        return self.square_size is not None

    def ask(
        self,
        messages: Sequence[dict],
        pictures: Sequence[Image.Image] = (),
        max_new_tokens: int = 256,
        top_logprobs: int = 0,
        **options,
    ) -> Reply:
        """The likeliest answer. messages: as Answerer.prompt takes them; pictures: in the order of their places, made
        square here, by squeezing, because llama.cpp would pad them.

        options: further ones of its API, `cache_prompt=False` to read every prompt anew, or `temperature`.

        Raises:
            RuntimeError: llama.cpp refuses; the message is its own.
        """
        rest = iter(pictures)
        request = {
            "messages": [{"role": m["role"], "content": self._parts(m["content"], rest)} for m in messages],
            "max_tokens": max_new_tokens, "temperature": 0.0, "stream": False, **options,
        }  # fmt: skip
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        said = self._server.handle_chat_completions(request)
        if "choices" not in said:
            raise RuntimeError(f"llama.cpp refuses: {json.dumps(said)[:500]}")
        return _reply(said)

    def ask_all(self, questions: Sequence[tuple[Sequence[dict], Sequence[Image.Image]]], **options) -> list[Reply]:
        """Many at once, `rows` of them in a batch; in order."""
        with ThreadPoolExecutor(self.rows) as pool:
            return list(pool.map(lambda question: self.ask(*question, **options), questions))

    def tokens(self, text: str) -> list[int]:
        """What llama.cpp makes of a text in which control tokens are meant."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(f"{self.address}/tokenize", body, {"Content-Type": "application/json"})
        with HERE.open(request) as answer:
            return json.load(answer)["tokens"]

    def _parts(self, content: str | list, pictures: Iterator[Image.Image]) -> str | list[dict]:
        parts = content_parts(content)
        if all(kind == "text" for kind, _ in parts):
            return "".join(text for _, text in parts)
        return [
            {"type": "text", "text": text} if kind == "text" else
            {"type": "image_url", "image_url": {"url": data_url(self.square(next(pictures)))}}
            for kind, text in parts
        ]  # fmt: skip

    def square(self, picture: Image.Image) -> Image.Image:
        """The whole picture, squeezed, as training saw it."""
        if not self.squeeze:
            return picture
        return picture.resize((self.square_size, self.square_size), self.filter)


def data_url(picture: Image.Image) -> str:
    """A picture without loss, as the OpenAI API takes it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def need_xllamacpp() -> ModuleType:
    """The package. Raises UserError where it is not installed."""
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError(
            "this runs llama.cpp by the package xllamacpp, which is not installed: pip install -r requirements/gguf.txt"
        ) from error
    return xllamacpp


def _squares(path: Path) -> tuple[int, Image.Resampling]:
    """How large a tower's pictures are, and by which filter they are scaled."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return fields[SIDE].contents(), Image.Resampling[fields[FILTER].contents().upper()]


def _reply(said: dict) -> Reply:
    (choice,), timings = said["choices"], said["timings"]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    if len(tokens) != timings["predicted_n"]:
        tokens = []
    return Reply(
        text=choice["message"]["content"],
        token_ids=tuple(token["id"] for token in tokens),
        first={top["id"]: top["logprob"] for top in tokens[0]["top_logprobs"]} if tokens else {},
        prompt_tokens=said["usage"]["prompt_tokens"],
        read_tokens=timings["prompt_n"],
        prompt_seconds=timings["prompt_ms"] / 1000,
        new_tokens=timings["predicted_n"],
        seconds=timings["predicted_ms"] / 1000,
    )
