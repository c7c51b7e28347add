"""The probe: a few fixed sentences and their loss, kept in every weight file and found again by who starts from it.

Strict loading sees names and shapes. It does not see that the tokens mean something else, that heads are cut otherwise,
or that numbers were changed; the loss of a known text does. The sentences are the project's own, so that a weight file
never holds a word of anybody's data.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path

import torch

from dataset.vlm_dataset import text_only
from model.attention import RotaryEmbedding
from model.config import MiniMindConfig
from model.device import to_device
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.processing import Rendered, VLMProcessor
from model.weights import decoder_arguments, read_facts, read_sizes

PROBE = "probe"  # its name among the file's facts
TEXTS = (
    "A cup of tea stands on the table beside the open window.",
    "How many things are there? Two red apples, a dog and a small boat.",
    "桌子上有一杯茶，旁边是打开的窗户。",
    "图中有什么？两个红苹果、一只狗和一条小船。",
)
TOLERANCE = 0.005  # of the loss: other devices and their arithmetic stay below, other heads or tokens far above


def probe_facts(model: MiniMindForCausalLM, processor: VLMProcessor) -> dict[str, str]:
    """What a weight file says of its probe; a sharded model needs all ranks to call. Leaves the model in eval mode."""
    rows = [processor.render_text(text) for text in TEXTS]
    loss = _loss(model, rows)
    if not math.isfinite(loss):
        return {}
    found = {
        "texts": TEXTS, "ids": [row.input_ids.tolist() for row in rows], "loss": float(f"{loss:.6g}"),
        "num_experts_per_tok": model.config.num_experts_per_tok,
    }  # fmt: skip
    return {PROBE: json.dumps(found, ensure_ascii=False)}


def check_probe(model: MiniMindForCausalLM, processor: VLMProcessor, path: Path) -> None:
    """Raises UserError where the model does not compute what its file's probe says. A file without one passes."""
    facts = read_facts(path)
    if PROBE not in facts:
        return
    known = json.loads(facts[PROBE])
    if known["num_experts_per_tok"] != model.config.num_experts_per_tok:  # a flag asked for it, and a line said so
        return
    rows = [processor.render_text(text) for text in known["texts"]]
    if [row.input_ids.tolist() for row in rows] != known["ids"]:
        raise UserError(
            f"{path} was trained with another tokenizer: its own sentences become other tokens here. It is older than "
            "the files that carry theirs: put the tokenizer.json that it was trained with in the place of "
            "model/tokenizer.json"
        )
    with _positions_of(model, path):
        loss = _loss(model, rows)
    if not abs(loss - known["loss"]) <= TOLERANCE * known["loss"]:
        raise UserError(
            f"{path} does not compute what it computed when it was saved: the loss of its own sentences was "
            f"{known['loss']:.3f} and is {loss:.3f}. Leave --num_attention_heads and --num_key_value_heads as the file "
            "says; if they are, it is damaged: copy or train it again"
        )


@contextmanager
def _positions_of(model: MiniMindForCausalLM, path: Path) -> Iterator[None]:
    """The model with the RoPE of its file: --rope_theta may have given it another, and a line said so."""
    own, config = model.model.rotary, copy(model.config)
    config.rope_parameters = MiniMindConfig(**decoder_arguments(read_sizes(path))).rope_parameters
    model.model.rotary = RotaryEmbedding(config).to(own.frequencies.device)
    try:
        yield
    finally:
        model.model.rotary = own


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # one pass is not worth compiling for
def _loss(model: MiniMindForCausalLM, rows: list[Rendered]) -> float:
    batch = text_only(rows)
    output = model.eval()(**to_device(batch, model.model.embed_tokens.weight.device))
    return float(output.loss if output.aux_loss is None else output.loss - output.aux_loss)
