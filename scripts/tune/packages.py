"""TRL and `datasets`, or one line that says how to get them; the recipes import both from here."""

from huggingface_hub import constants

try:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
except ModuleNotFoundError as error:
    raise SystemExit(
        f"scripts/tune needs the package {error.name}, which is not installed: pip install -r requirements/trl.txt"
    ) from error

__all__ = ["DPOConfig", "DPOTrainer", "Dataset", "GRPOConfig", "GRPOTrainer", "SFTConfig", "SFTTrainer"]

constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would tell its makers of every run
