"""The memory of a training step, counted: the step is made with tensors that have shapes and no numbers."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import attention
from model.config import IGNORE_INDEX, MiniMindConfig, VLMConfig
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM

# What learns in a stage, by the beginnings of names; the trainer says it by parts, and a test holds both together.
LEARNS = {
    "llm": ("model.",),
    "pretrain_vlm": ("vision_proj.", "model.layers.{last}."),
    "sft_vlm": ("vision_proj.", "model."),
}
AFTER_START = 3  # tokens of a row before its picture
# Attention without a fused kernel keeps a weight for every pair of tokens. With a mask the model repeats keys, and a
# kernel takes it; without one GPUs before Ampere have none for grouped queries (PyTorch's documentation of
# scaled_dot_product_attention, enable_gqa).
NOT_FUSED = {"cpu": (), "cuda": (), "old_cuda": ("plain",)}


def freeze_as_in(stage: str, model: MiniMindForCausalLM) -> None:
    """Let only those parameters of the model learn that learn in the stage, one of LEARNS."""
    prefixes = tuple(prefix.format(last=model.config.num_hidden_layers - 1) for prefix in LEARNS[stage])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefixes))


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
    device: str = "cpu"  # of NOT_FUSED

    @property
    def sees(self) -> bool:
        return isinstance(self.config, VLMConfig)

    def make_model(self) -> MiniMindForCausalLM:
        model = (MiniMindVLM if self.sees else MiniMindForCausalLM)(self.config).train()
        freeze_as_in(self.stage, model)
        if self.sees:
            model.round_tower(self.dtype)
        return model

    def make_batch(self) -> dict[str, torch.Tensor]:
        """What training hands to the model; the ids say nothing."""
        places = torch.arange(self.tokens)
        labelled = places >= self.tokens - self.supervised
        ids = (places % 50 + 50).repeat(self.rows, 1)
        batch = {"input_ids": ids, "labels": torch.where(labelled, ids, IGNORE_INDEX)}
        batch["loss_positions"] = places[-self.supervised - 1 : -1].repeat(self.rows, 1)
        if self.sees:
            inside = (places >= AFTER_START) & (places < AFTER_START + self.config.image_tokens)
            batch["image_mask"], batch["pictures_a_row"] = inside.repeat(self.rows, 1), [1] * self.rows
            side = self.config.image_size
            if self.cached:
                shape = (self.rows, 1, self.config.image_tokens, self.config.vision_hidden_size)
                batch["patch_features"] = torch.zeros(shape, dtype=torch.float16)
            else:
                batch["pixel_values"] = torch.zeros(self.rows, 1, 3, side, side, dtype=torch.uint8)
        return batch

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        where = batch["input_ids"].device.type
        imitated = contextlib.nullcontext() if where == self.device else _attention_of(self.device)
        with imitated, torch.autocast(where, self.dtype, enabled=self.dtype != torch.float32):
            return model(**batch, supervised_tokens=self.rows * self.supervised).loss


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


@contextlib.contextmanager
def _attention_of(device: str) -> Iterator[None]:
    """Of another device than the tensors': fake ones are a CPU's, where attention may be written out, a GPU's never."""
    with _NotFused(device), mock.patch.object(attention, "SHORT", attention.SHORT if device == "cpu" else 0):
        yield


class _NotFused(TorchFunctionMode):
    """Grouped-query attention by separate products where the device has no fused kernel for it."""

    def __init__(self, device: str):
        super().__init__()
        self.not_fused = NOT_FUSED[device]

    def __torch_function__(self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and kwargs.get("enable_gqa"):
            kind = "plain" if kwargs.get("attn_mask") is None else "masked"
            if kind in self.not_fused:
                with sdpa_kernel(SDPBackend.MATH):
                    return function(*args, **kwargs)
        return function(*args, **kwargs)


CHOOSES = (torch.ops.aten.index.Tensor, torch.ops.aten._index_put_impl_.default)  # forward and backward


class Account(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and the most there were at once.

    Every operation passes through here. Two of the model ask for the numbers in a tensor, which fake tensors do not
    have: where all loss positions have labels, choosing those that do chooses all.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, operation: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        chosen = args[1][0] if operation in CHOOSES else None
        if not isinstance(chosen, torch.Tensor) or chosen.dtype != torch.bool:
            result = operation(*args, **(kwargs or {}))
        elif operation is CHOOSES[0]:
            result = args[0].flatten(0, chosen.dim() - 1).clone()
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


def optimizer_state(model: nn.Module, optimizer: str) -> list[torch.Tensor]:
    """Tensors like those that the optimizer keeps: AdamW's two moments, Muon's one of the layers' matrices."""
    state = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            muon = optimizer == "muon" and parameter.dim() > 1 and ".layers." in name
            state += [torch.empty_like(parameter, requires_grad=False) for _ in range(1 if muon else 2)]
    return state


def step_memory(step: Step) -> StepMemory:
    """Bytes that a step takes, once the optimizer has its state. Takes a second, whatever the sizes, and no memory."""
    with FakeTensorMode(), Account() as account:
        model = step.make_model()
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        weights = account.live
        state = optimizer_state(model, step.optimizer)
        optimizer = account.live - weights
        if step.accumulates:
            for parameter in learning:
                parameter.grad = torch.empty_like(parameter)
        before, account.peak = account.live, 0
        batch = step.make_batch()
        loss = step.loss(model, batch)
        activations = account.live - before
        loss.backward()
        del state
    return StepMemory(
        weights=weights,
        optimizer=optimizer,
        gradients=sum(4 * parameter.numel() for parameter in learning),
        activations=activations,
        peak=account.peak,
    )


def largest_batch(step: Step, limit: float) -> int:
    """Most rows whose step stays within so many bytes; 0 where one does not."""
    few, more = (step_memory(replace(step, rows=rows)).peak for rows in (4, 8))
    rows = max(1, int(4 + 4 * (limit - few) / (more - few)) + 1)  # a step grows with its rows, nearly as a line
    while rows and step_memory(replace(step, rows=rows)).peak > limit:
        rows -= max(1, rows // 64)
    return rows
