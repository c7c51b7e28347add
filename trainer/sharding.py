"""How a model is spread over the ranks: whole on each of them."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.runtime import Runtime


def distribute(model: nn.Module, runtime: Runtime) -> nn.Module:
    """What the loop calls in place of the model, with gradients averaged over the ranks; alone the model itself."""
    return replicated(model) if runtime.world_size > 1 else model


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
