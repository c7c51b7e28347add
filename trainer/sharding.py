"""How a model is spread over the ranks: whole on each of them (DDP), or in parts, a share on each (FSDP2)."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from trainer.config import StageConfig
from trainer.runtime import Runtime


def distribute(model: nn.Module, config: StageConfig, runtime: Runtime, say: Callable = print) -> nn.Module:
    """What the loop calls in place of the model; its gradients are means over the ranks. Alone it is the model itself.

    Before the optimizer is built: --shard 1 puts other parameters into the model, of which each rank holds its part.
    """
    if runtime.world_size == 1:
        if config.shard:
            say("--shard 1 changes nothing with one rank: start several with torchrun --nproc_per_node N")
        return model
    return sharded(model, runtime) if config.shard else replicated(model)


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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor put together from the parts of all ranks, which all must call; one that is whole as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Iterable[tuple[str, torch.Tensor]], keep: bool) -> dict[str, torch.Tensor]:
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


def own_part(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a whole tensor that belongs to the parameter: all of it, or the parameter's cut of it."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)  # nothing is sent
