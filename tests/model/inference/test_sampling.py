"""Samples follow the probabilities, those follow transformers; packed products."""

import re

import pytest
import torch
from torch.nn import functional as F
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from helpers.models import IMAGE_SIZE
from model.inference import sampling
from model.inference.packed_linear import BLOCK, Packed, PackedLinear, pack_linears
from model.inference.sampling import Options, Sampler, probabilities, sample_each
from model.messages import UserError


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (5, 1.0), (1, 0.9), (0, 0.8), (0, 0.01), (30, 0.6), (5000, 0.9)]
)
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    logits = 2 * torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    found = probabilities(logits, Options(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), warped.softmax(-1))


def test_samples_follow_the_probabilities():
    """Pearson's chi-square over 20,000 samples stays below its 99.9 % point for 7 degrees of freedom, 24.3."""
    logits, options = (
        torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.3]]),
        Options(temperature=1.3, top_p=1.0, seed=5),
    )
    drawn = sample_each(logits.expand(20000, -1), [Sampler(options, torch.device("cpu"))] * 20000)
    counts, expected = drawn.bincount(minlength=8).double(), 20000 * probabilities(logits, options)[0].double()
    assert float(((counts - expected).square() / expected).sum()) < 24.3
    of_three = Sampler(Options(temperature=1.3, top_k=3, seed=5), torch.device("cpu"))
    none = sample_each(logits.expand(2000, -1), [of_three] * 2000)
    assert set(none.tolist()) <= {1, 2, 5}


@pytest.mark.parametrize("temperature", [1e-6, 1e-38, 1e-45, 1e-300])
def test_the_coldest_sample_is_the_likeliest(temperature):
    logits = torch.tensor([[0.0, 3.0, -2.0], [90.0, -90.0, 89.0], [-5.0, -4.0, float("-inf")]])
    found = probabilities(logits, Options(temperature=temperature))
    assert torch.equal(found, F.one_hot(logits.argmax(-1), 3).float())
    samplers = [Sampler(Options(temperature=temperature), torch.device("cpu")) for _ in logits]
    assert sample_each(logits, samplers).tolist() == [1, 0, 1]


def test_sampling_leaves_the_global_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    sample_each(torch.zeros(1, 10), [Sampler(Options(temperature=1.0, seed=7), torch.device("cpu"))])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "value"), [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0),
                        ("top_p", 1.1), ("top_k", -1), ("stop", "ab"), ("stop", ("a", "")), ("logprobs", -1)],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(name, value):
    with pytest.raises(UserError, match=re.escape(f"{name} is {value!r}: ")):
        Options(**{name: value})


# packed products


@pytest.mark.parametrize("outputs", [1, BLOCK, 37])
@pytest.mark.parametrize("rows", [1, 2, 19])
def test_packed_is_linear(rows, outputs):
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, 24), torch.randn(outputs, 24), torch.randn(outputs)
    with torch.inference_mode():
        torch.testing.assert_close(Packed(weight)(x), F.linear(x, weight), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(Packed(weight, bias)(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        half = Packed(weight, None, torch.bfloat16)(x)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, F.linear(x, weight), rtol=0.02, atol=0.1)


def test_one_row_in_half_precision_keeps_float16_of_the_weights():
    """11 bits, not bfloat16's 8; and weights beyond its range stay in float32."""
    weight, x = torch.randn(32, 64), torch.randn(1, 64)
    found = Packed(weight, None, torch.bfloat16)(x)
    torch.testing.assert_close(found, F.linear(x, weight), rtol=2e-3, atol=5e-3)
    torch.testing.assert_close(
        Packed(1e5 * weight, None, torch.bfloat16)(x), F.linear(x, 1e5 * weight), rtol=1e-4, atol=1.0
    )


@pytest.mark.parametrize("engine", torch.backends.quantized.supported_engines)
def test_one_row_in_half_precision_with_every_engine_of_torch(engine, monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", engine)
    weight, x = torch.randn(32, 64), torch.randn(1, 64)
    torch.testing.assert_close(Packed(weight, None, torch.bfloat16)(x), F.linear(x, weight), rtol=2e-3, atol=5e-3)


def test_a_packed_tower_is_the_tower(make_vlm, picture, processor):
    model = make_vlm()
    pixels = torch.stack([processor.pixels(picture(seed, IMAGE_SIZE)) for seed in range(3)])
    expected, names = model.encode_pictures(pixels), list(model.state_dict())
    pack_linears(model.vision_encoder, torch.float32)
    assert any(isinstance(module, PackedLinear) for module in model.vision_encoder.modules())
    torch.testing.assert_close(model.encode_pictures(pixels), expected)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.9999, 0.99999])
def test_the_likeliest_of_a_large_vocabulary_are_those_of_all(spread, top_p, monkeypatch):
    """To the bit, so that a seed gives the same answer; where they do not reach top_p, all are sorted."""
    generator = torch.Generator().manual_seed(2)
    logits = spread * torch.randn(3, 49_152, generator=generator) - torch.arange(49_152) / 1e6
    options = Options(temperature=1.0, top_p=top_p)
    found = probabilities(logits, options)
    monkeypatch.setattr(sampling, "CANDIDATES", 49_152)
    assert torch.equal(found, probabilities(logits, options))
