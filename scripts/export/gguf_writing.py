"""GGUF files, which llama.cpp and all that builds on it read: which type each tensor is written as, and the writing."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.messages import UserError

if TYPE_CHECKING:
    import gguf

# --dtype to the type of a file's matrices: a name of gguf's GGMLQuantizationType and LlamaFileType.
TYPES = {"float32": ("F32", "ALL_F32"), "float16": ("F16", "MOSTLY_F16"), "bfloat16": ("BF16", "MOSTLY_BF16"),
         "q8_0": ("Q8_0", "MOSTLY_Q8_0")}  # fmt: skip
# Small, and read by operations that want full numbers: the router, the patches' convolution, embeddings of places, the
# class token, the projector, RoPE's factors.
ALWAYS_F32 = ("ffn_gate_inp", "v.patch_embd", "v.position_embd", "v.class_embd", "mm.", "rope_freqs")


def need_gguf() -> ModuleType:
    """The package `gguf`. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "--to gguf writes with the package gguf and proves the result with xllamacpp, which is llama.cpp: "
            "pip install -r requirements/gguf.txt"
        ) from error
    return gguf


def new_file(path: Path, architecture: str, dtype: str) -> "gguf.GGUFWriter":
    """A writer that knows what kind of file it makes. dtype: of TYPES."""
    gguf = need_gguf()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_file_type(gguf.LlamaFileType[TYPES[dtype][1]])
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def finish(writer: "gguf.GGUFWriter", tensors: Mapping[str, torch.Tensor], dtype: str) -> None:
    """Write the tensors behind the facts that the writer has been told, and close the file.

    Raises:
        UserError: a weight is too large for float16.
    """
    for name, value in tensors.items():
        array, kind = as_written(name, value.detach().float().numpy(), dtype)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_written(name: str, array: np.ndarray, dtype: str) -> tuple[np.ndarray, Any]:
    """A tensor's numbers and their type: vectors and what is ALWAYS_F32 in full, matrices as dtype says.

    Blocks of q8_0 are 32 numbers of a row: rows of another length are float16, as llama.cpp's own converter has it.
    """
    gguf = need_gguf()
    kinds = gguf.GGMLQuantizationType
    kind = kinds[TYPES[dtype][0]]
    if array.ndim < 2 or any(part in name for part in ALWAYS_F32):
        kind = kinds.F32
    elif kind == kinds.Q8_0 and array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = kinds.F16
    if kind == kinds.F16 and np.abs(array).max() > np.finfo(np.float16).max:
        raise UserError(f"{name} holds {np.abs(array).max():g}, too large for float16: take --dtype bfloat16")
    return gguf.quants.quantize(array, kind), kind
