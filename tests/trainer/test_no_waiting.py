"""A training step asks a device for nothing that the host would have to wait for."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.batching import Row
from dataset.readers.opening import read_samples
from dataset.step_batch import StepBatches
from dataset.vlm_dataset import ConversationDataset
from helpers.models import SIZES
from model.config import MiniMindConfig
from model.model_minimind import MiniMindForCausalLM
from trainer.config import StageConfig
from trainer.distributed import Runtime
from trainer.loop import train_step
from trainer.optim import build_optimizer
from trainer.order import Order
from trainer.run import Run

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")
ALLOWED = {"_cross_entropy"}  # its branch that only a CPU takes


class NoWaiting(TorchDispatchMode):
    """Refuses every operation whose outcome, or its size, the host must know."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(part is not None and part.dtype == torch.bool for part in arguments[1])
        if (name in WAITING or by_mask) and not ALLOWED & set(callers()):
            raise AssertionError(f"{name} within {', '.join(callers()[:6])}")
        return function(*arguments, **(options or {}))


def callers() -> list[str]:
    frame, names = sys._getframe(1), []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names


def step(model, optimizer, device: str, share) -> dict:
    """One train_step; its counts are taken from the share as `train` takes them."""
    runtime = Runtime(0, 1, torch.device(device), torch.float32)
    batches = [runtime.to_device(batch) for batch in share.micro_batches]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    order = Order(torch.ones(6), 6, 1, 1, 1, 0)
    run = Run(StageConfig(grad_clip=1.0), runtime, model, model.train(), optimizer, scaler, order, {})
    return train_step(run, batches, share.counts.supervised)


@pytest.fixture
def share(data_folder, processor):
    data = ConversationDataset(read_samples(data_folder / "train.jsonl"), processor, 64)
    return StepBatches(data)[[[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize("waits", ["", "item", "bool", "nonzero", "mask"])
def test_the_watch_sees_what_waits(waits):
    x = torch.ones(3)
    asking = {"item": x.sum().item, "bool": lambda: bool(x.any()), "nonzero": x.nonzero, "mask": lambda: x[x > 0]}
    with NoWaiting():
        (x * 2).sum()
        if waits:
            with pytest.raises(AssertionError, match="within"):
                asking[waits]()


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_of_a_model_that_sees_waits_for_nothing(optimizer, use_moe, make_vlm, share):
    model = make_vlm(use_moe=use_moe)
    optimizer = build_optimizer(model, StageConfig(optimizer=optimizer))
    step(model, optimizer, "cpu", share)  # makes the optimizer's state
    before = model.lm_head.weight.clone()
    with NoWaiting():
        values = step(model, optimizer, "cpu", share)
    assert values["loss"].isfinite() and not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("sees", [False, True])
def test_step_on_a_device_that_holds_no_numbers(sees, use_moe, make_vlm, processor, share):
    """`meta` tensors have shapes alone: to ask one for a number, or for a size that depends on numbers, is an error."""

    class Descent(torch.optim.Optimizer):
        """Skips a step on the device, as the fused optimizers say that they do."""

        def __init__(self, parameters):
            super().__init__(parameters, {"fused": True})

        @torch.no_grad()
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.copy_(torch.where(self.found_inf.bool(), parameter, parameter - 0.1 * parameter.grad))

    if sees:
        model = make_vlm(use_moe=use_moe).to("meta")
    else:
        model = MiniMindForCausalLM(MiniMindConfig(**SIZES, use_moe=use_moe)).to("meta")
        rows = [Row(processor.render_text(text), []) for text in ("a cat", "a dog and a cat", "one", "two or three")]
        share = StepBatches(rows)[[[0, 1], [2, 3]]]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = step(model, Descent(learning), "meta", share)
    assert {value.device.type for value in values.values()} == {"meta"} and values["loss"].shape == ()
    with pytest.raises(RuntimeError, match="meta"):
        float(values["loss"])
