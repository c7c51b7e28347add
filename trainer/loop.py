"""The one loop: every stage trains here."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset

from dataset.step_batch import Share, Shares
from model.messages import UserError
from trainer.checkpoint.resume import RunState
from trainer.checkpoint.saver import Saver
from trainer.config import StageConfig
from trainer.distributed import Runtime, whole
from trainer.guard.numbers import NumberWatch, carry_to_gradient, step_if_finite
from trainer.guard.signals import ignore_stopping
from trainer.guard.workers import POLL, HandsOver
from trainer.optim import rate_share, set_learning_rate
from trainer.order import Order, ResplitOrder, cut_once, cut_shares
from trainer.report.metrics import Metrics


def train(
    model: nn.Module,  # as it is, or what trainer.distributed.distribute made of it
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterator[Share],
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
        with metrics.meter.waiting():
            data = next(batches)
            micro_batches = [runtime.to_device(batch) for batch in data.micro_batches]
        # Counted before the batches went to the device, and added up over the CPU: no GPU is waited for.
        (supervised,) = runtime.sum(data.counts.supervised)
        values = train_step(
            model, optimizer, scaler, micro_batches, int(supervised), order.global_batch, config.grad_clip, runtime,
            metrics.meter.enter,
        )  # fmt: skip
        metrics.step_done(data.counts)
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
    micro_batches: list[dict],  # of model.processing.collate
    supervised_tokens: int,
    sequences: int,
    grad_clip: float,
    runtime: Runtime,
    enter: Callable[[str], None] = lambda phase: None,
) -> dict[str, torch.Tensor]:
    """One update from all micro-batches of all ranks, every supervised token weighing the same.

    The host waits for nothing that a device computes, but for an optimizer that cannot skip a step there.

    Args:
        supervised_tokens, sequences: of the whole step, over all its micro-batches and ranks.
        enter: told which phase begins: "forward", "backward", "optimizer", and "" after the last.

    Returns this rank's part of the loss, of the balance loss where there is one, and the norm of the whole gradient
    before clipping.
    """
    loss, aux_loss = 0.0, None
    for number, batch in enumerate(micro_batches, 1):
        with _without_sync(model, wanted=number < len(micro_batches)), runtime.autocast():
            enter("forward")
            output = model(**batch, supervised_tokens=supervised_tokens, sequences=sequences)
            enter("backward")
            # Gradients are averaged over ranks; the loss is already a share of the whole step's, so they must add up.
            scaler.scale(carry_to_gradient(output.loss) * runtime.world_size).backward()
        loss = loss + output.loss.detach()
        if output.aux_loss is not None:
            aux_loss = output.aux_loss.detach() + (0.0 if aux_loss is None else aux_loss)
    enter("optimizer")
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = whole(nn.utils.clip_grad_norm_(trained, grad_clip))
    step_if_finite(optimizer, scaler, norm)
    optimizer.zero_grad(set_to_none=True)
    enter("")
    values = {"loss": loss, "grad_norm": norm}
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
    model: nn.Module, data: Subset, budget: int, runtime: Runtime, take: Callable[[Share], Share]
) -> float:
    """Mean loss a supervised token, without the balance loss; each rank takes every world_size-th row.

    budget: most tokens of a pass, as in training. take: what notes the reports of a share, Quarantine.take.
    """
    model.eval()
    shares, parts = Shares(data), []
    lengths = torch.from_numpy(data.dataset.lengths[list(data.indices)])
    for own in cut_once(lengths, budget, runtime):
        share = take(shares[[own or (0,)]])  # a sharded model needs all ranks to call
        with runtime.autocast():
            output = model(**runtime.to_device(share.micro_batches[0]))
        loss = output.loss if output.aux_loss is None else output.loss - output.aux_loss
        parts.append((share.counts.supervised if own else 0, loss))
    total, tokens = runtime.sum(
        sum(count * float(loss) for count, loss in parts), sum(count for count, _ in parts)
    )  # fmt: skip
    return total / max(1.0, tokens)


def batches_of(
    data: Dataset, order: Order | ResplitOrder, config: StageConfig, runtime: Runtime, first_step: int
) -> Iterator[Share | UserError]:
    """This rank's share of each step from one on, cut, decoded and counted by worker processes."""
    return iter(
        DataLoader(
            HandsOver(Shares(data)),
            batch_size=None,  # an item is a step
            sampler=cut_shares(order, runtime.rank, config.token_budget, first_step),
            num_workers=config.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its own: drawing from the stream of dropout would make resuming differ
            pin_memory=runtime.device.type == "cuda",
            worker_init_fn=ignore_stopping,
            timeout=POLL if config.num_workers else 0,
        )
    )


def _as_it_is(share: Share | UserError) -> Share | UserError:
    return share
