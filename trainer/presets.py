"""Batch sizes for cards of 4, 8, 12 and 24 GB: `--preset 8gb` on a stage script.

Each is the largest power of two that scripts/estimate.py lets through for the 26 M decoder and a tower of
CLIP-ViT-B/16's size, bfloat16 or float16, every row as long as the stage's max_seq_len and learnt but for its picture,
15 % of the card left free. They are counted for GPUs from Ampere on, and not measured on any. Both stages take 64
rows a step on every card: a preset decides where a run fits, never what it learns. Where there is accumulation,
twice the batch would not fit.
"""

from model.errors import UserError

STEP = 64  # rows of one rank


def _batch_of(rows: int) -> dict[str, int]:
    return {"batch_size": rows, "accumulation_steps": STEP // rows}


PRESETS: dict[str, dict[str, dict[str, int]]] = {  # rows of 640 tokens in pretrain_vlm, of 1024 in sft_vlm
    "4gb": {"pretrain_vlm": _batch_of(16), "sft_vlm": _batch_of(8)},  # at most 26 and 10 rows fit
    "8gb": {"pretrain_vlm": _batch_of(32), "sft_vlm": _batch_of(16)},  # 55 and 23
    "12gb": {"pretrain_vlm": _batch_of(64), "sft_vlm": _batch_of(32)},  # 84 and 36
    "24gb": {"pretrain_vlm": _batch_of(64), "sft_vlm": _batch_of(64)},  # 171 and 75
}


def preset_values(preset: str, stage: str) -> dict[str, int]:
    """The flags that a preset sets for a stage. Raises UserError where it has none for that stage."""
    if stage not in PRESETS[preset]:
        raise UserError(
            f"--preset {preset} is for {', '.join(PRESETS[preset])}, not for {stage}: find its --batch_size with "
            f"`python scripts/estimate.py --stage {stage} --memory_gb {preset.removesuffix('gb')}`"
        )
    return PRESETS[preset][stage]
