"""The memory of a training step, counted: the step is made with fake tensors, which have shapes but hold no data."""

import contextlib
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import IGNORE_INDEX, MiniMindConfig, VLMConfig
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from scripts.measure.stages import STAGES
from trainer.config import StageConfig
from trainer.optim import build_optimizer, freeze_all_but

FREE = 0.15  # of a card, left for CUDA itself, its allocator's gaps and a screen
AFTER_START = 3  # tokens of a row before its picture
HEADING = 4  # tokens before each view of a picture that is cut
DEVICES = ("cpu", "cuda", "old_cuda")  # whose memory can be counted; old_cuda: GPUs before Ampere


@dataclass(frozen=True)
class Step:
    """One micro-batch: rows alike, each with one picture if the model sees, and labels at its end."""

    config: MiniMindConfig
    stage: str
    rows: int
    tokens: int  # a row
    supervised: int  # of these
    cached: bool = False  # the tower's outputs come from files
    dtype: torch.dtype = torch.float32  # of the arithmetic; weights are float32
    optimizer: str = "adamw"
    accumulates: bool = False  # gradients of an earlier micro-batch are there already
    device: str = "cpu"  # of DEVICES
    checkpointed: bool = False  # of a layer only what enters it is kept

    @property
    def sees(self) -> bool:
        return isinstance(self.config, VLMConfig)

    @property
    def views(self) -> int:
        """Of a row's picture, which is cut into as many tiles as may be."""
        return 0 if not self.sees else 1 + self.config.tiles

    @property
    def before_answer(self) -> int:
        """Tokens of a row that cannot be learnt: nothing stands before the first that could predict it."""
        if not self.sees:
            return 1
        return AFTER_START + self.views * (self.config.image_tokens + (HEADING if self.config.tiles else 0))

    def make_model(self) -> MiniMindForCausalLM:
        model = (MiniMindVLM if self.sees else MiniMindForCausalLM)(self.config).train()
        freeze_all_but(model, STAGES[self.stage].trainable)
        if self.sees:
            model.round_tower(self.dtype)
        model.model.gradient_checkpointing = self.checkpointed
        if self.device != "cpu":  # fake tensors lie on a CPU, where attention may be written out; a GPU never does so
            for layer in model.model.layers:
                layer.self_attn.short = 0
        return model

    def make_batch(self) -> dict[str, torch.Tensor]:
        """What training hands to the model; the ids mean nothing."""
        positions = torch.arange(self.tokens)
        labelled = positions >= self.tokens - self.supervised
        ids = (positions % 50 + 50).repeat(self.rows, 1)
        batch = {"input_ids": ids, "labels": torch.where(labelled, ids, IGNORE_INDEX)}
        batch["loss_positions"] = positions[-self.supervised - 1 : -1].repeat(self.rows, 1)
        if self.sees:
            placeholders, end = self.views * self.config.image_tokens, self.before_answer
            in_picture = (positions >= end - placeholders) & (positions < end)
            batch["image_mask"], batch["pictures_a_row"] = in_picture.repeat(self.rows, 1), [self.views] * self.rows
            side = self.config.image_size
            if self.cached:
                shape = (self.rows, self.views, self.config.patches_a_side**2, self.config.vision_hidden_size)
                batch["patch_features"] = torch.zeros(shape, dtype=torch.float16)
            else:
                batch["pixel_values"] = torch.zeros(self.rows, self.views, 3, side, side, dtype=torch.uint8)
        return batch

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        attention = OldCudaAttention() if self.device == "old_cuda" else contextlib.nullcontext()
        where = batch["input_ids"].device.type
        with attention, torch.autocast(where, self.dtype, enabled=self.dtype != torch.float32):
            return model(**batch, supervised_tokens=self.rows * self.supervised).loss


class OldCudaAttention(TorchFunctionMode):
    """Attention as a GPU before Ampere computes it.

    Without a mask it has no fused kernel for heads that share a key, and keeps a weight for every pair of tokens
    (PyTorch's documentation of scaled_dot_product_attention, enable_gqa). With a mask the model repeats the keys.
    """

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("enable_gqa") and kwargs.get("attn_mask") is None:
            with sdpa_kernel(SDPBackend.MATH):
                return function(*args, **kwargs)
        return function(*args, **kwargs)


NUMBER = torch.ops.aten._local_scalar_dense.default  # tensor.item()
# Forward and backward of x[mask]
INDEX, INDEX_BACKWARD = torch.ops.aten.index.Tensor, torch.ops.aten._index_put_impl_.default


class Account(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were at once.

    Every operation passes through here. In x[mask] the size of the result depends on data, which fake tensors do not
    have. The model asks for it only to choose the loss positions with labels, and here all of them have some. Single
    numbers are asked for only where some towers are made, for first weights and rates of dropout: any will do.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        mask = args[1][0] if operation in (INDEX, INDEX_BACKWARD) else None
        if operation is NUMBER and isinstance(args[0], FakeTensor):
            return 0
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            result = operation(*args, **(kwargs or {}))
        elif operation is INDEX:
            result = args[0].flatten(0, mask.dim() - 1).clone()
        else:
            result = args[0]
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            self._known.add(storage)
            weakref.finalize(storage, self._remove, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _remove(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class StepMemory:
    """Bytes."""

    weights: int
    optimizer: int
    gradients: int
    activations: int  # kept from the forward pass for the backward pass, with the batch
    peak: int  # of the whole step

    @property
    def rest(self) -> int:
        """What the peak has beyond the other four; below 0 where activations go faster than gradients come."""
        return self.peak - self.weights - self.optimizer - self.gradients - self.activations


def step_memory(step: Step) -> StepMemory:
    """Bytes that a step needs, once the optimizer has its state. Takes a second, whatever the sizes, and no memory."""
    with FakeTensorMode(), Account() as account:
        model = step.make_model()
        weights = account.live
        state = optimizer_state(model, step.optimizer)
        optimizer = account.live - weights
        learning = learning_parameters(model)
        if step.accumulates:
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)
        before, account.peak = account.live, 0
        batch = step.make_batch()
        loss = step.loss(model, batch)
        activations = account.live - before
        loss.backward()
        del state  # alive until here, and so in the peak
    gradients = sum(parameter.nbytes for parameter in learning)
    return StepMemory(weights, optimizer, gradients, activations, account.peak)


def learning_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_state(model: nn.Module, name: str) -> list[torch.Tensor]:
    """The tensors that the trainer's optimizer of this name keeps, without its counts of steps."""
    optimizer = build_optimizer(model, StageConfig(optimizer=name))
    for parameter in learning_parameters(model):
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]


def largest_batch(step: Step, limit: float) -> int:
    """Most rows whose step stays within so many bytes; 0 where one does not.

    A step grows with its rows nearly as a line, which is flatter once its logits come in pieces (model/loss.py): each
    guess lies on the line through the two before it.
    """
    peaks = {rows: step_memory(replace(step, rows=rows)).peak for rows in (4, 8)}
    while True:
        fits = max((rows for rows, peak in peaks.items() if peak <= limit), default=0)
        too_many = min((rows for rows, peak in peaks.items() if peak > limit), default=math.inf)
        if too_many - fits == 1:
            return fits
        (earlier, earlier_peak), (later, peak) = list(peaks.items())[-2:]
        guess = later + int((limit - peak) * (later - earlier) / (peak - earlier_peak))
        rows = int(min(max(guess, fits + 1), too_many - 1))
        peaks[rows] = step_memory(replace(step, rows=rows)).peak
