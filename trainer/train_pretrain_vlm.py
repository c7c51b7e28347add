"""Stage 1, seeing: the projector and the decoder's last layer learn to caption; the rest is frozen.

torchrun --nproc_per_node N trainer/train_pretrain_vlm.py [--flag value ...]
python trainer/train_pretrain_vlm.py --help
"""

from trainer.config import ROOT, StageConfig, parse_config
from trainer.stage import run_stage

PRETRAIN_VLM = StageConfig(
    name="pretrain_vlm",
    trainable=("projector", "last_layer"),
    from_weight="llm",
    data_path=str(ROOT / "dataset/data/pretrain.jsonl"),
    max_seq_len=640,
    batch_size=16,
    learning_rate=4e-4,
)

if __name__ == "__main__":
    run_stage(parse_config(PRETRAIN_VLM))
