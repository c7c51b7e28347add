"""The one loop: every stage trains here."""

import contextlib
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.checkpoint.saver import Saver
from trainer.data import StageData
from trainer.distributed import Runtime, full_tensor
from trainer.guard.finite import FiniteCheck, carry_to_gradient, step_if_finite
from trainer.optim import lr_factor, set_learning_rate
from trainer.report.metrics import Report
from trainer.run import Run


def train(run: Run, data: StageData, report: Report, saver: Saver) -> None:
    """From the run's step to its end; the saver saves every save_interval, at the end and when a signal asks."""
    config, order, state = run.config, run.order, run.state
    finite = FiniteCheck(run, data.where, report)
    run.parallel_model.train()
    batches = data.batches(run)
    for step in range(state.step, order.total_steps):
        factor = lr_factor(*order.schedule(step), config.warmup_ratio)
        set_learning_rate(run.optimizer, factor)
        with report.meter.waiting():
            batch = next(batches)
            micro_batches = [run.runtime.to_device(micro_batch) for micro_batch in batch.micro_batches]
        # Counted before the batches went to the device, and added up over the CPU: no GPU is waited for.
        (supervised,) = run.runtime.sum(batch.counts.supervised)
        values = train_step(run, micro_batches, int(supervised), report.meter.enter)
        report.step_done(batch.counts)
        finite.check(step, values)
        done = state.step = step + 1
        state.position = order.position(done)
        if done % config.log_interval == 0 or done == order.total_steps:
            finite.settle()
            if state.window:  # the values of all steps since the last line whose gradient was finite
                means = _means(state.window, run.runtime)
                schedule = {"learning_rate": config.learning_rate * factor, "epoch": order.epoch(done)}
                report.log(done, {**means, **schedule})
                finite.spike(done, means["loss"])
                state.window.clear()
        saver.after_step(finite.settle)


def train_step(
    run: Run, micro_batches: list[dict], supervised_tokens: int, enter: Callable[[str], None] = lambda phase: None
) -> dict[str, torch.Tensor]:
    """One update from all micro-batches of all ranks, every supervised token weighing the same.

    The host waits for nothing that a device computes, but for an optimizer that cannot skip a step there.

    Args:
        micro_batches: of model.processing.collate_training, on the device.
        supervised_tokens: of the whole step, over all its micro-batches and ranks.
        enter: called with the phase that begins: "forward", "backward", "optimizer", and "" after the last.

    Returns this rank's part of the loss, of the balance loss where there is one, and the norm of the whole gradient
    before clipping.
    """
    model, optimizer, scaler, runtime = run.parallel_model, run.optimizer, run.scaler, run.runtime
    loss, aux_loss = 0.0, None
    for number, batch in enumerate(micro_batches, 1):
        with _without_sync(model, wanted=number < len(micro_batches)), runtime.autocast():
            enter("forward")
            output = model(**batch, supervised_tokens=supervised_tokens, sequences=run.order.global_batch)
            enter("backward")
            # Gradients are averaged over ranks, but the loss is already divided by the whole step: they must add up.
            scaler.scale(carry_to_gradient(output.loss) * runtime.world_size).backward()
        loss = loss + output.loss.detach()
        if output.aux_loss is not None:
            aux_loss = output.aux_loss.detach() + (0.0 if aux_loss is None else aux_loss)
    enter("optimizer")
    scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = full_tensor(nn.utils.clip_grad_norm_(trained, run.config.grad_clip))
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
