"""Where a run runs: ranks, device, arithmetic, the few collectives that training needs; the model over the ranks."""

import contextlib
import datetime
import gc
import itertools
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from model.device import choose_device, choose_dtype, keep_few_kernels, to_device
from model.messages import UserError

START_TIMEOUT = datetime.timedelta(seconds=600)  # ranks may read their data at different speeds
TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("DIST_TIMEOUT_SECONDS", "120")))  # once they train


_joined: list = []  # host group and store, once there are some
_meetings = itertools.count()


class RanksLost(RuntimeError):
    """A collective failed: another rank has died or hangs."""


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of the arithmetic; weights stay in float32
    host_group: dist.ProcessGroup | None = None  # all ranks over the CPU, for what must not wait for a GPU; None: as is
    store: dist.Store | None = None  # where ranks leave their step, for the others to name who is missing

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print0(self, line: object) -> None:
        """Print on rank 0 alone."""
        if self.is_main:
            print(line, flush=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the ranks; over the CPU, so that no GPU is waited for."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def gather(self, value: object) -> list:
        """The value of every rank, in order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def from_main(self, find: Callable[[], object]) -> object:
        """What `find` returns on rank 0, on every rank; a UserError that it raises there is raised on all."""
        outcome = None
        if self.is_main:
            try:
                outcome = (find(), None)
            except UserError as error:
                outcome = (None, str(error))
        self.wait_for_all()  # whatever rank 0 was doing may have taken minutes
        value, refusal = self.gather(outcome)[0]
        if refusal is not None:
            raise UserError(refusal)
        return value

    def max(self, value: int) -> int:
        """The largest value of any rank; over the CPU, so that no GPU is waited for."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.host_group)
        return int(largest)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier(group=self.host_group)

    def wait_for_all(self) -> None:
        """Before training, when ranks may be minutes apart."""
        if self.store is not None:
            _meet(self.store, self.rank, self.world_size)

    def leave_step(self, step: int) -> None:
        """Let the other ranks know how far this one is."""
        if self.store is not None:
            self.store.set(f"step_of_rank_{self.rank}", str(step))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Turn the failure of a collective into RanksLost."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size > 1 and (isinstance(error, dist.DistError) or re.search("gloo|NCCL", str(error))):
                raise self.lost(error) from error
            raise

    def lost(self, error: Exception) -> "RanksLost":
        """A failed collective in words: who is behind, and how to go on."""
        steps = {}
        try:
            self.store.set_timeout(datetime.timedelta(seconds=3))
            steps = {rank: int(self.store.get(f"step_of_rank_{rank}")) for rank in range(self.world_size)}
        except RuntimeError:  # DistStoreError: the launcher that holds the store is gone as well
            missing = "which one is not known"
        else:
            behind = [rank for rank in steps if steps[rank] == min(steps.values()) and rank != self.rank]
            missing = f"rank {' or '.join(map(str, behind))}, last seen at step {min(steps.values())}"
        return RanksLost(
            f"rank {self.rank} at step {steps.get(self.rank, '?')} lost another rank ({missing}): "
            f"{str(error).splitlines()[0][:150]}. torchrun --max-restarts N, or --from_resume 1, goes on from the last "
            "checkpoint"
        )

    def to_device(self, batch: dict) -> dict:
        """Its tensors; what else there is stays on the host."""
        return to_device(batch, self.device)


def start_runtime(device: str = "auto", dtype: str = "auto", seed: int = 42) -> Runtime:
    """Join the ranks that torchrun started, or be alone; choose device and arithmetic; seed everything."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    keep_few_kernels()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    host_group = store = None
    if world_size > 1:
        host_group, store = _join(rank, world_size, "nccl" if chosen.type == "cuda" else "gloo")
    if world_size > 1 and chosen.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    # All ranks alike: data order and first weights must agree. Dropout differs by rank, see run_stage.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return Runtime(rank, world_size, chosen, choose_dtype(dtype, chosen), host_group, store)


def _join(rank: int, world_size: int, backend: str) -> tuple[dist.ProcessGroup | None, dist.Store]:
    """Form the group of all ranks; the same over the CPU (None: it is), and the store where they found each other."""
    if not dist.is_initialized():
        found, _, _ = next(rendezvous("env://", timeout=START_TIMEOUT))
        # torchrun keeps its store over restarts: without a prefix of its own an attempt would read the addresses of the
        # one before, and ranks would wait for connections that nobody makes.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)
        _meet(store, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        _joined[:] = [None if backend == "gloo" else dist.new_group(backend="gloo", timeout=TIMEOUT), store]
    host_group, store = _joined
    return host_group, store


def _meet(store: dist.Store, rank: int, world_size: int) -> None:
    """Wait for all ranks at a place where they may be far apart."""
    place = next(_meetings)
    store.set(f"place_{place}_rank_{rank}", "there")
    store.wait([f"place_{place}_rank_{other}" for other in range(world_size)], START_TIMEOUT)


def stop_runtime() -> None:
    """Leave the group of ranks. Nothing may hold a DistributedDataParallel any more: were that the last to let go of
    the group, it would wait for gloo's threads while it holds the lock that they need, and the process would hang.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- how a model is spread over the ranks: whole on each of them (DDP), or in parts (FSDP2)


def distribute(model: nn.Module, shard: bool, runtime: Runtime) -> nn.Module:
    """What the loop calls in place of the model; its gradients are means over the ranks. Alone it is the model itself.

    Before the optimizer is built: --shard 1 puts other parameters into the model, of which each rank holds its part.
    """
    if runtime.world_size == 1:
        if shard:
            runtime.print0("--shard 1 changes nothing with one rank: start several with torchrun --nproc_per_node N")
        return model
    return sharded(model, runtime) if shard else replicated(model)


def replicated(model: nn.Module) -> DistributedDataParallel:
    """The model whole on every rank; what learns is sent from rank 0 once, now, and nothing else ever is.

    What is frozen (the tower above all) every rank has read or drawn by itself, and the fingerprints say whether it is
    the same. Buffers are computed from the config; DDP would send them in every step.
    """
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    buffers = [name for name, _ in model.named_buffers()]
    # By name, because the argument for buffers has another name in every second version of torch.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [*frozen, *buffers])
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def sharded(model: nn.Module, runtime: Runtime) -> nn.Module:
    """The same model with every decoder layer, and what is left around them, cut into world_size parts.

    A layer is whole only while it computes; weights, gradients and the optimizer's state are parts. The embeddings and
    the head share a tensor, so they stay in one group. The tower stays whole on every rank: it has no gradient and no
    state, and is small beside a decoder that needs this; in parts it would be sent in every step. Gradients are cut
    after each micro-batch, not once a step, because until then they would be whole.
    """
    mesh = init_device_mesh(runtime.device.type, (runtime.world_size,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    tower = getattr(model, "vision_encoder", None)
    whole_everywhere = set(tower.parameters()) if tower is not None else set()
    return fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole_everywhere)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor put together from the parts of all ranks, which all must call; one that is whole as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(tensors: Iterable[tuple[str, torch.Tensor]], keep: bool) -> dict[str, torch.Tensor]:
    """Each put together, one after the other; every rank must call, and only those that keep them get any."""
    gathered = {}
    for name, tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            if keep:  # not on the device, where the whole model might not fit
                gathered[name] = tensor.cpu()
        elif keep:
            gathered[name] = tensor
    return gathered


def local_part(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a whole tensor that belongs to the parameter: all of it, or the parameter's cut of it."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)  # nothing is sent
