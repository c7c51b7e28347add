"""Stage 2, answering: the projector and the whole decoder learn conversations about pictures.

torchrun --nproc_per_node N trainer/train_sft_vlm.py [--flag value ...]
python trainer/train_sft_vlm.py --help
"""

from trainer.config import ROOT, StageConfig, parse_config
from trainer.stage import run_stage

SFT_VLM = StageConfig(
    name="sft_vlm",
    trainable=("projector", "language_model"),
    from_weight="pretrain_vlm",
    data_path=str(ROOT / "dataset/data/sft.jsonl"),
    max_seq_len=1024,
    batch_size=8,
    learning_rate=1e-4,
)

if __name__ == "__main__":
    run_stage(parse_config(SFT_VLM))
