"""Base language model: the whole decoder learns from text alone, plain or in conversations.

torchrun --nproc_per_node N trainer/train_llm.py [--flag value ...]
python trainer/train_llm.py --help
"""

from trainer.config import ROOT, StageConfig, parse_config
from trainer.stage import run_stage

LLM = StageConfig(
    name="llm",
    with_vision=False,
    trainable=("language_model",),
    data_path=str(ROOT / "dataset/data/llm.jsonl"),
    max_seq_len=512,
    batch_size=32,
    learning_rate=2e-3,
)

if __name__ == "__main__":
    run_stage(parse_config(LLM))
