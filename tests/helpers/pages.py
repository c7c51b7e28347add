"""The commands of a page or a notebook, run as a reader would run them, without a start of Python for each."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import torch

from helpers.faults import in_child
from helpers.repository import ROOT


def steps(page: Path) -> list[str]:
    """The shell commands and the Python programs of a page, in order."""
    found = []
    for kind, block in re.findall(r"```(sh|python)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        found += block.splitlines() if kind == "sh" else [block]
    return found


def follow(step: str, folder: Path) -> str:
    """Run a step in a folder; what it said. A Python program is a fork of this process, which has torch."""
    log = folder / "said.txt"
    log.unlink(missing_ok=True)
    status = in_child(lambda: _run(step, folder), log)
    said = log.read_text(encoding="utf-8", errors="replace")
    assert status == 0, f"{step}\n{said[-3000:]}"
    return said


def follow_notebook(notebook: Path, folder: Path, **environment: str) -> str:
    """Run the cells from top to bottom in one namespace, with these environment variables; what they said."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]

    def work() -> None:
        os.environ.update(environment)
        os.chdir(folder)
        names: dict = {"__name__": "__main__"}
        names["_shell"] = lambda line: _shell(re.sub(r"\{(\w+)\}", lambda found: str(names[found[1]]), line))
        for number, code in enumerate(codes):
            lines = re.sub(r"^( *)!(.*)$", lambda found: f"{found[1]}_shell({found[2]!r})", code, flags=re.MULTILINE)
            exec(compile(lines, f"cell {number}", "exec"), names)

    log = folder / "said.txt"
    log.unlink(missing_ok=True)
    status = in_child(work, log)
    said = log.read_text(encoding="utf-8", errors="replace")
    assert status == 0, said[-3000:]
    return said


def _run(step: str, folder: Path) -> None:
    os.chdir(folder)
    if "\n" in step:
        exec(compile(step, "the page's program", "exec"), {"__name__": "__main__"})
    else:
        _shell(step)


def _shell(line: str) -> None:
    """A line as a shell takes it; `python script.py ...` by a fork, and a failure is one here too."""
    words = shlex.split(line)
    if words[0] not in ("python", sys.executable) or not words[1].endswith(".py"):
        subprocess.run(line, shell=True, check=True, stdout=sys.stdout, stderr=subprocess.STDOUT)
        return
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # makes torch's pool anew before several threads ask a fork's for it at once
            sys.argv = [str(ROOT / words[1]), *words[2:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        except SystemExit as stopped:
            print(stopped.code or "")
            status = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"{line}: ended with {code}")
