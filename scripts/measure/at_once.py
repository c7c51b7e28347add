"""How fast answers come when many ask at once, through the Batcher: against one after another, and to the first token.

    OMP_NUM_THREADS=1 python scripts/measure/at_once.py --json out/at_once.json [--weight out/sft_vlm_512.safetensors]

Without --weight the 26 M model behind a tower of CLIP-ViT-B/16's size, random weights. Three kinds of requests: text,
questions about one new picture, a new picture each. Of each kind 16 one after another and 16 at once alternate, and
medians are reported; then eight clients ask, read and ask again, and the first token of each answer is timed from the
moment of asking. They begin spread over the time of one answer, as people do; the burst of all at the same moment is a
figure of its own. All answers have the same length, so that all do the same work.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model.command_line import CommandLine
from model.config import VLMConfig
from model.device import choose_device, choose_dtype
from model.inference.answerer import Answer, Answerer, Options
from model.inference.batcher import Batcher
from model.inference.reader import Prompt
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from scripts.measure.figures import write_figures
from scripts.measure.generation import QUESTIONS, make_prompt, picture_of_noise

KINDS = ("text", "one_picture", "own_pictures")


class Requests:
    """Prompts of one kind; another round brings other pictures and questions."""

    def __init__(self, answerer: Answerer, kind: str):
        self.answerer, self.kind, self.round = answerer, kind, 0

    def next_round(self) -> None:
        self.round += 1

    def prompt(self, row: int) -> Prompt:
        seed = 10**8 * KINDS.index(self.kind) + 10**4 * self.round
        pictures = {"text": [], "one_picture": [seed], "own_pictures": [seed + row]}[self.kind]
        question = f"{self.round} {QUESTIONS[row % 2]} {row}"
        return make_prompt(self.answerer, question, [picture_of_noise(picture) for picture in pictures])


def together(requests: Requests, batcher: Batcher, options: Options, rows: int) -> list[Answer]:
    """Answers to so many who ask at the same moment."""
    requests.next_round()
    futures = [batcher.submit(requests.prompt(row), options) for row in range(rows)]
    return [future.result() for future in futures]


def throughput(requests: Requests, batcher: Batcher, options: Options, rows: int) -> dict[str, float]:
    """Tokens a second one after another, through Answerer.stream, and at once; prompts are made within the time."""
    requests.next_round()
    started = time.perf_counter()
    for row in range(rows):
        requests.answerer.stream(requests.prompt(row), options)
    alone = time.perf_counter() - started
    started = time.perf_counter()
    together(requests, batcher, options, rows)
    at_once = time.perf_counter() - started
    count = rows * options.max_new_tokens
    return {"one_after_another": count / alone, "at_once": count / at_once, "ratio": alone / at_once}


def first_tokens(requests: Requests, batcher: Batcher, options: Options, clients: int, each: int) -> dict[str, float]:
    """Seconds from asking to the first token: of one who is alone, of clients who ask on and on, and in a burst."""

    def ask(row: int) -> float:
        return batcher.submit(requests.prompt(row), options).result().seconds_to_first

    requests.next_round()
    ask(0)  # and the one picture is known
    started = time.perf_counter()
    idle = [ask(row) for row in range(1, 2 * each + 1)]
    length = (time.perf_counter() - started) / len(idle)

    def ask_on_and_on(client: int) -> list[float]:
        time.sleep(client * length / clients)
        return [ask(number) for number in range(1000 + client * each, 1000 + (client + 1) * each)]

    with ThreadPoolExecutor(clients) as pool:
        busy = [seconds for found in pool.map(ask_on_and_on, range(clients)) for seconds in found]
    burst = [answer.seconds_to_first for answer in together(requests, batcher, options, clients)]
    return {
        "idle_median": statistics.median(idle), "idle_p95": p95(idle),
        "busy_median": statistics.median(busy), "busy_p95": p95(busy), "p95_ratio": p95(busy) / p95(idle),
        "burst_median": statistics.median(burst), "burst_last": max(burst),
    }  # fmt: skip


def p95(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=20, method="inclusive")[-1]


def measure(answerer: Answerer, options: Namespace) -> dict[str, dict[str, float]]:
    answerer.end_ids = frozenset()  # nothing ends an answer but its length
    how, result = Options(max_new_tokens=options.new_tokens), {}
    batcher = Batcher(answerer, most_rows=options.rows, most_waiting=4 * options.rows)
    for kind in KINDS[: None if answerer.reader.sees else 1]:
        requests = Requests(answerer, kind)
        throughput(requests, batcher, Options(max_new_tokens=2), options.rows)  # warms up
        rounds = [throughput(requests, batcher, how, options.rows) for _ in range(options.repetitions)]
        speeds = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
        result[kind] = speeds | first_tokens(requests, batcher, how, options.clients, options.each)
        print(table(kind, result[kind], options), flush=True)
    batcher.close(0)
    return result


def table(kind: str, found: dict[str, float], options: Namespace) -> str:
    shown = {name: f"{1000 * value:,.0f}" for name, value in found.items()}  # ms
    return (
        f"{kind.replace('_', ' ')}, {options.rows} answers: one after another {found['one_after_another']:,.0f} "
        f"tokens/s, at once {found['at_once']:,.0f}: {found['ratio']:.2f}x\n"
        f"  first token, ms: alone {shown['idle_median']} (p95 {shown['idle_p95']}), of {options.clients} who ask on "
        f"and on {shown['busy_median']} (p95 {shown['busy_p95']}: {found['p95_ratio']:.2f}x), "
        f"in a burst {shown['burst_median']} (last {shown['burst_last']})"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, help="weights to ask; by default random ones of the 26 M model")
    parser.add_argument("--rows", type=int, default=16, help="requests at once for the throughput")
    parser.add_argument("--clients", type=int, default=8, help="who ask on and on for the first token")
    parser.add_argument("--each", type=int, default=10, help="requests of each client")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "auto", "bfloat16"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    try:
        if options.weight:
            answerer = Answerer.from_weight(options.weight, device=options.device, dtype=options.dtype)
        else:
            torch.manual_seed(0)
            device = choose_device(options.device)
            answerer = Answerer(MiniMindVLM(VLMConfig()), device, choose_dtype(options.dtype, device))
    except UserError as error:
        raise SystemExit(f"at_once: {error}") from error
    result = measure(answerer, options)
    settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    write_figures(options.json, {"settings": settings, "machine": machine, **result})


if __name__ == "__main__":
    main()
