"""Which versions: write the locks (`make lock`), or run the whole suite at either end of the ranges of pyproject.toml.

    python tests/versions.py lock [--upgrade]    requirements.txt and requirements/*.txt
    python tests/versions.py oldest              the lowest version that each range of pyproject.toml allows
    python tests/versions.py newest              the newest of everything, transformers beyond its upper bound too

torch is left at the locked version: another one is gigabytes, and has its own driver to please. What torch itself pins
(CUDA's libraries) is left to torch.
"""

import argparse
import functools
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.txt"
EXTRAS = ("dev", "browser", "tokenizer", "hub", "real", "trl", "judges", "gguf", "onnx", "video", "engines")
PINNED_BY_TORCH = re.compile(r"(nvidia|cuda|triton)\b")
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;]+)")
UV = "uv==0.13.9"
Pins = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("lock", "oldest", "newest"))
    parser.add_argument("--upgrade", action="store_true", help="lock: the newest that the ranges allow")
    parser.add_argument("pytest", nargs="*", help="oldest, newest: arguments for pytest, after --")
    options = parser.parse_args()
    if options.what == "lock":
        write_locks(options.upgrade)
    else:
        raise SystemExit(run_suite(options.what, options.pytest))


def write_locks(upgrade: bool) -> None:
    """Every lock holds all that its command installs, direct and indirect; the extras agree with requirements.txt."""
    flags = ["--upgrade"] if upgrade else []
    resolve(LOCK, *flags)
    for extra in EXTRAS:
        resolve(LOCK.parent / f"requirements/{extra}.txt", "--extra", extra, "--constraint", str(LOCK), *flags)
    with LOCK.open("a") as file:
        file.write("# the project itself, in place\n-e .\n")


def resolve(path: Path, *flags: str) -> None:
    """Let uv choose the versions, for every Python and system at once, keeping those that the file has."""
    command = [python_of("lock", UV), "-m", "uv", "pip", "compile", "--quiet", "--universal", "--no-annotate"]
    command += ["--custom-compile-command", "make lock", *flags, "pyproject.toml", "--output-file", str(path)]
    subprocess.run(command, cwd=ROOT, check=True)
    lines = [line for line in path.read_text().splitlines() if not PINNED_BY_TORCH.match(line)]
    path.write_text("\n".join(lines) + "\n")


def run_suite(what: str, pytest_arguments: list[str]) -> int:
    """In a fresh venv; ends with a table of what differs from the lock. Returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "chosen.txt"
        if what == "oldest":
            flags = ("--resolution", "lowest-direct")
        else:
            beyond = Path(folder) / "beyond.txt"
            beyond.write_text("transformers\n")
            flags = ("--upgrade", "--override", str(beyond))
        resolve(chosen, "--extra", "dev", *flags)
        pins = read_pins(chosen) | {"torch": read_pins(LOCK)["torch"]}
        chosen.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        python = python_of(what, "-r", str(chosen), "-e", ".")
    subprocess.run([python, "-m", "pip", "check"], check=True)
    suite = [python, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile"]
    code = subprocess.run([*suite, *pytest_arguments], cwd=ROOT, check=False).returncode
    freeze = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    print(table(read_pins(LOCK) | read_pins(ROOT / "requirements/dev.txt"), parse_pins(freeze), code), flush=True)
    return code


@functools.cache
def python_of(name: str, *requirements: str) -> str:
    """The interpreter of a fresh venv beside the project's own, with these requirements installed."""
    folder = ROOT / f".venv-{name}"
    venv.create(folder, with_pip=True, clear=True)
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], cwd=ROOT, check=True)
    return python


def read_pins(path: Path) -> Pins:
    return parse_pins(path.read_text())


def parse_pins(text: str) -> Pins:
    """Name as the index spells it to version, without what a build adds (+cpu); of lines whose marker holds here."""
    pins = {}
    for line in text.splitlines():
        if (found := PIN.match(line)) and applies(line):
            pins[re.sub(r"[-_.]+", "-", found[1]).lower()] = found[2].split("+")[0]
    return pins


def applies(line: str) -> bool:
    """Whether a line's marker holds here."""
    try:
        from packaging.markers import Marker
    except ImportError:  # the interpreter that makes the venvs has nothing but pip
        from pip._vendor.packaging.markers import Marker

    _, _, marker = line.partition(" ; ")
    return not marker or Marker(marker).evaluate()


def table(locked: Pins, tried: Pins, code: int) -> str:
    result = "passed" if code == 0 else f"failed (pytest's code {code})"
    rows = [(name, locked.get(name, "-"), tried[name]) for name in sorted(tried) if tried[name] != locked.get(name)]
    lines = ["| package | locked | tried | result |", "|---|---|---|---|"]
    lines += [f"| {name} | {old} | {new} | {result} |" for name, old, new in rows]
    return "\n".join([*lines, f"{len(tried) - len(rows)} further packages as locked: {result}"])


if __name__ == "__main__":
    main()
