"""How fast answers come, against MiniMind-V's way of making them, in one run on one machine.

    OMP_NUM_THREADS=1 python scripts/measure/generation.py --json out/generation.json

A dense model of 26 M parameters behind a tower of CLIP-ViT-B/16's size, random weights, float32 for all. The two
alternate, each repetition brings new pictures, and medians are reported; so are the ratios of neighbours in time, which
a busy machine disturbs less than the figures themselves. Next to wall time stands this process's own processor time.
"""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from model.command_line import CommandLine
from model.config import VLMConfig
from model.device import choose_dtype
from model.inference.answerer import Answerer, Options
from model.inference.reader import Prompt
from model.model_vlm import MiniMindVLM
from scripts.measure.figures import write_figures

QUESTIONS = ("What do you see in the picture?", "Where is it, and how many of them are there beside it?")
ROWS = 16
RATIOS = (  # of two figures of one request
    ("decode", "engine_tokens_per_second", "plain_tokens_per_second"),
    ("first_token", "plain_first_seconds", "engine_first_seconds"),
    ("second_question", "engine_first_seconds", "second_first_seconds"),
)


def clocks() -> np.ndarray:
    """[wall time, this process's processor time], seconds; the latter does not count what other processes took."""
    return np.array([time.perf_counter(), time.process_time()])


class PlainWay:
    """MiniMind-V's way, as a plain eager loop: what the engine is measured against.

    Each picture through the tower alone, separate projections, keys and values joined by torch.cat and repeated for
    every query head, scores under a mask that is written out, softmax, and at the prompt logits of every position.
    """

    def __init__(self, model: MiniMindVLM):
        self.model, self.config = copy.deepcopy(model).eval(), model.config
        self.groups = model.config.num_attention_heads // model.config.num_key_value_heads
        positions = torch.arange(2048)[None]
        self.cos, self.sin = (table[0, 0] for table in self.model.model.rotary(positions, torch.float32))

    @torch.inference_mode()
    def tokens(self, ids: list[int], picture: torch.Tensor, first_placeholder: int, count: int) -> tuple[list, list]:
        """Greedy tokens, and the clocks when each was there."""
        model = self.model
        image = model.vision_proj(model.encode_pictures(picture[None]))
        x = model.model.embed_tokens(torch.tensor([ids]))
        x = torch.cat([x[:, :first_placeholder], image, x[:, first_placeholder + image.shape[1] :]], 1)
        past, tokens, times, start = [None] * len(model.model.layers), [], [], 0
        while len(tokens) < count:
            for number, layer in enumerate(model.model.layers):
                mixed, past[number] = self._attend(layer, layer.input_layernorm(x), past[number], start)
                x = x + mixed
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            logits = model.lm_head(model.model.norm(x))
            start += x.shape[1]
            token = logits[:, -1].argmax(-1)
            tokens.append(int(token))
            times.append(clocks())
            x = model.model.embed_tokens(token[None])
        return tokens, times

    def _attend(self, layer: torch.nn.Module, x: torch.Tensor, past: tuple | None, start: int) -> tuple:
        attention, (batch, length, _) = layer.self_attn, x.shape
        query, key, value = (
            projection(x).view(batch, length, -1, attention.head_dim)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        cos, sin = (table[start : start + length, None] for table in (self.cos, self.sin))
        query, key = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in (query, key))
        if past is not None:
            key, value = torch.cat([past[0], key], 1), torch.cat([past[1], value], 1)
        past = key, value
        key, value = (
            t[:, :, :, None].expand(-1, -1, -1, self.groups, -1).reshape(batch, t.shape[1], -1, attention.head_dim)
            for t in (key, value)
        )
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        scores = query @ key.transpose(-2, -1) / attention.head_dim**0.5
        scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(scores.shape[-1] - length + 1)
        mixed = scores.float().softmax(-1).type_as(query) @ value
        return attention.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)), past


def measure_generation(
    repetitions: int = 5,
    new_tokens: int = 64,
    batches: int = 2,
    model: MiniMindVLM | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict:
    """Figures of one request, of a second question, and of a batch: medians, also of the ratios in one repetition.

    model: by default the 26 M one; dtype: the engine's, the plain way is always in float32.

    Raises:
        RuntimeError: engine and plain way do not say the same, both in float32: then two different things would be
            compared.
    """
    torch.manual_seed(0)
    model = (model or MiniMindVLM(VLMConfig())).eval()
    plain, engine = PlainWay(model), Answerer(model, dtype=dtype)
    engine.end_ids = frozenset()  # nothing ends an answer but its length, so that all do the same work
    options = Options(max_new_tokens=new_tokens)
    exact = dtype == torch.float32
    requests = [_one_request(plain, engine, seed, options, exact) for seed in range(repetitions + 1)]
    result = {
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": str(dtype)},
        "repetitions": repetitions, "new_tokens": new_tokens, "prompt_tokens": requests[0]["prompt_tokens"],
        "medians": _medians(requests[1:]),  # the first warms up
    }  # fmt: skip
    for clock in ("", "_cpu"):
        for name, above, below in RATIOS:
            ratios = [request[above + clock] / request[below + clock] for request in requests[1:]]
            result[f"{name}_ratio{clock}"] = statistics.median(ratios)
    seeds: dict[str, Callable[[int, int], int | None]] = {  # of the picture, by repetition and row; None: no picture
        "text": lambda repetition, row: None,
        "one_picture": lambda repetition, row: 1000 + repetition,
        "own_pictures": lambda repetition, row: 2000 + ROWS * repetition + row,
    }
    for name, seed_of in seeds.items():
        result[f"batch_{name}"] = _medians([one_batch(engine, options, partial(seed_of, k)) for k in range(batches)])
    return result


def _one_request(plain: PlainWay, engine: Answerer, seed: int, options: Options, exact: bool) -> dict[str, float]:
    """The same question both ways, and a second one about the same picture to the engine."""
    pictures = [picture_of_noise(seed)]
    prompt = make_prompt(engine, QUESTIONS[0], pictures)
    started, first = clocks(), prompt.image_mask.index(True)
    plain_tokens, times = plain.tokens(prompt.ids, prompt.pictures[0], first, options.max_new_tokens)
    figures = _speeds("plain", started, times)
    started, times = clocks(), []

    def note_time() -> bool:
        times.append(clocks())
        return False

    one_more = Options(options.max_new_tokens + 1)  # the engine does not ask after the last
    answer = engine.stream(make_prompt(engine, QUESTIONS[0], pictures), one_more, stopped=note_time)
    figures |= _speeds("engine", started, times)
    if exact and list(answer.token_ids[:-1]) != plain_tokens:
        raise RuntimeError(f"the engine says {answer.token_ids[:8]}..., the plain way {plain_tokens[:8]}...")
    started, times = clocks(), []
    engine.stream(make_prompt(engine, QUESTIONS[1], pictures), Options(max_new_tokens=3), stopped=note_time)
    return {"prompt_tokens": answer.prompt_tokens, **figures, **_speeds("second", started, times)}


def _speeds(name: str, started: np.ndarray, times: list[np.ndarray]) -> dict[str, float]:
    """From the clocks at the start and at each token: in wall time, and in processor time."""
    speeds = {}
    for clock, first, rest in zip(("", "_cpu"), times[0] - started, times[-1] - times[0], strict=True):
        speeds[f"{name}_first_seconds{clock}"] = float(first)
        speeds[f"{name}_tokens_per_second{clock}"] = (len(times) - 1) / float(rest)
    return speeds


def one_batch(engine: Answerer, options: Options, picture_of: Callable[[int], int | None]) -> dict[str, float]:
    """Tokens a second one after another and together, on different pictures, so that neither finds the other's.

    picture_of: the seed of a row's picture; None: it has none.
    """

    def prompts(turn: int) -> list[Prompt]:
        asked = []
        for row in range(ROWS):
            seed = picture_of(row)
            pictures = [] if seed is None else [picture_of_noise(seed + 10**6 * turn)]
            asked.append(make_prompt(engine, f"{turn} {QUESTIONS[row % 2]} {row}", pictures))
        return asked

    started = clocks()
    singles = [engine.stream(prompt, options) for prompt in prompts(0)]
    single_seconds = clocks() - started
    started = clocks()
    together = engine.batch(prompts(1), options)
    batch_seconds = clocks() - started
    count = ROWS * options.max_new_tokens
    single_decode = statistics.harmonic_mean([answer.tokens_per_second for answer in singles])
    batch_decode = sum(answer.tokens_per_second for answer in together)
    figures = {
        "one_after_another_decode": single_decode,
        "together_decode": batch_decode,
        "decode_ratio": batch_decode / single_decode,
        "first_seconds": statistics.median(answer.seconds_to_first for answer in singles),
    }
    for clock, alone, batch in zip(("", "_cpu"), single_seconds, batch_seconds, strict=True):
        figures[f"one_after_another{clock}"] = count / float(alone)
        figures[f"together{clock}"] = count / float(batch)
        figures[f"ratio{clock}"] = float(alone / batch)
    return figures


def _medians(figures: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in figures) for name in figures[0]}


def picture_of_noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (224, 224, 3), dtype=np.uint8))


def make_prompt(engine: Answerer, question: str, pictures: Sequence[Image.Image]) -> Prompt:
    return engine.prompt([{"role": "user", "content": "<image>\n" * len(pictures) + question}], pictures)


def table(result: dict) -> str:
    median = result["medians"]
    lines = [
        f"{result['prompt_tokens']} prompt tokens, {result['new_tokens']} new, {result['repetitions']} repetitions, "
        f"{result['machine']['threads']} threads, {result['machine']['dtype']}, torch {result['machine']['torch']}"
    ]
    for clock, title in (("", "by the wall"), ("_cpu", "by processor time")):
        rows = (
            ("tokens/s after the first", "plain_tokens_per_second", "engine_tokens_per_second", 1, "decode"),
            ("first token, ms", "plain_first_seconds", "engine_first_seconds", 1000, "first_token"),
            ("first, and second question, ms", "engine_first_seconds", "second_first_seconds", 1000, "second_question"),
        )
        lines.append(f"{f'one request, {title}':<36}{'plain way':>12}{'engine':>12}{'ratio':>9}")
        lines += [
            f"{'  ' + name:<36}{scale * median[before + clock]:>12.1f}{scale * median[after + clock]:>12.1f}"
            f"{result[f'{ratio}_ratio{clock}']:>8.2f}x"
            for name, before, after, scale, ratio in rows
        ]
    lines.append(f"{f'{ROWS} prompts, tokens/s':<36}{'one by one':>12}{'together':>12}{'ratio':>9}")
    for name in ("text", "one_picture", "own_pictures"):
        figures, title = result[f"batch_{name}"], name.replace("_", " ")
        for detail, clock, ratio in (
            ("all of it", "", "ratio"),
            ("by processor time", "_cpu", "ratio_cpu"),
            ("after the first token", "_decode", "decode_ratio"),
        ):
            alone, together = (figures[f"{way}{clock}"] for way in ("one_after_another", "together"))
            lines.append(f"{f'  {title}, {detail}':<36}{alone:>12.1f}{together:>12.1f}{figures[ratio]:>8.2f}x")
    return "\n".join(lines)


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2, help="repetitions of the batches of 16")
    parser.add_argument("--dtype", default="float32", choices=("float32", "auto", "bfloat16"), help="of the engine")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    dtype = choose_dtype(options.dtype, torch.device("cpu"))
    result = measure_generation(options.repetitions, options.new_tokens, options.batches, dtype=dtype)
    print(table(result))
    write_figures(options.json, result)


if __name__ == "__main__":
    main()
