"""Many clients at once against the real server, with OpenAI's own client; prints a table and JSON, ends with 1 if bad.

    python tests/engines/load_server.py --weight out/quickstart/sft_vlm_192.safetensors \
        --data out/quickstart/data/held_out.jsonl

1. Load: 32 clients with 20 requests each, a third with pictures, a tenth hostile or cut off. Every sound one must get
   the text that `eval_vlm.py` gives, and nobody an error that is no refusal.
2. Speed: 16 at once against one after another, and the first token with 8 at once against none beside. Of a 26 M model
   behind a tower of CLIP-B/16's size with random weights, which says as much as it may (--speed_weight: of another).
3. Memory, before and after 2,000 requests.

What was wrong in 1 and 3 makes it fail; figures of 2 are only for a quiet machine, and stand beside the bars.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import openai
import psutil
import torch
from asking import HOSTILE, Ask, Server, first_token, noise, send, serve

from model.config import VLMConfig
from model.model_vlm import MiniMindVLM
from model.weights import save_weights

ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS, SPEED_TOKENS = 64, 64
MOST_GROWTH = 30.0  # MB, over all requests but the first quarter
BARS = {"text": 4.0, "one picture": 4.0, "own pictures": 1.5}  # times one after another
FIRST_TOKEN_BAR = 3.0  # times the idle one
ANSWERED, REFUSED, LEFT, BUSY = "answered", "refused", "left", "busy"


# 1. load


def sound_asks(data: Path, count: int) -> list[Ask]:
    """Questions of a file with their pictures, and as many without; every second of the latter in a stream."""
    lines = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    asks = []
    for line in lines[:: max(1, len(lines) // count)][:count]:
        question = line["conversations"][0]["content"].replace("<image>\n", "")
        asks += [Ask(question, data.parent / "images" / line["image"]), Ask(question)]
    return asks


def truths(asks: Sequence[Ask], weight: Path, dtype: str, scratch: Path) -> dict[Ask, str]:
    """What eval_vlm.py says, asked one by one."""
    questions, answers = scratch / "questions.jsonl", scratch / "answers.jsonl"
    with questions.open("w", encoding="utf-8") as file:
        for ask in asks:
            content = f"<image>\n{ask.text}" if ask.picture else ask.text
            picture = {"image": str(ask.picture)} if ask.picture else {}
            file.write(json.dumps({**picture, "conversations": [{"role": "user", "content": content}]}) + "\n")
    images = str(asks[0].picture.parent)
    command = [sys.executable, str(ROOT / "eval_vlm.py"), "--weight", str(weight), "--data", str(questions), "--output",
               str(answers), "--images_path", images, "--batch_size", "1", "--max_new_tokens", str(NEW_TOKENS),
               "--dtype", dtype]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = [json.loads(line)["answer"] for line in answers.read_text(encoding="utf-8").splitlines()]
    return dict(zip(asks, found, strict=True))


@dataclass
class Tally:
    outcomes: Counter = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, outcome: str, seconds: float, problem: str = "") -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            if outcome == ANSWERED:
                self.seconds.append(seconds)
            if problem:
                self.wrong.append(problem[:400])


def one_client(server: Server, number: int, requests: int, expected: dict[Ask, str], tally: Tally) -> None:
    chance = Random(number)
    with_picture = [ask for ask in expected if ask.picture]
    without = [ask for ask in expected if not ask.picture]
    with server.client() as client:
        for step in range(requests):
            index = number * requests + step
            name = list(HOSTILE)[index // 10 % len(HOSTILE)] if index % 10 == 3 else ""
            ask = chance.choice(with_picture if index % 3 == 0 else without)
            outcome = BUSY
            while outcome == BUSY:  # and people try again
                started = time.perf_counter()
                try:
                    outcome, problem = attempt(server, client, ask, expected[ask], name, stream=bool(index % 2))
                except openai.RateLimitError:
                    outcome, problem = BUSY, ""
                except Exception as error:
                    outcome, problem = "error", f"{type(error).__name__}: {error}"
                seconds = time.perf_counter() - started
                tally.note(outcome, seconds, problem and f"client {number}, request {step}, {name or ask}: {problem}")
                time.sleep(chance.uniform(0.5, 1.5) if outcome == BUSY else 0)


def attempt(server: Server, client: openai.OpenAI, ask: Ask, expected: str, name: str, stream: bool) -> tuple[str, str]:
    """(outcome, what was wrong with it)."""
    if name:
        status = HOSTILE[name](server, client)
        wanted = {"too large": 413, "stream cut off": 200, "body cut off": 0}.get(name, 400)
        problem = "" if status == wanted else f"status {status} for {wanted}"
        return (LEFT if wanted in (0, 200) else REFUSED), problem
    said = send(client, ask, NEW_TOKENS, stream=stream).text.strip()
    return ANSWERED, "" if said == expected else f"{said!r} for {expected!r}"


def load(server: Server, clients: int, requests: int, expected: dict[Ask, str]) -> dict:
    tally, started = Tally(), time.perf_counter()
    threads = [
        threading.Thread(target=one_client, args=(server, number, requests, expected, tally))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = list(tally.wrong)
    wrong += ["the server ended"] if server.process.poll() is not None else []
    wrong += ["a traceback in the log"] if "Traceback" in server.log else []
    return {
        "clients": clients, "requests": clients * requests, "seconds": round(time.perf_counter() - started, 1),
        **tally.outcomes, "answer_seconds_median": round(percentile(tally.seconds, 0.5), 3),
        "answer_seconds_p95": round(percentile(tally.seconds, 0.95), 3), "wrong": wrong,
    }  # fmt: skip


# 2. speed


def speed_asks(kind: str, count: int, first: int) -> list[Ask]:
    """That nobody has asked before: numbered from `first`."""
    pictures = {"text": lambda number: None, "one picture": lambda number: noise(0), "own pictures": noise}
    return [
        Ask(f"What is number {number}, and where?", pictures[kind](number)) for number in range(first, first + count)
    ]


def rate(server: Server, asks: Sequence[Ask], at_once: int) -> float:
    """Tokens of answers a second."""
    with server.client() as client, ThreadPoolExecutor(at_once) as pool:
        started = time.perf_counter()
        tokens = sum(pool.map(lambda ask: send(client, ask, SPEED_TOKENS).tokens, asks))
        return tokens / (time.perf_counter() - started)


def speeds(server: Server, kind: str, rows: int, repetitions: int) -> dict:
    """Neighbours in time are compared: other programs disturb both alike."""
    fresh = iter(range(1000, 10**9, 1000))
    rate(server, speed_asks(kind, 2, next(fresh)), 1)
    pairs = [
        (rate(server, speed_asks(kind, rows, next(fresh)), 1), rate(server, speed_asks(kind, rows, next(fresh)), rows))
        for _ in range(repetitions)
    ]
    alone, together, ratio = (
        percentile(column, 0.5) for column in zip(*[(*p, p[1] / p[0]) for p in pairs], strict=True)
    )
    return {"tokens_a_second_one_by_one": round(alone, 1), f"at_once_{rows}": round(together, 1),
            "ratio": round(ratio, 2), "bar": BARS[kind], "reached": ratio >= BARS[kind]}  # fmt: skip


def first_tokens(server: Server, kind: str, at_once: int, count: int) -> dict:
    """p95 of the seconds to the first text, with nobody beside and with others who ask all the time.

    Those ask for answers of different lengths, as people do, or all would begin anew together. That they do once, in
    the beginning: a burst, which is shown by itself.
    """
    numbers = iter(range(10**6, 10**9, count))
    with server.client() as client, ThreadPoolExecutor(at_once) as pool:

        def one_after_another(seed: int) -> list[float]:
            chance, asks = Random(seed), speed_asks(kind, count, next(numbers))
            return [first_token(client, ask, chance.randrange(8, 2 * SPEED_TOKENS - 8)) for ask in asks]

        idle = one_after_another(0)
        clients = list(pool.map(one_after_another, range(at_once)))
    busy = [seconds for times in clients for seconds in times[1:]]
    idle_p95, busy_p95, burst_p95 = (percentile(times, 0.95) for times in (idle, busy, [times[0] for times in clients]))
    return {"idle_p95_ms": round(1000 * idle_p95), f"at_once_{at_once}_p95_ms": round(1000 * busy_p95),
            f"burst_of_{at_once}_p95_ms": round(1000 * burst_p95), "ratio": round(busy_p95 / idle_p95, 2),
            "bar": FIRST_TOKEN_BAR, "reached": busy_p95 <= FIRST_TOKEN_BAR * idle_p95}  # fmt: skip


def random_weight(scratch: Path) -> Path:
    torch.manual_seed(0)
    path = scratch / "sft_vlm_512.safetensors"
    save_weights(MiniMindVLM(VLMConfig()), path, {"stage": "sft_vlm"})
    return path


# 3. memory


def memory(server: Server, requests: int, asks: Sequence[Ask]) -> dict:
    """MB of the server while new pictures and known ones are asked about."""
    process, samples = psutil.Process(server.process.pid), []
    before = process.memory_info().rss
    with server.client() as client, ThreadPoolExecutor(8) as pool:
        for start in range(0, requests, 100):
            batch = [Ask(f"{number}?", noise(number)) if number % 4 == 0 else asks[number % len(asks)]
                     for number in range(start, min(start + 100, requests))]  # fmt: skip
            list(pool.map(lambda ask: send(client, ask, 8), batch))
            samples.append(process.memory_info().rss)
    settled = samples[len(samples) // 4]
    growth = (samples[-1] - settled) / 1024**2
    return {"requests": requests, "before_mb": round(before / 1024**2), "after_a_quarter_mb": round(settled / 1024**2),
            "after_mb": round(samples[-1] / 1024**2), "peak_mb": round(max(samples) / 1024**2),
            "growth_mb": round(growth, 1), "wrong": ["memory grows"] if growth > MOST_GROWTH else []}  # fmt: skip


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, round(share * len(values)))] if values else 0.0


def table(figures: dict, path: str = "") -> list[str]:
    rows = []
    for name, value in figures.items():
        rows += table(value, f"{path}{name}, ") if isinstance(value, dict) else [f"| {path}{name} | {value} |"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=Path, required=True, help="what load and memory are measured with")
    parser.add_argument("--data", type=Path, required=True, help="a .jsonl of questions with images/ beside it")
    parser.add_argument("--speed_weight", type=Path, help="what speed is measured with; by default random, 26 M")
    parser.add_argument("--dtype", default="float32", help="of all")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=20, help="of each client")
    parser.add_argument("--steady", type=int, default=2000, help="requests that memory is watched over")
    parser.add_argument("--repetitions", type=int, default=3, help="of each speed; the median counts")
    parser.add_argument("--only", nargs="+", choices=["load", "speed", "memory"], default=["load", "speed", "memory"])
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    options = parser.parse_args()
    figures: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        asks = sound_asks(options.data.resolve(), 60)
        parts: dict[str, Callable[[Server], dict]] = {
            "memory": lambda server: memory(server, options.steady, asks),
        }
        if "load" in options.only:
            expected = truths(asks, options.weight, options.dtype, scratch)
            parts["load"] = lambda server: load(server, options.clients, options.requests, expected)
        for name in ("load", "memory"):
            if name in options.only:
                with serve(options.weight, options.dtype, scratch) as server:
                    figures[name] = parts[name](server)
        if "speed" in options.only:
            weight = options.speed_weight or random_weight(scratch)
            with serve(weight, options.dtype, scratch) as server:
                for kind in BARS:
                    figures[f"throughput, {kind}"] = speeds(server, kind, 16, options.repetitions)
                for kind in BARS:
                    figures[f"first token, {kind}"] = first_tokens(server, kind, 8, 10)
    print("\n".join(["| figure | value |", "|---|---|", *table(figures)]))
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    sys.exit(any(part.get("wrong") for part in figures.values()))


if __name__ == "__main__":
    main()
