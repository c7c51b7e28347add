"""Two machines, played by two network namespaces with a cable between them, train as two ranks of one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.models import SIZES
from helpers.repository import ROOT
from helpers.runs import assert_bit_equal, weights_of
from trainer.config import StageConfig

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29431
FILES = {"hosts": "127.0.0.1 localhost\n", "resolv.conf": "nameserver 127.0.0.1\n"}  # no name server: none to wait for


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    """Names of two namespaces that reach each other and nothing else."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("two network namespaces need root and iproute2")
    names = [f"vlm{os.getpid()}_{number}" for number in range(2)]
    ends = [f"e{os.getpid()}_{number}" for number in range(2)]
    with contextlib.ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name, check=False)
            first, second = (("name", end, "netns", name) for end, name in zip(ends, names, strict=True))
            ip("link", "add", *first, "type", "veth", "peer", *second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine makes no network namespaces: {error.stderr.decode().strip()}")
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
            files = Path("/etc/netns", name)
            files.mkdir(parents=True)
            stack.callback(shutil.rmtree, files)
            for file, content in FILES.items():
                (files / file).write_text(content)
        yield names


def start(machine: str, number: int, config: dict) -> subprocess.Popen:
    """torchrun on one machine, with one process."""
    flags = [str(part) for name, value in config.items() for part in (f"--{name}", value)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
                "--rdzv_backend", "c10d", "--rdzv_id", "pair", "--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}",
                "--rdzv_conf", f"is_host={1 - number}", "--local_addr", ADDRESSES[number]]  # fmt: skip
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": f"e{os.getpid()}_{number}"}
    return subprocess.Popen(
        ["ip", "netns", "exec", machine, *launcher, str(ROOT / "trainer/train_sft_vlm.py"), *flags],
        env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def together(machines: list[str], configs: list[dict]) -> list[tuple[int, str]]:
    """Exit status and words of each machine's torchrun."""
    running = [start(machine, number, configs[number]) for number, machine in enumerate(machines)]
    try:
        words = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return [(process.returncode, said) for process, said in zip(running, words, strict=True)]


@pytest.fixture
def flags(data_folder, tower_folder) -> dict:
    return {**SIZES, "data_path": data_folder / "train.jsonl", "vision_model": tower_folder, "from_weight": "none",
            "device": "cpu", "dtype": "float32", "num_workers": 0, "log_interval": 1, "val_samples": 0, "batch_size": 4,
            "save_interval": 2, "max_seq_len": 64}  # fmt: skip


def config_of(folder: Path) -> StageConfig:
    return StageConfig(name="sft_vlm", hidden_size=SIZES["hidden_size"], save_dir=str(folder))


def test_two_machines_train_as_two_ranks_of_one(machines, flags, tmp_path):
    """With a folder each: weights, metrics and checkpoints are where rank 0 is."""
    apart = [{**flags, "save_dir": tmp_path / f"machine_{number}"} for number in range(2)]
    ended = together(machines, apart)
    assert [code for code, _ in ended] == [0, 0], ended[0][1][-2000:] + ended[1][1][-2000:]
    (folder,) = [one["save_dir"] for one in apart if config_of(one["save_dir"]).weight_path.is_file()]
    alone = tmp_path / "one_machine"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, ROOT / "trainer/train_sft_vlm.py"]
    command += [part for name, value in {**flags, "save_dir": alone}.items() for part in (f"--{name}", value)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*map(str, command)], env={**os.environ, **settings}, check=True, capture_output=True, timeout=200)
    assert_bit_equal(weights_of(config_of(folder)), weights_of(config_of(alone)))
