"""What every export format takes and gives: the model to write, and what was written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from scripts.export.proof import prove, write_reference


@dataclass(frozen=True)
class Source:
    """What is converted, and how."""

    model: MiniMindForCausalLM  # in fp32; the export rounds it to what it writes, as the proof compares the two
    tokenizer: PreTrainedTokenizerFast
    name: str  # of the weight file, without its ending
    dtype: torch.dtype = torch.float32  # of the tensors written
    with_vision: bool = True  # ship the tower in a `transformers` folder
    engine: str = "transformers"  # of ENGINES, that a `llava` folder is for
    quantized: str | None = None  # gguf: a type of its matrices that torch has not

    @property
    def numbers(self) -> str:
        """What the file's numbers are called."""
        return self.quantized or str(self.dtype).removeprefix("torch.")

    @property
    def sees(self) -> bool:
        return isinstance(self.model, MiniMindVLM)


@dataclass(frozen=True)
class Exported:
    """What was written: for the card, the manifest and the proof."""

    kind: str  # the card's first sentence
    usage: str  # how to ask it, in `language`, for the card
    sees: bool
    has_tower: bool
    dtype: str
    library: str = "transformers"
    language: str = "python"
    trains: bool = True  # whether others can train it on
    further: str = ""  # Markdown, for the card, behind the usage
    # (model, tokenizer, folder, sees) -> writes what the proof compares with
    refer: Callable[[MiniMindForCausalLM, PreTrainedTokenizerFast, Path, bool], None] = write_reference
    # (folder, reference, tower's folder or None, train it too) -> what the manifest keeps; raises UserError
    prove: Callable[[Path, Path, str | None, bool], dict] = prove
