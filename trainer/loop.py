"""The one loop: every stage trains here."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dataset.quarantine import collate_and_report
from dataset.vlm_dataset import ConversationDataset
from model.config import IGNORE_INDEX
from trainer.config import StageConfig
from trainer.finite import NumberWatch, carry_to_gradient, step_if_finite
from trainer.metrics import Metrics
from trainer.optim import rate_share, set_learning_rate
from trainer.order import Order
from trainer.resplit import ResplitOrder
from trainer.run_state import RunState
from trainer.runtime import Runtime
from trainer.saving import Saver
from trainer.sharding import whole
from trainer.signals import ignore_stopping
from trainer.steady_batches import POLL

Batch = dict[str, torch.Tensor]


def train(
    model: nn.Module,  # as it is, or what trainer.sharding.distribute made of it
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterator[Batch],
    order: Order | ResplitOrder,
    config: StageConfig,
    runtime: Runtime,
    metrics: Metrics,
    state: RunState,
    numbers: NumberWatch,
    saver: Saver,
) -> None:
    """From the state's step to the end; the saver saves every save_interval, at the end and when a signal asks."""
    model.train()
    window = state.window  # what the good steps since the last log line returned, still on the device
    for step in range(state.step, order.total_steps):
        share = rate_share(*order.schedule(step), config.warmup_ratio)
        set_learning_rate(optimizer, share)
        with metrics.waiting():
            micro_batches = [runtime.to_device(next(batches)) for _ in range(config.accumulation_steps)]
        values = train_step(model, optimizer, scaler, micro_batches, order.global_batch, config.grad_clip, runtime)
        metrics.count(order.global_batch, values.pop("supervised_tokens"))
        numbers.take(step, values)
        done = state.step = step + 1
        state.position = order.position(done)
        if done % config.log_interval == 0 or done == order.total_steps:
            numbers.settle()
        if window and (done % config.log_interval == 0 or done == order.total_steps):
            where = {"learning_rate": config.learning_rate * share, "epoch": order.epoch(done)}
            means = _means(window, runtime)
            metrics.log(done, {**means, **where})
            numbers.spike(done, means["loss"])
            window.clear()
        saver.after_step(state, numbers.settle)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: list[Batch],
    sequences: int,
    grad_clip: float,
    runtime: Runtime,
) -> dict:
    """One update from all micro-batches of all ranks, every supervised token weighing the same.

    Returns this rank's part of the loss (a tensor), of the balance loss where there is one, the norm of the whole
    gradient before clipping, and the number of supervised tokens of all ranks.
    """
    (supervised,) = runtime.sum(sum(int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) for batch in micro_batches))
    loss, aux_loss = 0.0, None
    for number, batch in enumerate(micro_batches):
        batch = {name: value for name, value in batch.items() if name != "attention_mask"}  # padding is on the right
        last = number == len(micro_batches) - 1
        with _without_sync(model, wanted=not last), runtime.autocast():
            output = model(**batch, supervised_tokens=int(supervised), sequences=sequences)
            # Gradients are averaged over ranks; the loss is already a share of the whole step's, so they must add up.
            scaler.scale(carry_to_gradient(output.loss) * runtime.world_size).backward()
        loss = loss + output.loss.detach()
        if output.aux_loss is not None:
            aux_loss = output.aux_loss.detach() + (0.0 if aux_loss is None else aux_loss)
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(trained, grad_clip))
    step_if_finite(optimizer, scaler, norm)
    optimizer.zero_grad(set_to_none=True)
    values = {"loss": loss, "grad_norm": norm, "supervised_tokens": int(supervised)}
    return values if aux_loss is None else {**values, "aux_loss": aux_loss}


def _without_sync(model: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    if wanted and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def _means(window: list[dict], runtime: Runtime) -> dict[str, float]:
    """Means over steps as floats, parts of a loss added up over ranks; the only place where the host waits."""
    means = {name: float(sum(values[name] for values in window)) / len(window) for name in window[0]}
    names = [name for name in means if name != "grad_norm"]  # the norm is the whole gradient's on every rank already
    means |= dict(zip(names, runtime.sum(*(means[name] for name in names)), strict=True))
    return means


@torch.no_grad()
def validation_loss(
    model: nn.Module, data: ConversationDataset, batch_size: int, runtime: Runtime, take: Callable[[Batch], Batch]
) -> float:
    """Mean loss a supervised token, without the balance loss; each rank takes every world_size-th sample.

    take: what notes the reports of a batch, Quarantine.take.
    """
    model.eval()
    total = tokens = 0.0
    numbers = range(runtime.rank, len(data), runtime.world_size)
    most = -(-len(data) // runtime.world_size)  # of any rank
    for start in range(0, most, batch_size):
        own = numbers[start : start + batch_size]
        batch = collate_and_report([data[number] for number in own or (0,)])  # a sharded model needs all ranks to call
        batch = runtime.to_device(take(batch))
        del batch["attention_mask"]
        with runtime.autocast():
            output = model(**batch)
        count = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()) if own else 0
        total += count * float(output.loss - (output.aux_loss if output.aux_loss is not None else 0.0))
        tokens += count
    total, tokens = runtime.sum(total, tokens)
    return total / max(1.0, tokens)


def batches_of(
    data: ConversationDataset, order: Order, config: StageConfig, runtime: Runtime, first_step: int
) -> Iterator[Batch]:
    """This rank's micro-batches from a step on, decoded by worker processes."""
    return iter(
        DataLoader(
            data,
            batch_sampler=list(order.micro_batches(runtime.rank, first_step)),
            num_workers=config.num_workers,
            collate_fn=collate_and_report,
            generator=torch.Generator(),  # its own: drawing from the stream of dropout would make resuming differ
            pin_memory=runtime.device.type == "cuda",
            worker_init_fn=ignore_stopping,
            timeout=POLL if config.num_workers else 0,
        )
    )
