"""The counted arithmetic of a step against what PyTorch's own counter sees a step do."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.models import IMAGE_SIZE, IMAGE_TOKENS, SIZES, untrained_decoder
from model.config import MiniMindConfig, VLMConfig
from model.flops import StepFlops, tower_flops
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from trainer.optim import freeze_all_but

STAGE_1, STAGE_2 = ("projector", "last_layer"), ("projector", "language_model")
ENDS = ("projector", "first_layer", "last_layer")
QWEN3 = {"qk_norm": True, "head_dim": 16, "qkv_bias": True}
GATED = {"use_moe": True, "num_experts_per_tok": 4, "shared_expert_gate": True, "shared_expert_intermediate_size": 40}
ROWS, LENGTH, SUPERVISED = 3, 20, 5


def counted_by_torch(model, **pictures) -> int:
    """FLOP of a real step of ROWS rows; without a fused kernel attention is plain products, over the whole square."""
    ids = torch.randint(50, 6400, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-SUPERVISED] = -100
    if pictures:
        pictures["image_mask"] = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
        pictures["image_mask"][:, 2 : 2 + IMAGE_TOKENS] = True
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.train()(ids, labels=labels, **pictures).loss.backward()
    return counter.get_total_flops()


def counted_by_us(model, **pictures) -> float:
    """The same step, with the half of each square that causal attention has no use for."""
    flops, squares = StepFlops(model), ROWS * LENGTH**2
    return flops.count(ROWS * LENGTH, squares, ROWS * SUPERVISED, **pictures) + flops.per_pair * squares / 2


@pytest.mark.parametrize("trainable", [STAGE_1, STAGE_2, ENDS, ("projector",), ("last_layer",)])
@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("cached", [True, False])
def test_a_step_of_the_vlm_has_the_arithmetic_that_torch_counts(make_vlm, trainable, experts, cached):
    # where a token takes every expert, what is useful is what is computed
    moe = {"use_moe": True, "num_experts": experts, "num_experts_per_tok": experts} if experts else {}
    model = make_vlm(**moe)
    freeze_all_but(model, trainable)
    shape = (IMAGE_TOKENS, model.config.vision_hidden_size) if cached else (3, IMAGE_SIZE, IMAGE_SIZE)
    by_torch = counted_by_torch(model, **{"patch_features" if cached else "pixel_values": torch.zeros(ROWS, 1, *shape)})
    assert counted_by_us(model, pictures=ROWS, encoded=0 if cached else ROWS) == pytest.approx(by_torch, rel=1e-6)


@pytest.mark.parametrize("trainable", [("language_model",), ("last_layer",), ("first_layer",)])
@pytest.mark.parametrize("decoder", [{}, QWEN3, GATED], ids=str)
def test_a_step_of_the_bare_decoder_has_the_arithmetic_that_torch_counts(decoder, trainable):
    model = untrained_decoder(**decoder)
    freeze_all_but(model, trainable)
    assert counted_by_us(model) == pytest.approx(counted_by_torch(model), rel=1e-6)


def test_only_the_experts_a_token_takes_are_useful():
    with torch.device("meta"):
        one, four = (
            MiniMindForCausalLM(MiniMindConfig(**SIZES, use_moe=True, num_experts_per_tok=taken)) for taken in (1, 4)
        )
    forward = 3 * 2 * SIZES["hidden_size"] * one.config.intermediate_size * SIZES["num_hidden_layers"]
    assert StepFlops(four).per_token - StepFlops(one).per_token == 3 * 3 * forward  # with the backward pass thrice


@pytest.mark.parametrize(
    ("trainable", "encoded", "expected"),
    [(STAGE_1, 0, 22.9e9), (STAGE_2, 0, 33.1e9), (STAGE_1, 1, 58.0e9), (STAGE_2, 1, 68.3e9)],
)
def test_the_real_model_needs_what_was_worked_out_by_hand(trainable, encoded, expected):
    """26 M decoder and CLIP-ViT-B/16, a row of 196 + 60 tokens of which 25 are learnt."""
    with torch.device("meta"):
        model = MiniMindVLM(VLMConfig())
    freeze_all_but(model, trainable)
    assert StepFlops(model).count(256, 256**2, 25, 1, encoded) == pytest.approx(expected, rel=3e-3)
    assert tower_flops(model.vision_encoder, 224) == pytest.approx(35.13e9, rel=1e-3)


def test_a_step_of_nothing_costs_nothing(make_vlm):
    assert StepFlops(make_vlm()).count(0, 0, 0) == 0
