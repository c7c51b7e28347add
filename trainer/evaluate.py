"""The validation loss: the same passes as in training, without learning."""

import torch

from dataset.step_batch import StepBatches
from trainer.data import StageData
from trainer.order import validation_passes
from trainer.run import Run


@torch.no_grad()
def validation_loss(run: Run, data: StageData) -> float:
    """Mean loss a supervised token, without the balance loss; each rank takes every world_size-th row."""
    model, runtime, validation = run.model, run.runtime, data.validation
    model.eval()
    batches, parts = StepBatches(validation, data.processor.padding_id), []
    lengths = torch.from_numpy(validation.dataset.lengths[list(validation.indices)])
    for rows in validation_passes(lengths, run.config.token_budget, runtime):
        batch = batches[[rows or (0,)]]  # a sharded model needs all ranks to call
        data.quarantine.record(batch)
        with runtime.autocast():
            output = model(**runtime.to_device(batch.micro_batches[0]))
        loss = output.loss if output.aux_loss is None else output.loss - output.aux_loss
        parts.append((batch.counts.supervised if rows else 0, loss))
    loss_sum, tokens = sum(count * float(loss) for count, loss in parts), sum(count for count, _ in parts)
    loss_sum, tokens = runtime.sum(loss_sum, tokens)
    return loss_sum / max(1.0, tokens)
