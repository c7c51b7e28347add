"""Layers that are computed again in the backward pass: the same gradients to the bit, in less memory."""

import dataclasses

import pytest
import torch

from dataset.batching import common_prefix, share_prefix
from helpers.data import make_picture, turns
from helpers.models import SIZES, make_ids, make_labels, untrained_decoder
from helpers.runs import assert_bit_equal, tiny, weights_of
from model.config import MiniMindConfig
from model.processing import collate_training
from scripts.measure.memory import Step, step_memory
from trainer.stage import run_stage
from trainer.train_sft_vlm import SFT_VLM


def gradients(model, batch: dict, recompute: bool, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of all that learns; and the state in which the dropout's stream is left."""
    model.model.gradient_checkpointing = recompute
    model.train().zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach(), "random state": torch.get_rng_state()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"use_moe": True}, {"dropout": 0.2}, {"use_moe": True, "dropout": 0.2}])
def test_gradients_are_the_same_to_the_bit(changes, dtype):
    model, ids = untrained_decoder(**changes), make_ids(3, 20)
    batch = {"input_ids": ids, "labels": make_labels(ids)}
    assert_bit_equal(gradients(model, batch, True, dtype), gradients(model, batch, False, dtype))


@pytest.mark.parametrize("use_moe", [False, True])
def test_rows_of_several_conversations_with_pictures(use_moe, make_vlm, processor):
    """Branches, positions before labels alone, and a picture's projector before the layers."""
    talks = [processor.render(turns(1, answer)) for answer in ("a cat", "a dog and a cat")]
    row = share_prefix(talks, common_prefix(*talks))
    batch = collate_training([(row, [processor.pixels(make_picture(0))]), (processor.render(turns(0)), [])])
    model = make_vlm(use_moe=use_moe)
    found = gradients(model, batch, True)
    assert "branches" in batch and found["vision_proj.vision_proj.0.weight"].abs().sum() > 0
    assert_bit_equal(found, gradients(model, batch, False))


def test_layers_run_again_only_where_something_learns():
    model, ids, seen = untrained_decoder(), make_ids(1, 8), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append(1))  # the second run ends early
    gradients(model, {"input_ids": ids, "labels": ids}, True)
    assert len(seen) == 2 * SIZES["num_hidden_layers"]
    seen.clear()
    with torch.no_grad():
        model(input_ids=ids)
        model.eval()(input_ids=ids, use_cache=True)
    assert len(seen) == 2 * SIZES["num_hidden_layers"]


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1, "use_moe": 1, "accumulation_steps": 2, "batch_size": 4}])
def test_a_stage_learns_the_same(changes, data_folder, tower_folder):
    config, learnt = tiny(SFT_VLM, data_folder, tower_folder, **changes), []
    for flag in (0, 1):
        config = dataclasses.replace(config, checkpoint_activations=flag, save_dir=f"{data_folder}/{flag}")
        run_stage(config)
        learnt.append(weights_of(config))
    assert_bit_equal(*learnt)


def test_transformers_switches_it_under_its_own_names():
    model = untrained_decoder()
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # before 5.24 the second
        if hasattr(model, name):
            getattr(model, name)()
            break
    assert model.model.gradient_checkpointing
    assert "checkpointing" not in str(model.config.to_dict())


def test_a_layer_more_keeps_no_more_than_what_enters_it():
    """Counted in bytes: rows x tokens x hidden size, which is all that may grow with the number of layers."""
    kept = []
    for layers in (2, 4):
        config = MiniMindConfig(**{**SIZES, "num_hidden_layers": layers})
        step = Step(config, "llm", rows=4, tokens=64, supervised=2, checkpointed=True)
        kept.append(step_memory(step).activations)
    assert kept[1] - kept[0] == 2 * 4 * 64 * SIZES["hidden_size"] * 4
    assert kept[1] < 0.3 * step_memory(dataclasses.replace(step, checkpointed=False)).activations
