"""What a longer conversation costs an answer: seconds to read it, seconds a further token, and memory.

    OMP_NUM_THREADS=1 python scripts/measure/long_context.py --lengths 1024 4096 16384 --json out/long_context.json

Each length is measured in a process of its own, so that its peak of memory is its own. Next to each figure stands its
ratio to that of the first length in the same run, which another machine disturbs less. Without --weight a dense decoder
of 26 M parameters with random weights reads; what is read is random as well, which costs the same.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from model.command_line import CommandLine
from model.config import MiniMindConfig
from model.device import choose_device, choose_dtype
from model.inference.answerer import Answerer, add_weight_flags
from model.inference.reader import Prompt
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from scripts.measure.figures import write_figures

FIGURES = {  # in the table: name, scale, unit
    "prefill_seconds": ("prefill", 1.0, "s"),
    "token_seconds": ("a token", 1e3, "ms"),
    "cache_bytes": ("cache", 1e-6, "MB"),
    "peak_bytes": ("peak", 1e-6, "MB"),
}
KILOBYTE = 1 if sys.platform == "darwin" else 1024  # what ru_maxrss counts in


def measure_one(answerer: Answerer, length: int, new_tokens: int) -> dict[str, float]:
    """Of one conversation: seconds for all of it and for each further token, bytes of its keys and values, and by how
    much the process grew at most since before. Meant for a process that has read nothing so long yet.

    Raises:
        UserError: the model does not read so many tokens.
    """
    if length + new_tokens >= answerer.max_length:
        raise UserError(f"--lengths {length} with {new_tokens} new tokens: the model reads {answerer.max_length}")
    vocabulary = answerer.model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    before, times = _peak(answerer.device), []
    with torch.inference_mode():
        started = time.perf_counter()
        logits, cache = answerer.reader.start([Prompt(ids, [False] * length)])
        token = logits.argmax(-1)
        token.item()  # waits for a GPU
        prefill = time.perf_counter() - started
        for _ in range(new_tokens):
            started = time.perf_counter()
            token = answerer.reader.step(token, cache).argmax(-1)
            token.item()
            times.append(time.perf_counter() - started)
    filled = cache.filled
    return {
        "prefill_seconds": prefill, "token_seconds": statistics.median(times),
        "cache_bytes": filled.numel() * filled.element_size(), "peak_bytes": _peak(answerer.device) - before,
    }  # fmt: skip


def _peak(device: torch.device) -> int:
    """Bytes: of the process so far, or on a GPU of its tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KILOBYTE


def make_answerer(options: argparse.Namespace) -> Answerer:
    if options.weight:
        return Answerer.from_flags(options)
    torch.manual_seed(0)
    device = choose_device(options.device)
    return Answerer(MiniMindForCausalLM(MiniMindConfig()), device, choose_dtype(options.dtype, device))


def measure(options: argparse.Namespace, arguments: list[str]) -> dict[int, dict[str, float]]:
    """By length. arguments: of the command line, which each process gets as well."""
    found = {}
    for length in options.lengths:
        command = [sys.executable, __file__, *arguments, "--one", str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"--lengths {length}: {(done.stderr or done.stdout).strip()[-500:]}")
        found[length] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[int, dict[str, float]]) -> str:
    first = next(iter(found.values()))
    titles = "".join(f"{f'{title}, {unit}':>14}{'ratio':>8}" for title, _, unit in FIGURES.values())
    lines = [f"{'tokens':>8}{titles}"]
    for length, figures in found.items():
        cells = "".join(
            f"{figures[name] * scale:>14.2f}{figures[name] / first[name]:>7.1f}x" if first[name] else f"{'-':>22}"
            for name, (_, scale, _) in FIGURES.items()
        )
        lines.append(f"{length:>8}{cells}")
    return "\n".join(lines)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add_weight_flags(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens that are read")
    parser.add_argument("--new_tokens", type=int, default=32, help="that are then said")
    parser.add_argument("--one", type=int, help="this length alone, here and now, as JSON")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    if min(*options.lengths, options.new_tokens, options.one or 1) < 1:
        parser.error("--lengths and --new_tokens must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        if options.one:
            print(json.dumps(measure_one(make_answerer(options), options.one, options.new_tokens)))
            return
        found = measure(options, arguments)
    except UserError as error:
        raise SystemExit(f"long_context: {error}") from error
    print(table(found))
    write_figures(options.json, found)


if __name__ == "__main__":
    main()
