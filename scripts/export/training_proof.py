"""Whether a converted folder can be trained on: three plain steps on its own answers must make none less likely."""

from collections.abc import Mapping, Sequence

import torch

STEPS, LEARNING_RATE = 3, 1e-5
TOLERANCE = 0.01  # nats a token: of one answer among several that are learnt together
PARTS = {"tower": ("vision_tower", "vision_encoder"), "projector": ("multi_modal_projector", "vision_proj")}
IGNORED = -100  # the label of a token that is not learnt, in all of transformers
Batch = Mapping[str, torch.Tensor]


def with_answer(inputs: Batch, output: torch.Tensor) -> Batch:
    """A prompt with its answer, and labels for the answer alone.

    output: [1, seq] of the prompt and what follows it, as generate() returns it.
    """
    length, added = inputs["input_ids"].shape[1], output.shape[1] - inputs["input_ids"].shape[1]
    longer = {name: value for name, value in inputs.items() if value.shape[:2] != (1, length)}  # pictures
    for name in inputs.keys() - longer.keys():  # one number a token: a mask that says what may be seen, or is a picture
        further = inputs[name].new_full((1, added), name == "attention_mask")
        longer[name] = torch.cat([inputs[name], further], dim=1)
    longer["input_ids"] = output
    labels = output.clone()
    labels[:, :length] = IGNORED
    return {**longer, "labels": labels}


def train_a_little(model: torch.nn.Module, talks: Sequence[Batch]) -> dict:
    """Three steps of AdamW over all parameters, each over all talks.

    Returns the losses of each answer before and after, nats a token, and the gradient's norm by part before.
    """
    before, norms = _losses(model, talks), {}
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    for step in range(STEPS):
        for talk in talks:
            (model(**talk).loss / len(talks)).backward()
        if step == 0:
            norms = gradient_norms(model)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return {"before": before, "after": _losses(model, talks), "gradient_norms": norms}


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """Of each part that learns: the tower, the projector, and the decoder, which is the rest."""
    squares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part = next((part for part, names in PARTS.items() if any(n in name for n in names)), "decoder")
            squares[part] = squares.get(part, 0.0) + float(parameter.grad.double().square().sum())
    return {part: square**0.5 for part, square in squares.items()}


def complaint(trained: dict) -> str:
    """What is wrong with what train_a_little found; nothing where no answer has become less likely."""
    pairs = list(zip(trained["before"], trained["after"], strict=True))
    if all(after <= before + TOLERANCE for before, after in pairs):
        return ""
    norms = ", ".join(f"{part} {norm:.2g}" for part, norm in trained["gradient_norms"].items())
    losses = "; ".join(f"{before:.3f} to {after:.3f}" for before, after in pairs)
    return f"{STEPS} steps of AdamW at {LEARNING_RATE:g} take the losses of its own answers from {losses} ({norms})"


@torch.no_grad()
def _losses(model: torch.nn.Module, talks: Sequence[Batch]) -> list[float]:
    return [float(model(**talk).loss) for talk in talks]
