"""The stages as their scripts define them, for what is counted and measured without running them."""

from trainer.config import StageConfig
from trainer.train_llm import LLM
from trainer.train_pretrain_vlm import PRETRAIN_VLM
from trainer.train_sft_vlm import SFT_VLM

STAGES: dict[str, StageConfig] = {stage.name: stage for stage in (LLM, PRETRAIN_VLM, SFT_VLM)}


def choices_of(flag: str) -> tuple[str, ...]:
    """What a flag of the stage scripts may be."""
    return StageConfig.__dataclass_fields__[flag].metadata["choices"]
